"""The mask rule of packed rows, and attention under it.

Shapes: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head size, I blocks of
P queries, Q = G * P, W widths of keys.
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

# The most queries that a block of `row_attention` has. On two CPU cores blocks of 64 and 256 took longer: small
# products, and more keys that nobody sees.
QUERY_BLOCK = 128
BLOCK_UNIT = 8  # sizes of blocks are multiples of this: matrix units and vectors have such sizes
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

    A block of queries reads the keys from the first that one of them sees to the block's end, and some more. unroll:
    lay the blocks out one by one, each over the row's keys from the first to the block's end. Then what is computed
    does not depend on the rows, as GPUs like it, whose host runs the loops.
    """
    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: None):
        return _in_blocks(softcap, unroll, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window), cache

    return call


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(softcap: float | None, unroll: bool, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array,
               q_end_BT: Array, window: Array | int | None) -> Array:
    """Returns what `attend` does under the rows' masks, one block of a row's queries after the other.

    Scores are computed again for the gradients, from the log of their sum (Dao et al. 2022, arXiv:2205.14135): kept,
    those of all layers would be most of a step's memory.
    """
    return _forward(softcap, unroll, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window)[0]


def _over_rows(unroll: bool, function: Callable, *of_rows_B: Array) -> Any:
    """Returns the function of each row: of all at once, or one after the other where loops go by what a row holds."""
    return jax.vmap(function)(*of_rows_B) if unroll else jax.lax.map(lambda of_row: function(*of_row), of_rows_B)


def _forward(softcap: float | None, unroll: bool, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array,
             q_end_BT: Array, window: Array | int | None) -> tuple[Array, tuple]:
    def row(q_TNH: Array, k_TKH: Array, v_TKH: Array, positions_T: Array, q_end_T: Array) -> tuple[Array, Array]:
        k_KTH, v_KTH = (x.swapaxes(0, 1) for x in (k_TKH, v_TKH))
        q_IKQH = _to_blocks(q_TNH, len(k_KTH))
        scores = _scores_of(softcap, positions_T, q_end_T, window)

        def block(i: Any, keys: Keys, done: tuple[Array, Array]) -> tuple[Array, Array]:
            scores_KQS = scores(i, keys, _at(q_IKQH, i), keys.of(k_KTH, axis=1))
            max_KQ1 = jnp.max(scores_KQS, axis=-1, keepdims=True)
            exp_KQS = jnp.exp(scores_KQS - max_KQ1)
            sum_KQ1 = jnp.sum(exp_KQS, axis=-1, keepdims=True)
            out_KQH = _dot("kqs,ksh->kqh", exp_KQS.astype(v_KTH.dtype), keys.of(v_KTH, axis=1)) / sum_KQ1
            return _put(done[0], out_KQH, i), _put(done[1], max_KQ1 + jnp.log(sum_KQ1), i)

        out_IKQH, lse_IKQ1 = _over_blocks(unroll, positions_T, q_end_T, window, block, (
            jnp.zeros_like(q_IKQH), jnp.zeros((*q_IKQH.shape[:-1], 1), jnp.float32)))
        return _to_tokens(out_IKQH, q_TNH.shape), lse_IKQ1

    out_BTNH, lse_BIKQ1 = checkpoint_name(
        _over_rows(unroll, row, q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT), "attn_out")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, positions_BT, q_end_BT, window, out_BTNH, lse_BIKQ1)


def _backward(softcap: float | None, unroll: bool, residuals: tuple, dout_BTNH: Array) -> tuple:
    *of_rows_B, window, out_BTNH, lse_BIKQ1 = residuals

    def row(q_TNH: Array, k_TKH: Array, v_TKH: Array, positions_T: Array, q_end_T: Array, out_TNH: Array,
            lse_IKQ1: Array, dout_TNH: Array) -> tuple[Array, Array, Array]:
        k_KTH, v_KTH = (x.swapaxes(0, 1) for x in (k_TKH, v_TKH))
        q_IKQH, out_IKQH, dout_IKQH = (_to_blocks(x, len(k_KTH)) for x in (q_TNH, out_TNH, dout_TNH))
        delta_IKQ1 = jnp.sum(dout_IKQH.astype(jnp.float32) * out_IKQH.astype(jnp.float32), axis=-1, keepdims=True)
        scores, scale, dtype = _scores_of(softcap, positions_T, q_end_T, window), k_KTH.shape[-1]**-0.5, q_TNH.dtype

        def block(i: Any, keys: Keys, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            q_KQH, dout_KQH, k_KSH = _at(q_IKQH, i), _at(dout_IKQH, i), keys.of(k_KTH, axis=1)
            scores_KQS = scores(i, keys, q_KQH, k_KSH)
            probs_KQS = jnp.exp(scores_KQS - _at(lse_IKQ1, i))
            dprobs_KQS = _dot("kqh,ksh->kqs", dout_KQH, keys.of(v_KTH, axis=1))
            dscores_KQS = probs_KQS * (dprobs_KQS - _at(delta_IKQ1, i)) * scale
            if softcap is not None:
                # A hidden score is far below -softcap, and its probability 0: 0 times the square of that is no number.
                dscores_KQS *= 1 - jnp.square(jnp.maximum(scores_KQS, -softcap) / softcap)
            dscores_KQS, probs_KQS = dscores_KQS.astype(dtype), probs_KQS.astype(dtype)
            dq_IKQH, dk_KHT, dv_KHT = sums
            return (_put(dq_IKQH, _dot("kqs,ksh->kqh", dscores_KQS, k_KSH), i),
                    keys.add(dk_KHT, _dot("kqh,kqs->khs", q_KQH, dscores_KQS)),
                    keys.add(dv_KHT, _dot("kqh,kqs->khs", dout_KQH, probs_KQS)))

        # Keys come last: the small operand of each product over queries is the one to transpose.
        zeros_KHT = jnp.zeros(jnp.swapaxes(k_KTH, 1, 2).shape, jnp.float32)
        zeros = jnp.zeros_like(q_IKQH), zeros_KHT, zeros_KHT
        dq_IKQH, *dkv_KHT = _over_blocks(unroll, positions_T, q_end_T, window, block, zeros)
        dk_TKH, dv_TKH = (x.transpose(2, 0, 1).astype(dtype) for x in dkv_KHT)
        return _to_tokens(dq_IKQH, q_TNH.shape), dk_TKH, dv_TKH

    return *_over_rows(unroll, row, *of_rows_B, out_BTNH, lse_BIKQ1, dout_BTNH), None, None, None


_in_blocks.defvjp(_forward, _backward)


class Keys(NamedTuple):
    """The keys that a block of queries reads."""

    start: Any  # may be traced
    width: int

    def of(self, x: Array, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.width, axis)

    def add(self, sums_KHT: Array, x_KHS: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(sums_KHT, self.of(sums_KHT, 2) + x_KHS, self.start, 2)


def _over_blocks(unroll: bool, positions_T: Array, q_end_T: Array, window: Array | int | None,
                 block: Callable[[Any, Keys, Carry], Carry], carry: Carry) -> Carry:
    """Returns the carry after `block(i, keys, carry)` for each block i of a row's queries, in any order.

    Keys run from the first that a query of the block sees, under a window from that or one before it, over the least of
    some widths that reaches the block's end: there is a loop for each width, over the blocks that need it. No query of
    the block sees the keys that a width adds: they are past its end or, where the row ends, before its first. With
    unroll keys run from the row's first to the block's end.
    """
    T = len(q_end_T)
    P = block_size(T)
    starts_I = np.arange(0, T, P, dtype=np.int32)
    ends_I = np.minimum(starts_I + P, T)
    if unroll:
        for i, end in enumerate(ends_I.tolist()):
            carry = block(i, Keys(0, end), carry)
        return carry
    widths_W = np.array([*(P * n for n in WIDTHS if P * n < T), T], np.int32)
    seen_IT = q_end_T > starts_I[:, None]  # by a query at the block's start or after it
    if window is not None:
        q_positions_IP = jnp.pad(positions_T, (0, -T % P), mode="edge").reshape(-1, P)
        seen_IT &= within_window(jnp.min(q_positions_IP, axis=1)[None], positions_T[None], window)[0]
    first_I = jnp.min(jnp.where(seen_IT, jnp.arange(T, dtype=jnp.int32), T), axis=1)
    width_I = jnp.searchsorted(widths_W, ends_I - first_I)
    order_I = jnp.argsort(width_I)
    bounds_W = jnp.searchsorted(width_I[order_I], jnp.arange(len(widths_W) + 1))
    for w, width in enumerate(widths_W.tolist()):
        def one(n: Any, carry: Carry, width: int = width) -> Carry:
            i = order_I[n]
            return block(i, Keys(jnp.minimum(first_I[i], T - width), width), carry)

        carry = jax.lax.fori_loop(bounds_W[w], bounds_W[w + 1], one, carry)
    return carry


def _scores_of(softcap: float | None, positions_T: Array, q_end_T: Array, window: Array | int | None
               ) -> Callable[[Any, Keys, Array, Array], Array]:
    """Returns the function that gives masked float32 scores [K, Q, S] of a block's queries and some keys of a row."""
    P = block_size(len(positions_T))

    def call(i: Any, keys: Keys, q_KQH: Array, k_KSH: Array) -> Array:
        scores_KQS = _dot("kqh,ksh->kqs", q_KQH, k_KSH) * q_KQH.shape[-1]**-0.5
        if softcap is not None:
            scores_KQS = softcap * jnp.tanh(scores_KQS / softcap)
        queries_P, keys_S = i * P + jnp.arange(P), keys.start + jnp.arange(keys.width)
        mask_1PS = visible(queries_P, keys_S, keys.of(q_end_T, axis=0)[None])
        if window is not None:
            q_positions_P = positions_T.at[queries_P].get(mode="clip")
            mask_1PS &= within_window(q_positions_P[None], keys.of(positions_T, axis=0)[None], window)
        scores_KGPS = scores_KQS.reshape(len(q_KQH), -1, *mask_1PS.shape[1:])
        return jnp.where(mask_1PS, scores_KGPS, jnp.finfo(jnp.float32).min).reshape(scores_KQS.shape)

    return call


def block_size(T: int) -> int:
    """Returns P for a row of T queries: blocks are as few as can be, and of one size."""
    num_blocks = -(-T // QUERY_BLOCK)
    return -(-T // (num_blocks * BLOCK_UNIT)) * BLOCK_UNIT


def _to_blocks(x_TNH: Array, num_key_heads: int) -> Array:
    """Returns [I, K, Q, H]: in each of I blocks, the queries of all heads that share a key head, as one matmul's rows;
    the last block is padded."""
    T, N, H = x_TNH.shape
    P = block_size(T)
    x_TNH = jnp.pad(x_TNH, ((0, -T % P), (0, 0), (0, 0)))
    x_IPKGH = x_TNH.reshape(-1, P, num_key_heads, N // num_key_heads, H)
    return x_IPKGH.transpose(0, 2, 3, 1, 4).reshape(len(x_IPKGH), num_key_heads, -1, H)


def _to_tokens(x_IKQH: Array, shape: tuple[int, ...]) -> Array:
    """Returns x [T, N, H], the inverse of `_to_blocks`."""
    T, N, H = shape
    x_IKGPH = x_IKQH.reshape(*x_IKQH.shape[:2], -1, block_size(T), H)
    return x_IKGPH.transpose(0, 3, 1, 2, 4).reshape(-1, N, H)[:T]


def _at(x_I: Array, i: Any) -> Array:
    return jax.lax.dynamic_index_in_dim(x_I, i, keepdims=False)


def _put(x_I: Array, x: Array, i: Any) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x_I, x.astype(x_I.dtype), i, 0)


def causal_attention(positions_BT: Array, softcap: float | None = None):
    """Returns the attention function of ordinary sequences, one to a row from position 0.

    Without a window no key before a block's end is hidden from it; with one, blocks read them all the same.
    """
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
