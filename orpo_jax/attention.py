"""The mask rule of packed rows, and attention under it.

Shapes: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, Q = G * T, H head size.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Queries per block of `row_attention`: a block reads only the keys up to its own end, about half of the work for long
# rows. 256 was the fastest on two CPU cores.
QUERY_BLOCK = 256


def visible(queries_T: Array, keys_S: Array, q_end_BS: Array) -> Array:
    """Returns which keys each query sees, [B, T, S]: the one rule of a row, `k <= q < q_end[k]` (see packing.py)."""
    k_BTS, q_BTS = keys_S[None, None, :], queries_T[None, :, None]
    return (k_BTS <= q_BTS) & (q_BTS < q_end_BS[:, None, :])


def within_window(q_positions_BT: Array, k_positions_BS: Array, window: Array | int) -> Array:
    """Returns which keys lie in each query's sliding window, [B, T, S]; by position, since branches share theirs."""
    return q_positions_BT[:, :, None] - k_positions_BS[:, None, :] < window


def attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, softcap: float | None = None) -> Array:
    """Returns softmax(q k' / sqrt(H)) v over visible keys, [B, T, N, H]; the softmax is float32.

    softcap: scores s become softcap * tanh(s / softcap) before the mask.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def row_attention(positions_BT: Array, q_end_BT: Array, softcap: float | None = None):
    """Returns the attention function of some packed rows, as the decoder calls it: (q, k, v, window, cache)."""
    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: None):
        return _in_blocks(softcap, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window), cache

    return call


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(softcap: float | None, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array,
               q_end_BT: Array, window: Array | int | None) -> Array:
    """Returns what `attend` does under the row's mask, one block of queries after the other.

    Scores are computed again for the gradients, from the log of their sum (Dao et al. 2022, arXiv:2205.14135): kept,
    those of all layers would be most of a step's memory.
    """
    return _forward(softcap, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window)[0]


def _scores(softcap: float | None, q_BKQH: Array, k_BKSH: Array, mask_BTS: Array) -> Array:
    """Returns masked float32 scores [B, K, Q, S], Q the queries of all G heads that share a key head."""
    scale = q_BKQH.shape[-1]**-0.5
    scores_BKQS = jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap)
    scores_BKGTS = scores_BKQS.reshape(*q_BKQH.shape[:2], -1, *mask_BTS.shape[1:])
    return jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min).reshape(scores_BKQS.shape)


def _blocks(positions_BT: Array, q_end_BT: Array, window: Array | int | None) -> Iterator[tuple[slice, slice, Array]]:
    """Yields the queries of each block, the keys that they may see, and which they do, [B, T, S]."""
    T = positions_BT.shape[1]
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        mask_BTS = visible(jnp.arange(start, stop), jnp.arange(stop), q_end_BT[:, :stop])
        if window is not None:
            mask_BTS &= within_window(positions_BT[:, start:stop], positions_BT[:, :stop], window)
        yield slice(start, stop), slice(0, stop), mask_BTS


def _by_key_head(x_BTNH: Array, num_key_heads: int) -> Array:
    """Returns [B, K, G * T, H]: the queries of all heads that share a key head, as one matmul's rows."""
    B, T, _, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_key_heads, -1, H).transpose(0, 2, 3, 1, 4).reshape(B, num_key_heads, -1, H)


def _by_token(x_BKQH: Array, T: int) -> Array:
    """Returns [B, T, N, H] of [B, K, G * T, H]."""
    B, K, _, H = x_BKQH.shape
    return x_BKQH.reshape(B, K, -1, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def _forward(softcap: float | None, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array,
             q_end_BT: Array, window: Array | int | None) -> tuple[Array, tuple]:
    k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    outs, lses = [], []
    for queries, keys, mask_BTS in _blocks(positions_BT, q_end_BT, window):
        q_BKQH = _by_key_head(q_BTNH[:, queries], k_BKSH.shape[1])
        scores_BKQS = _scores(softcap, q_BKQH, k_BKSH[:, :, keys], mask_BTS)
        max_BKQ1 = jnp.max(scores_BKQS, axis=-1, keepdims=True)
        exp_BKQS = jnp.exp(scores_BKQS - max_BKQ1)
        sum_BKQ1 = jnp.sum(exp_BKQS, axis=-1, keepdims=True)
        out_BKQH = jnp.einsum("bkqs,bksh->bkqh", exp_BKQS.astype(v_BKSH.dtype), v_BKSH[:, :, keys],
                              preferred_element_type=jnp.float32) / sum_BKQ1
        outs.append(_by_token(out_BKQH.astype(v_BKSH.dtype), mask_BTS.shape[1]))
        lses.append(max_BKQ1 + jnp.log(sum_BKQ1))
    out_BTNH, lses = checkpoint_name((jnp.concatenate(outs, axis=1), lses), "attn_out")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window, out_BTNH, lses)


def _backward(softcap: float | None, residuals: tuple, dout_BTNH: Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window, out_BTNH, lses = residuals
    k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    K, scale, dtype = k_BKSH.shape[1], k_BKSH.shape[-1]**-0.5, q_BTNH.dtype
    # Keys come last: the small operand of each product over queries is the one to transpose.
    dk_BKHS, dv_BKHS = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (k_BKSH, v_BKSH))
    dqs = []
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    for (queries, keys, mask_BTS), lse_BKQ1 in zip(_blocks(positions_BT, q_end_BT, window), lses, strict=True):
        q_BKQH, out_BKQH, dout_BKQH = (_by_key_head(x[:, queries], K) for x in (q_BTNH, out_BTNH, dout_BTNH))
        scores_BKQS = _scores(softcap, q_BKQH, k_BKSH[:, :, keys], mask_BTS)
        probs_BKQS = jnp.exp(scores_BKQS - lse_BKQ1)
        delta_BKQ1 = jnp.sum(dout_BKQH.astype(jnp.float32) * out_BKQH.astype(jnp.float32), axis=-1, keepdims=True)
        dscores_BKQS = probs_BKQS * (dot("bkqh,bksh->bkqs", dout_BKQH, v_BKSH[:, :, keys]) - delta_BKQ1) * scale
        if softcap is not None:
            # A hidden score is far below -softcap, and its probability 0: 0 times the square of that is no number.
            dscores_BKQS *= 1 - jnp.square(jnp.maximum(scores_BKQS, -softcap) / softcap)
        dscores_BKQS, probs_BKQS = dscores_BKQS.astype(dtype), probs_BKQS.astype(dtype)
        dqs.append(_by_token(dot("bkqs,bksh->bkqh", dscores_BKQS, k_BKSH[:, :, keys]), mask_BTS.shape[1]))
        dk_BKHS = dk_BKHS.at[..., keys].add(dot("bkqh,bkqs->bkhs", q_BKQH, dscores_BKQS))
        dv_BKHS = dv_BKHS.at[..., keys].add(dot("bkqh,bkqs->bkhs", dout_BKQH, probs_BKQS))
    dk_BTKH, dv_BTKH = (x.transpose(0, 3, 1, 2).astype(dtype) for x in (dk_BKHS, dv_BKHS))
    return jnp.concatenate(dqs, axis=1).astype(dtype), dk_BTKH, dv_BTKH, None, None, None


_in_blocks.defvjp(_forward, _backward)


def causal_attention(positions_BT: Array, softcap: float | None = None):
    """Returns the attention function of ordinary sequences, one to a row from position 0."""
    return row_attention(positions_BT, jnp.full_like(positions_BT, positions_BT.shape[1]), softcap)


def cached_attention(start: Array | int, padding_B: Array, softcap: float | None = None):
    """Returns the attention function of generation: queries from cache slot `start` on, over a [B, S, K, H] cache.

    padding_B: how many slots at the start of each row are padding, since prompts are left-padded.
    """
    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: tuple[Array, Array]):
        k_BSKH = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BTKH, start, axis=1)
        v_BSKH = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BTKH, start, axis=1)
        S, T = k_BSKH.shape[1], q_BTNH.shape[1]
        slots_S, queries_T = jnp.arange(S), start + jnp.arange(T)
        mask_BTS = (slots_S <= queries_T[:, None])[None] & (slots_S >= padding_B[:, None])[:, None]
        if window is not None:
            mask_BTS &= (queries_T[:, None] - slots_S < window)[None]
        # A padding query sees nothing: it attends to itself, and nobody reads it.
        mask_BTS |= (slots_S == queries_T[:, None])[None]
        return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap), (k_BSKH, v_BSKH)

    return call
