"""The encoder-decoder of T5: a prompt is encoded once, and every position of its row's responses reads the result.

What differs from the decoder of model.py: scores are not scaled, and instead of ropes each stack has one table of
biases by distance, which all of its layers add to their scores. Attention is XLA's.
Shapes: B rows, T tokens of the decoder, S tokens of the encoder, K keys of either, D model, N heads, H head size,
F mlp, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from orpo_jax import embedding
from orpo_jax.attention import visible
from orpo_jax.model import REMAT, Linear, Mlp, Norm, Param, Spec
from orpo_jax.sharding import shard_rows

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderSpec(Spec):
    """num_layers are the encoder's."""

    num_decoder_layers: int
    num_buckets: int  # of distances, each with a bias for each head
    max_distance: int  # from here on, all distances share a bucket

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"m": self.num_decoder_layers, "b": self.num_buckets}


def bucket(distance: Array, num_buckets: int, max_distance: int, both_ways: bool) -> Array:
    """Returns the bucket of each distance from query to key, in tokens, negative where the key comes first.

    The first half of the buckets hold one distance each, the others ever more of them, evenly by their logarithm up to
    max_distance. both_ways: keys that come later have buckets of their own, half of all; else they share 0.
    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """
    first = jnp.zeros_like(distance)
    if both_ways:
        num_buckets //= 2
        first = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    share = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (share * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return first + jnp.where(distance < exact, distance, far)


def masked(bias_BNTK: Array, mask_BTK: Array) -> Array:
    """Returns what is added to scores: the bias, and next to minus infinity for keys that are not seen."""
    return jnp.where(mask_BTK[:, None], bias_BNTK, jnp.finfo(jnp.float32).min)


KeysValues = tuple[Array, Array]  # [B, K, N, H] each


class Cache(NamedTuple):
    """What the decoder's layers attend to while it generates, with a leading axis L."""

    own: KeysValues  # of the tokens so far, and room for the others
    crossed: KeysValues  # of the encoder's output


class Attention(nnx.Module):
    """Attention of some positions to others, or to themselves."""

    def __init__(self, param: Param, path: str):
        self.q = Linear(param, f"{path}/q", "btd,dnh->btnh")
        self.k = Linear(param, f"{path}/k", "btd,dnh->btnh")
        self.v = Linear(param, f"{path}/v", "btd,dnh->btnh")
        self.o = Linear(param, f"{path}/o", "btnh,nhd->btd")

    def keys(self, source_BKD: Array) -> KeysValues:
        return checkpoint_name((self.k(source_BKD), self.v(source_BKD)), "qkv")

    def __call__(self, x_BTD: Array, keys_values: KeysValues, bias_BNTK: Array) -> Array:
        q_BTNH, (k_BKNH, v_BKNH) = checkpoint_name(self.q(x_BTD), "qkv"), keys_values
        scores_BNTK = jnp.einsum("btnh,bknh->bntk", q_BTNH, k_BKNH, preferred_element_type=jnp.float32) + bias_BNTK
        probs_BNTK = jax.nn.softmax(scores_BNTK, axis=-1).astype(v_BKNH.dtype)
        return self.o(checkpoint_name(jnp.einsum("bntk,bknh->btnh", probs_BNTK, v_BKNH), "attn_out"))


class Layer(nnx.Module):
    """One layer of the encoder or, with attention to the encoder's output, of the decoder."""

    def __init__(self, param: Param, path: str, spec: Spec, crosses: bool):
        self.attn_norm, self.attn = Norm(param, f"{path}/attn_norm", spec), Attention(param, f"{path}/attn")
        self.cross_norm = Norm(param, f"{path}/cross_norm", spec)
        self.cross = Attention(param, f"{path}/cross") if crosses else None
        self.mlp_norm, self.mlp = Norm(param, f"{path}/mlp_norm", spec), Mlp(param, f"{path}/mlp", spec)

    def __call__(self, x_BTD: Array, bias_BNTK: Array, source_BSD: Array | None = None,
                 cross_bias_BNTS: Array | None = None, cache: Cache | None = None, start: Array | int = 0
                 ) -> tuple[Array, Cache | None]:
        """Returns the output, and the cache with what x adds to it from `start` on, where one is given."""
        normed_BTD = self.attn_norm(x_BTD)
        own = self.attn.keys(normed_BTD)
        if cache is not None:
            own = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, 1), cache.own, own)
            cache = cache._replace(own=own)
        x_BTD = checkpoint_name(x_BTD + self.attn(normed_BTD, own, bias_BNTK), "attn_sum")
        if self.cross is not None:
            assert cross_bias_BNTS is not None
            if cache is None:
                assert source_BSD is not None
                crossed = self.cross.keys(source_BSD)
            else:
                crossed = cache.crossed
            x_BTD = checkpoint_name(x_BTD + self.cross(self.cross_norm(x_BTD), crossed, cross_bias_BNTS), "attn_sum")
        return shard_rows(x_BTD + self.mlp(self.mlp_norm(x_BTD))[0]), cache


class EncoderDecoder(nnx.Module):
    def __init__(self, param: Param, spec: EncoderDecoderSpec):
        self.embed = param("embed")
        self.encoder_layers = Layer(param, "encoder_layers", spec, crosses=False)
        self.encoder_distance_bias = param("encoder_distance_bias")
        self.encoder_norm = Norm(param, "encoder_norm", spec)
        self.decoder_layers = Layer(param, "decoder_layers", spec, crosses=True)
        self.decoder_distance_bias = param("decoder_distance_bias")
        self.decoder_norm = Norm(param, "decoder_norm", spec)
        self.unembed = param("unembed")
        self.spec = spec

    @property
    def dtype(self) -> jnp.dtype:
        """The type of activations."""
        assert self.decoder_norm.scale is not None
        return self.decoder_norm.scale[...].dtype

    def unembedding(self) -> tuple[Array, None]:
        """Returns the head's weight [V, D], the embedding's own where the two are tied, and no bias."""
        weight = self.embed if self.unembed is None else self.unembed
        assert weight is not None
        return weight[...], None

    def __call__(self, encoder_ids_BS: Array, encoder_lengths_B: Array, ids_BT: Array, positions_BT: Array,
                 q_end_BT: Array, *, remat: str = "none", unroll: bool = False) -> Array:
        """Returns the decoder's last hidden states [B, T, D], scaled for the head.

        Tokens of the encoder from a row's length on are padding. q_end_BT: see packing.py. remat, unroll: see model.py.
        """
        source_BSD = self.encode(encoder_ids_BS, encoder_lengths_B, remat=remat, unroll=unroll)
        return self.decode(source_BSD, encoder_lengths_B, ids_BT, positions_BT, q_end_BT, remat=remat, unroll=unroll)

    def encode(self, ids_BS: Array, lengths_B: Array, *, remat: str = "none", unroll: bool = False) -> Array:
        """Returns the encoder's output [B, S, D]."""
        positions_S = jnp.arange(ids_BS.shape[1])
        bias_BNSS = masked(self._distance_bias(self.encoder_distance_bias, positions_S[None], positions_S[None],
                                               both_ways=True), _real(ids_BS.shape[1], lengths_B))
        run = lambda layer, x_BSD, _: layer(x_BSD, bias_BNSS)
        return self.encoder_norm(_scan(self.encoder_layers, run, self._embedded(ids_BS), None, remat, unroll)[0])

    def decode(self, source_BSD: Array, lengths_B: Array, ids_BT: Array, positions_BT: Array, q_end_BT: Array, *,
               remat: str = "none", unroll: bool = False) -> Array:
        """Returns the decoder's last hidden states [B, T, D], scaled for the head."""
        index_T = jnp.arange(ids_BT.shape[1])
        bias_BNTT = masked(self._distance_bias(self.decoder_distance_bias, positions_BT, positions_BT, both_ways=False),
                           visible(index_T, index_T, q_end_BT))
        cross_bias_BNTS = masked(jnp.zeros((1, 1, 1, 1)), _real(source_BSD.shape[1], lengths_B))
        run = lambda layer, x_BTD, _: layer(x_BTD, bias_BNTT, source_BSD, cross_bias_BNTS)
        return self._scaled(_scan(self.decoder_layers, run, self._embedded(ids_BT), None, remat, unroll)[0])

    def make_cache(self, source_BSD: Array, length: int) -> Cache:
        """Returns the cache of a decoder that is to generate up to `length` tokens and has read none."""
        cross = self.decoder_layers.cross
        assert cross is not None
        graph, weights_L = nnx.split(cross)
        crossed = jax.lax.map(lambda weights: nnx.merge(graph, weights).keys(source_BSD), weights_L)
        room = lambda x_LBSNH: jnp.zeros((*x_LBSNH.shape[:2], length, *x_LBSNH.shape[3:]), x_LBSNH.dtype)
        return Cache(jax.tree.map(room, crossed), crossed)

    def decode_next(self, ids_B: Array, step: Array, lengths_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """Returns the last hidden states [B, 1, D] of the token that comes after `step` others, and the new cache."""
        index_K, index_1 = jnp.arange(cache.own[0].shape[2]), step[None]
        bias_BN1K = masked(self._distance_bias(self.decoder_distance_bias, index_1[None], index_K[None],
                                               both_ways=False), (index_K <= step)[None, None])
        cross_bias_BN1S = masked(jnp.zeros((1, 1, 1, 1)), _real(cache.crossed[0].shape[2], lengths_B))
        run = lambda layer, x_B1D, cache: layer(x_B1D, bias_BN1K, None, cross_bias_BN1S, cache, step)
        x_B1D, cache = _scan(self.decoder_layers, run, self._embedded(ids_B[:, None]), cache)
        return self._scaled(x_B1D), cache

    def _scaled(self, x_BTD: Array) -> Array:
        x_BTD = self.decoder_norm(x_BTD)
        return x_BTD if self.spec.logit_scale == 1 else x_BTD * jnp.asarray(self.spec.logit_scale, x_BTD.dtype)

    def _embedded(self, ids_BT: Array) -> Array:
        assert self.embed is not None
        return shard_rows(embedding.lookup(self.embed[...], ids_BT, self.dtype))

    def _distance_bias(self, table: nnx.Param | None, queries_BT: Array, keys_BK: Array, both_ways: bool) -> Array:
        """Returns the float32 bias of each head, query and key [B, N, T, K], from their positions."""
        assert table is not None
        distance_BTK = keys_BK[:, None, :] - queries_BT[:, :, None]
        bucket_BTK = bucket(distance_BTK, self.spec.num_buckets, self.spec.max_distance, both_ways)
        return jnp.moveaxis(table[...].astype(jnp.float32)[bucket_BTK], -1, 1)


def _real(length: int, lengths_B: Array) -> Array:
    """Returns which tokens of the encoder are no padding, for any query, [B, 1, S]."""
    return (jnp.arange(length) < lengths_B[:, None])[:, None]


def _scan(layers: Layer, run: Callable[[Layer, Array, Any], tuple[Array, Any]], x_BTD: Array, cache: Any,
          remat: str = "none", unroll: bool = False) -> tuple[Array, Any]:
    """Returns x after all layers of a stack, and their cache."""
    graph, weights_L = nnx.split(layers)

    def step(x_BTD: Array, scanned: Any) -> tuple[Array, Any]:
        weights, cache = scanned
        return run(nnx.merge(graph, weights), x_BTD, cache)

    # As in model.py.
    step = step if remat == "none" else jax.checkpoint(step, prevent_cse=unroll, policy=REMAT[remat])
    return jax.lax.scan(step, x_BTD, (weights_L, cache), unroll=unroll)
