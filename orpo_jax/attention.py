"""The mask rule of packed rows, and attention under it.

Shapes: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head size.
"""

import jax
import jax.numpy as jnp

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
    T = positions_BT.shape[1]

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None,
             cache: None) -> tuple[Array, None]:
        blocks = []
        for start in range(0, T, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, T)
            mask_BTS = visible(jnp.arange(start, stop), jnp.arange(stop), q_end_BT[:, :stop])
            if window is not None:
                mask_BTS &= within_window(positions_BT[:, start:stop], positions_BT[:, :stop], window)
            blocks.append(attend(q_BTNH[:, start:stop], k_BTKH[:, :stop], v_BTKH[:, :stop], mask_BTS, softcap))
        return jnp.concatenate(blocks, axis=1), cache

    return call


def causal_attention(positions_BT: Array):
    """Returns the attention function of ordinary sequences, one to a row from position 0."""
    return row_attention(positions_BT, jnp.full_like(positions_BT, positions_BT.shape[1]))


def cached_attention(start: Array | int, padding_B: Array):
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
        return attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS), (k_BSKH, v_BSKH)

    return call
