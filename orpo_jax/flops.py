"""Useful work of a step, for `mfu`: what the model asks for, not what padding, masking or recomputation add."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from orpo_jax.model import Spec

# Dense bfloat16 FLOP/s of one chip (not of one core), by a part of its `device_kind`. Sources: Google Cloud's pages of
# TPU v4, v5e, v5p and v6e; NVIDIA's data sheets of A100, H100 SXM, H200 and B200.
PEAK_FLOPS = {"v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "v6 lite": 918e12, "v6e": 918e12,
              "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 peak of one device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def matmul_weights(spec: Spec, params: Any) -> int:
    """Returns how many weights each token is multiplied with: the layers' matrices, and the head's even if tied."""
    matrices = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2]
    return sum(leaf.size for leaf in matrices) + spec.vocab_size * spec.d_model


def attended(lengths: Any, window: int | None) -> Any:
    """Returns the (query, key) pairs of causal sequences: all keys up to the query's, or those in its window."""
    full = np.minimum(lengths, window if window is not None else np.max(lengths, initial=0)).astype(np.int64)
    return full * (full + 1) // 2 + (lengths - full) * full


def step_flops(spec: Spec, weights: int, branches: np.ndarray) -> float:
    """Returns the FLOPs of a forward and a backward pass over pairs that share their trunk.

    branches: [pairs, 3], positions of the trunk, and of the chosen and the rejected sequence with it. A multiply and an
    add per weight and token, and of scores and values per head, query and key; twice that again for the gradients.
    """
    trunk, chosen, rejected = branches.T
    return flops_of(spec, weights, int((chosen + rejected - trunk).sum()), (
        int((attended(chosen, window) + attended(rejected, window) - attended(trunk, window)).sum())
        for window in spec.windows))


def flops_of(spec: Spec, weights: int, tokens: int, attended_L: Iterable[int]) -> float:
    """Returns the same from the number of tokens, and of attended (query, key) pairs of each layer."""
    return 6.0 * weights * tokens + 12.0 * spec.num_heads * spec.head_dim * sum(attended_L)
