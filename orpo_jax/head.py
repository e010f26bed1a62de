"""The language-model head: hidden states -> log-probabilities of the targets. Logits never leave this file whole.

Shapes: B rows, T tokens, D model, V vocabulary.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# Bytes of float32 logits that may live at a time on one device.
LOGITS_BUDGET = 2**30


def precision(dtype: jnp.dtype) -> Any:
    """Returns the context in which float32 matmuls are float32 on accelerators too, which else round their inputs."""
    return jax.default_matmul_precision("float32") if dtype == jnp.float32 else contextlib.nullcontext()


def logits(hidden_BTD: Array, unembed_VD: Array) -> Array:
    """Returns float32 logits [B, T, V]."""
    # The cast is in here so that a float32 weight has its gradient added up in float32, chunk after chunk.
    return jnp.einsum("btd,vd->btv", hidden_BTD, unembed_VD.astype(hidden_BTD.dtype),
                      preferred_element_type=jnp.float32)


def num_chunks(rows_per_device: int, T: int, V: int) -> int:
    """Returns the least divisor of T that cuts the tokens of a row so that their logits stay under the budget."""
    need = rows_per_device * T * V * 4 / LOGITS_BUDGET
    return next(n for n in range(1, T + 1) if T % n == 0 and (n >= need or n == T))


def token_logps(hidden_BTD: Array, unembed_VD: Array, targets_BT: Array, *, chunks: int = 1) -> tuple[Array, Array]:
    """Returns the targets' log-probabilities and the mean logit of each position, both float32 [B, T].

    With chunks > 1 the logits of T / chunks positions of each row live at a time, and are computed again in the
    backward pass.
    """
    def of_chunk(hidden_BTD: Array, targets_BT: Array) -> tuple[Array, Array]:
        logits_BTV = logits(hidden_BTD, unembed_VD)
        # A compare and a sum, not a gather: it stays local where the vocabulary is sharded.
        is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
        target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
        return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1), jnp.mean(logits_BTV, axis=-1)

    if chunks == 1:
        return of_chunk(hidden_BTD, targets_BT)
    B, T, D = hidden_BTD.shape
    split = (hidden_BTD.reshape(B, chunks, T // chunks, D).swapaxes(0, 1),
             targets_BT.reshape(B, chunks, T // chunks).swapaxes(0, 1))
    _, stacked = jax.lax.scan(lambda _, chunk: (None, jax.checkpoint(of_chunk)(*chunk)), None, split)
    logps_BT, mean_logits_BT = (x.swapaxes(0, 1).reshape(B, T) for x in stacked)
    return logps_BT, mean_logits_BT
