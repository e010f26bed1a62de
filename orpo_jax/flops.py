"""Useful work of a step, for `mfu`: what the model asks for, not what padding, masking or recomputation add."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from orpo_jax import packing
from orpo_jax.families import Architecture
from orpo_jax.model import Spec
from orpo_jax.t5 import EncoderDecoderSpec

# Dense bfloat16 FLOP/s of one chip (not of one core), by a part of its name: the first that fits. Sources: Google
# Cloud's pages of TPU v4, v5e, v5p and v6e; NVIDIA's data sheets.
# (A v5p calls itself "TPU v5".)
PEAK_FLOPS = {"v4": 275e12, "v5 lite": 197e12, "v5e": 197e12, "v5p": 459e12, "TPU v5": 459e12,
              "v6 lite": 918e12, "v6e": 918e12, "A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12,
              "B200": 2250e12, "L40S": 362e12, "L4": 121e12}


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 peak of one device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def matmul_weights(arch: Architecture) -> int:
    """Returns how many weights each token is multiplied with: the layers' matrices, and the head's even if tied.

    Of an encoder-decoder: all that a token of the decoder may be.
    """
    return layer_weights(arch, "decoder_layers/" if arch.encodes else "layers/") + head_weights(arch)


def head_weights(arch: Architecture) -> int:
    return arch.spec.vocab_size * arch.spec.d_model


def layer_weights(arch: Architecture, *paths: str) -> int:
    """Returns how many weights the matrices of layers have whose paths start so, of experts those that a token uses."""
    sizes = arch.spec.sizes
    used = lambda weight: sizes | {"x": arch.spec.experts_per_token} if "x" in weight.stacked else sizes
    return sum(math.prod(weight.shape(used(weight))) for weight in arch.table
               if weight.decays and weight.path.startswith(paths))


def position_flops(arch: Architecture) -> float:
    """Returns the FLOPs of a forward and a backward pass for a position, those of attention's scores left out."""
    return 6.0 * matmul_weights(arch)


def attended(lengths: Any, window: int | None) -> Any:
    """Returns the (query, key) pairs of causal sequences: all keys up to the query's, or those in its window."""
    full = np.minimum(lengths, window if window is not None else np.max(lengths, initial=0)).astype(np.int64)
    return full * (full + 1) // 2 + (lengths - full) * full


def visible_keys(branches: np.ndarray, window: int | None) -> int:
    """Returns the (query, key) pairs of pairs that share their trunk; branches as packing.branch_lengths has them."""
    trunk, chosen, rejected = (attended(lengths, window).sum() for lengths in branches.T)
    return int(chosen + rejected - trunk)


def step_flops(arch: Architecture, branches: np.ndarray, encoded: np.ndarray | None = None) -> float:
    """Returns the FLOPs of a forward and a backward pass over pairs that share their trunk, or their encoded prompt.

    branches: as packing.branch_lengths has them. encoded: the tokens of each pair's prompt that an encoder reads.
    A multiply and an add per weight and token, and of scores and values per head, query and key; twice that again for
    the gradients.
    """
    if isinstance(arch.spec, EncoderDecoderSpec):
        assert encoded is not None
        return _encoder_decoder_flops(arch, arch.spec, branches, encoded)
    return flops_of(arch.spec, matmul_weights(arch), packing.count_positions(branches), (
        visible_keys(branches, window) for window in arch.spec.windows))


def flops_of(spec: Spec, weights: int, tokens: int, attended_L: Iterable[int]) -> float:
    """Returns the same from the number of tokens, and of attended (query, key) pairs of each layer."""
    return 6.0 * weights * tokens + 12.0 * spec.num_heads * spec.head_dim * sum(attended_L)


def _encoder_decoder_flops(arch: Architecture, spec: EncoderDecoderSpec, branches: np.ndarray, encoded: np.ndarray
                           ) -> float:
    crossed = layer_weights(arch, "decoder_layers/cross/k", "decoder_layers/cross/v")  # with the encoder's output
    decoded = branches[:, 1:].sum(axis=1)
    to_prompt, to_itself = int((decoded * encoded).sum()), visible_keys(branches, None)
    return (flops_of(spec, layer_weights(arch, "encoder_layers/") + crossed, int(encoded.sum()),
                     [int((encoded**2).sum())] * spec.num_layers)
            + flops_of(spec, matmul_weights(arch) - crossed, int(decoded.sum()),
                       [to_prompt + to_itself] * spec.num_decoder_layers))
