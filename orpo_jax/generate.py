"""Sampling with a key/value cache: left-padded prompts -> continuations. Knows nothing of tokenisation.

Shapes: B rows, T prompt tokens, S cache slots, K key/value heads, H head size, L layers; of encoder-decoders, E prompt
tokens, N new tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from orpo_jax import head
from orpo_jax.attention import cached_attention

Array = jax.Array


def generate(graph: nnx.GraphDef, params: Any, prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int],
             max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
             decoder_start: int | None = None) -> list[list[int]]:
    """Returns the new ids of each prompt, up to and without the first stop id. temperature 0 is greedy.

    decoder_start: what the new ids of an encoder-decoder follow; None: a decoder's follow the prompt.
    """
    longest = -(-max(map(len, prompts)) // 32) * 32  # few lengths, few compilations
    ids_BT = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(ids_BT, prompts, strict=True):
        row[slice(len(prompt)) if decoder_start is not None else slice(longest - len(prompt), None)] = prompt
    lengths_B = np.array(list(map(len, prompts)), np.int32)
    rest = (jnp.asarray(list(stop_ids), jnp.int32), temperature, jax.random.key(seed), max_new_tokens)
    if decoder_start is None:
        new = _generate(graph, params, ids_BT, longest - lengths_B, *rest)
    else:
        new = _decode(graph, params, ids_BT, lengths_B, decoder_start, *rest)
    if not new.is_fully_addressable:  # of several processes, each of which decodes all of it
        new = multihost_utils.process_allgather(new, tiled=True)
    stops = set(stop_ids)
    return [row[:next((i for i, token in enumerate(row) if token in stops), len(row))] for row in new.tolist()]


def _sample(key: Array, temperature: Array, logits_BV: Array, step: Array | int) -> Array:
    drawn_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BV / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _generate(graph: nnx.GraphDef, params: Any, ids_BT: Array, padding_B: Array, stop_ids: Array, temperature: Array,
              key: Array, max_new_tokens: int) -> Array:
    module = nnx.merge(graph, params)
    spec, (B, T) = module.spec, ids_BT.shape
    S = T + max_new_tokens
    shape = (spec.num_layers, B, S, spec.num_kv_heads, spec.head_dim)
    cache = (jnp.zeros(shape, module.dtype),) * 2

    def forward(ids_BT: Array, start: Array | int, cache: Any) -> tuple[Array, Any]:
        positions_BT = jnp.maximum(start + jnp.arange(ids_BT.shape[1]) - padding_B[:, None], 0)
        attend = cached_attention(start, padding_B, spec.attn_softcap)
        hidden_BTD, cache, _ = module(ids_BT, positions_BT, attend, cache)
        return head.logits(hidden_BTD[:, -1:], *module.unembedding(), softcap=spec.logit_softcap)[:, 0], cache

    sample = functools.partial(_sample, key, temperature)

    def go_on(carry: Any) -> Array:
        step, _, _, done_B, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def one(carry: Any) -> Any:
        step, token_B, out_BN, done_B, cache = carry
        out_BN = out_BN.at[:, step].set(jnp.where(done_B, stop_ids[0], token_B))
        done_B |= jnp.isin(token_B, stop_ids)
        logits_BV, cache = forward(token_B[:, None], T + step, cache)
        return step + 1, sample(logits_BV, step + 1), out_BN, done_B, cache

    logits_BV, cache = forward(ids_BT, 0, cache)
    out_BN = jnp.full((B, max_new_tokens), stop_ids[0], jnp.int32)
    carry = (0, sample(logits_BV, 0), out_BN, jnp.zeros(B, bool), cache)
    return jax.lax.while_loop(go_on, one, carry)[2]


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens"))
def _decode(graph: nnx.GraphDef, params: Any, encoder_ids_BE: Array, lengths_B: Array, start: Array, stop_ids: Array,
            temperature: Array, key: Array, max_new_tokens: int) -> Array:
    """Returns what an encoder-decoder says of the encoded prompts."""
    module = nnx.merge(graph, params)
    cache = module.make_cache(module.encode(encoder_ids_BE, lengths_B), max_new_tokens)
    B = len(encoder_ids_BE)

    def go_on(carry: Any) -> Array:
        step, _, _, done_B, _ = carry
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def one(carry: Any) -> Any:
        step, token_B, out_BN, done_B, cache = carry
        hidden_B1D, cache = module.decode_next(token_B, step, lengths_B, cache)
        logits_BV = head.logits(hidden_B1D, *module.unembedding())[:, 0]
        token_B = jnp.where(done_B, stop_ids[0], _sample(key, temperature, logits_BV, step))
        return step + 1, token_B, out_BN.at[:, step].set(token_B), done_B | jnp.isin(token_B, stop_ids), cache

    carry = (jnp.int32(0), jnp.full(B, start, jnp.int32), jnp.full((B, max_new_tokens), stop_ids[0], jnp.int32),
             jnp.zeros(B, bool), cache)
    return jax.lax.while_loop(go_on, one, carry)[2]
