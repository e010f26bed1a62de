"""The mask rule of packed rows, and attention under it.

Shapes: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, Q = G * T, H head size,
I blocks of queries, W widths of keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
Carry = TypeVar("Carry")

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)

# Queries per block of `row_attention`. On two CPU cores blocks of 64 and 256 took longer: small products, and more keys
# that nobody sees.
QUERY_BLOCK = 128
# How many blocks of keys a block of queries may read, where they are fewer than the row's. Each is a loop to compile:
# those of a row of 1,920 took 2.0 s, and 1.0 s in powers of two, but those made a row of one pair 20 % slower.
WIDTHS = sorted(multiple << i for multiple in (1, 3) for i in range(16))


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


def row_attention(positions_BT: Array, q_end_BT: Array, softcap: float | None = None, unroll: bool = False):
    """Returns the attention function of some packed rows, as the decoder calls it: (q, k, v, window, cache).

    It reads few keys that nobody sees. unroll: whether blocks of queries are laid out one by one, each over all keys up
    to its end: then what is computed does not depend on the rows, as GPUs like it, whose host runs the loops.
    """
    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: None):
        return _in_blocks(softcap, unroll, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window), cache

    return call


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(softcap: float | None, unroll: bool, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array,
               q_end_BT: Array, window: Array | int | None) -> Array:
    """Returns what `attend` does under the row's mask, one block of queries after the other.

    Scores are computed again for the gradients, from the log of their sum (Dao et al. 2022, arXiv:2205.14135): kept,
    those of all layers would be most of a step's memory.
    """
    return _forward(softcap, unroll, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window)[0]


def _forward(softcap: float | None, unroll: bool, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array,
             q_end_BT: Array, window: Array | int | None) -> tuple[Array, tuple]:
    k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    q_IBKQH = _to_blocks(q_BTNH, k_BTKH.shape[2])
    scores = _scores_of(softcap, positions_BT, q_end_BT, window)

    def block(i: Any, keys: Keys, done: tuple[Array, Array]) -> tuple[Array, Array]:
        scores_BKQS = scores(i, keys, _at(q_IBKQH, i), keys.of(k_BKTH, axis=2))
        max_BKQ1 = jnp.max(scores_BKQS, axis=-1, keepdims=True)
        exp_BKQS = jnp.exp(scores_BKQS - max_BKQ1)
        sum_BKQ1 = jnp.sum(exp_BKQS, axis=-1, keepdims=True)
        out_BKQH = _dot("bkqs,bksh->bkqh", exp_BKQS.astype(v_BKTH.dtype), keys.of(v_BKTH, axis=2)) / sum_BKQ1
        return _put(done[0], out_BKQH, i), _put(done[1], max_BKQ1 + jnp.log(sum_BKQ1), i)

    out_IBKQH, lse_IBKQ1 = _over_blocks(unroll, q_end_BT, block, (
        jnp.zeros_like(q_IBKQH), jnp.zeros((*q_IBKQH.shape[:-1], 1), jnp.float32)))
    out_BTNH, lse_IBKQ1 = checkpoint_name((_to_tokens(out_IBKQH, q_BTNH.shape), lse_IBKQ1), "attn_out")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window, out_BTNH, lse_IBKQ1)


def _backward(softcap: float | None, unroll: bool, residuals: tuple, dout_BTNH: Array) -> tuple:
    q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window, out_BTNH, lse_IBKQ1 = residuals
    k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    scale, dtype = k_BKTH.shape[-1]**-0.5, q_BTNH.dtype
    q_IBKQH, out_IBKQH, dout_IBKQH = (_to_blocks(x, k_BTKH.shape[2]) for x in (q_BTNH, out_BTNH, dout_BTNH))
    delta_IBKQ1 = jnp.sum(dout_IBKQH.astype(jnp.float32) * out_IBKQH.astype(jnp.float32), axis=-1, keepdims=True)
    scores = _scores_of(softcap, positions_BT, q_end_BT, window)

    def block(i: Any, keys: Keys, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q_BKQH, dout_BKQH, k_BKSH = _at(q_IBKQH, i), _at(dout_IBKQH, i), keys.of(k_BKTH, axis=2)
        scores_BKQS = scores(i, keys, q_BKQH, k_BKSH)
        probs_BKQS = jnp.exp(scores_BKQS - _at(lse_IBKQ1, i))
        dprobs_BKQS = _dot("bkqh,bksh->bkqs", dout_BKQH, keys.of(v_BKTH, axis=2))
        dscores_BKQS = probs_BKQS * (dprobs_BKQS - _at(delta_IBKQ1, i)) * scale
        if softcap is not None:
            # A hidden score is far below -softcap, and its probability 0: 0 times the square of that is no number.
            dscores_BKQS *= 1 - jnp.square(jnp.maximum(scores_BKQS, -softcap) / softcap)
        dscores_BKQS, probs_BKQS = dscores_BKQS.astype(dtype), probs_BKQS.astype(dtype)
        dq_IBKQH, dk_BKHT, dv_BKHT = sums
        return (_put(dq_IBKQH, _dot("bkqs,bksh->bkqh", dscores_BKQS, k_BKSH), i),
                keys.add(dk_BKHT, _dot("bkqh,bkqs->bkhs", q_BKQH, dscores_BKQS)),
                keys.add(dv_BKHT, _dot("bkqh,bkqs->bkhs", dout_BKQH, probs_BKQS)))

    # Keys come last: the small operand of each product over queries is the one to transpose.
    zeros_BKHT = jnp.zeros(jnp.swapaxes(k_BKTH, 2, 3).shape, jnp.float32)
    dq_IBKQH, *dkv_BKHT = _over_blocks(unroll, q_end_BT, block, (jnp.zeros_like(q_IBKQH), zeros_BKHT, zeros_BKHT))
    dk_BTKH, dv_BTKH = (x.transpose(0, 3, 1, 2).astype(dtype) for x in dkv_BKHT)
    return _to_tokens(dq_IBKQH, q_BTNH.shape), dk_BTKH, dv_BTKH, None, None, None


_in_blocks.defvjp(_forward, _backward)


class Keys(NamedTuple):
    """The keys that a block of queries reads."""

    start: Any  # may be traced
    width: int

    def of(self, x: Array, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.width, axis)

    def add(self, sums_BKHT: Array, x_BKHS: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(sums_BKHT, self.of(sums_BKHT, 3) + x_BKHS, self.start, 3)


def _over_blocks(unroll: bool, q_end_BT: Array, block: Callable[[Any, Keys, Carry], Carry], carry: Carry) -> Carry:
    """Returns the carry after `block(i, keys, carry)` for each block i of queries, in any order.

    Keys run from the first that any query of the block sees, or a few before it: there is a loop for each of some
    widths, over the blocks that need it. With unroll they run from the row's first.
    """
    T = q_end_BT.shape[1]
    starts_I = np.arange(0, T, QUERY_BLOCK, dtype=np.int32)
    ends_I = np.minimum(starts_I + QUERY_BLOCK, T)
    if unroll:
        for i, end in enumerate(ends_I.tolist()):
            carry = block(i, Keys(0, end), carry)
        return carry
    widths_W = np.array([*(QUERY_BLOCK * n for n in WIDTHS if QUERY_BLOCK * n < T), T], np.int32)
    # A block sees the keys before its end that are hidden from no query before its start.
    keys_T, hidden_T = jnp.arange(T, dtype=jnp.int32), jnp.max(q_end_BT, axis=0)
    first_I = jnp.min(jnp.where(hidden_T > starts_I[:, None], keys_T, T), axis=1)
    width_I = jnp.searchsorted(widths_W, ends_I - first_I)
    order_I = jnp.argsort(width_I)
    bounds_W = jnp.searchsorted(width_I[order_I], jnp.arange(len(widths_W) + 1))
    for w, width in enumerate(widths_W.tolist()):
        def one(n: Any, carry: Carry, width: int = width) -> Carry:
            i = order_I[n]
            return block(i, Keys(jnp.minimum(first_I[i], T - width), width), carry)

        carry = jax.lax.fori_loop(bounds_W[w], bounds_W[w + 1], one, carry)
    return carry


def _scores_of(softcap: float | None, positions_BT: Array, q_end_BT: Array, window: Array | int | None
               ) -> Callable[[Any, Keys, Array, Array], Array]:
    """Returns the function that gives masked float32 scores [B, K, Q, S] of a block's queries and some keys."""
    def call(i: Any, keys: Keys, q_BKQH: Array, k_BKSH: Array) -> Array:
        scores_BKQS = _dot("bkqh,bksh->bkqs", q_BKQH, k_BKSH) * q_BKQH.shape[-1]**-0.5
        if softcap is not None:
            scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap)
        queries_T, keys_S = i * QUERY_BLOCK + jnp.arange(QUERY_BLOCK), keys.start + jnp.arange(keys.width)
        mask_BTS = visible(queries_T, keys_S, keys.of(q_end_BT, axis=1))
        if window is not None:
            q_positions_BT = positions_BT.at[:, queries_T].get(mode="clip")
            mask_BTS &= within_window(q_positions_BT, keys.of(positions_BT, axis=1), window)
        scores_BKGTS = scores_BKQS.reshape(*q_BKQH.shape[:2], -1, *mask_BTS.shape[1:])
        masked_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
        return masked_BKGTS.reshape(scores_BKQS.shape)

    return call


def _to_blocks(x_BTNH: Array, num_key_heads: int) -> Array:
    """Returns [I, B, K, Q, H]: in each of I blocks, the queries of all heads that share a key head, as one matmul's
    rows; the last block is padded."""
    B, T, N, H = x_BTNH.shape
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, -T % QUERY_BLOCK), (0, 0), (0, 0)))
    x_BITKGH = x_BTNH.reshape(B, -1, QUERY_BLOCK, num_key_heads, N // num_key_heads, H)
    x_IBKGTH = x_BITKGH.transpose(1, 0, 3, 4, 2, 5)
    return x_IBKGTH.reshape(*x_IBKGTH.shape[:3], -1, H)


def _to_tokens(x_IBKQH: Array, shape: tuple[int, ...]) -> Array:
    """Returns x [B, T, N, H], the inverse of `_to_blocks`."""
    B, T, N, H = shape
    x_IBKGTH = x_IBKQH.reshape(*x_IBKQH.shape[:3], -1, QUERY_BLOCK, H)
    return x_IBKGTH.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, H)[:, :T]


def _at(x_I: Array, i: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(x_I, i, keepdims=False)


def _put(x_I: Array, x: Array, i: Any) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x_I, x.astype(x_I.dtype), i, 0)


def causal_attention(positions_BT: Array, softcap: float | None = None):
    """Returns the attention function of ordinary sequences, one to a row from position 0."""
    return row_attention(positions_BT, jnp.full_like(positions_BT, positions_BT.shape[1]), softcap, unroll=True)


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
