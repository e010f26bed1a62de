"""The decoder, driven by a spec. It knows no family's name, no mesh, and nothing of how attention sees a row.

Modules take their weights from `param(path)`, which gives None for a weight that the family's table lacks: a bias that
is off needs no flag. Layers are one stacked module under `lax.scan`.
Shapes: B rows, T tokens, D model, N query heads, K key/value heads, H head size, F mlp, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from orpo_jax import rope as rope_lib
from orpo_jax.sharding import shard_rows

Array = jax.Array
Param = Callable[[str], nnx.Param | None]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the decoder must know beside its weights."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_mlp: int
    norm_eps: float
    activation: str
    rope: rope_lib.Rope
    # The longest sequence that the positions reach.
    max_positions: int
    # The sliding window of each layer, in tokens; None where a layer has none.
    windows: tuple[int | None, ...]

    @property
    def mixed_windows(self) -> bool:
        """Whether layers differ in their windows."""
        return len(set(self.windows)) > 1

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter of the weight tables."""
        return {"v": self.vocab_size, "d": self.d_model, "l": self.num_layers, "n": self.num_heads,
                "k": self.num_kv_heads, "h": self.head_dim, "f": self.d_mlp}


def rms_norm(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    x32 = x_BTD.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale_D * x32.astype(x_BTD.dtype)


class Linear(nnx.Module):
    """A linear map as an einsum, with a bias if the family has one."""

    def __init__(self, param: Param, path: str, einsum: str):
        self.weight = param(f"{path}/weight")
        self.bias = param(f"{path}/bias")
        self.einsum = einsum

    def __call__(self, x: Array) -> Array:
        assert self.weight is not None
        y = jnp.einsum(self.einsum, x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class Norm(nnx.Module):
    def __init__(self, param: Param, path: str, eps: float):
        self.scale = param(f"{path}/scale")
        self.eps = eps

    def __call__(self, x_BTD: Array) -> Array:
        assert self.scale is not None
        return rms_norm(x_BTD, self.scale[...], self.eps)


class Attention(nnx.Module):
    def __init__(self, param: Param, path: str):
        self.q = Linear(param, f"{path}/q", "btd,dnh->btnh")
        self.k = Linear(param, f"{path}/k", "btd,dkh->btkh")
        self.v = Linear(param, f"{path}/v", "btd,dkh->btkh")
        self.o = Linear(param, f"{path}/o", "btnh,nhd->btd")

    def __call__(self, x_BTD: Array, rotation: tuple[Array, Array], window: Array | int | None, attend: Callable,
                 cache: Any) -> tuple[Array, Any]:
        q_BTNH = rope_lib.rotate(self.q(x_BTD), *rotation)
        k_BTKH = rope_lib.rotate(self.k(x_BTD), *rotation)
        out_BTNH, cache = attend(q_BTNH, k_BTKH, self.v(x_BTD), window, cache)
        return self.o(out_BTNH), cache


class GatedMlp(nnx.Module):
    def __init__(self, param: Param, path: str, activation: str):
        self.gate = Linear(param, f"{path}/gate", "btd,df->btf")
        self.up = Linear(param, f"{path}/up", "btd,df->btf")
        self.down = Linear(param, f"{path}/down", "btf,fd->btd")
        self.activation = activation

    def __call__(self, x_BTD: Array) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD))


class Layer(nnx.Module):
    """One layer; its weights have a leading axis L until `lax.scan` takes it away."""

    def __init__(self, param: Param, path: str, spec: Spec):
        self.attn_norm = Norm(param, f"{path}/attn_norm", spec.norm_eps)
        self.attn = Attention(param, f"{path}/attn")
        self.mlp_norm = Norm(param, f"{path}/mlp_norm", spec.norm_eps)
        self.mlp = GatedMlp(param, f"{path}/mlp", spec.activation)

    def __call__(self, x_BTD: Array, rotation: tuple[Array, Array], window: Array | int | None, attend: Callable,
                 cache: Any) -> tuple[Array, Any]:
        y_BTD, cache = self.attn(self.attn_norm(x_BTD), rotation, window, attend, cache)
        x_BTD = x_BTD + y_BTD
        return shard_rows(x_BTD + self.mlp(self.mlp_norm(x_BTD))), cache


class Decoder(nnx.Module):
    def __init__(self, param: Param, spec: Spec):
        self.embed = param("embed")
        self.layers = Layer(param, "layers", spec)
        self.final_norm = Norm(param, "final_norm", spec.norm_eps)
        self.unembed = param("unembed")
        self.spec = spec

    @property
    def dtype(self) -> jnp.dtype:
        """The type of activations. The embedding and the head may be wider: their gradients add up many tokens."""
        assert self.final_norm.scale is not None
        return self.final_norm.scale[...].dtype

    def unembedding(self) -> Array:
        """Returns the head's weight [V, D]: the embedding's own where the two are tied."""
        weight = self.embed if self.unembed is None else self.unembed
        assert weight is not None
        return weight[...]

    def __call__(self, ids_BT: Array, positions_BT: Array, attend: Callable, cache: Any = None, *,
                 remat: str = "none") -> tuple[Array, Any]:
        """Returns the last hidden states [B, T, D] and the new cache.

        attend(q, k, v, window, cache) -> (out, cache) is the attention of all layers (attention.py); window is an int
        where all layers have the same one, which kernels want, and an array where they differ. cache: a pytree with a
        leading axis L, or None.
        """
        assert self.embed is not None
        x_BTD = shard_rows(self.embed[...][ids_BT].astype(self.dtype))
        rotation = rope_lib.angles(self.spec.rope, positions_BT)
        graph, weights_L = nnx.split(self.layers)
        windows_L = None
        if self.spec.mixed_windows:
            windows_L = jnp.array([window or jnp.iinfo(jnp.int32).max for window in self.spec.windows], jnp.int32)

        def layer(x_BTD: Array, scanned: Any) -> tuple[Array, Any]:
            weights, window, cache = scanned
            window = window if self.spec.mixed_windows else self.spec.windows[0]
            return nnx.merge(graph, weights)(x_BTD, rotation, window, attend, cache)

        # prevent_cse only guards against a merge that can't happen across the iterations of a scan.
        step = layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False)
        x_BTD, cache = jax.lax.scan(step, x_BTD, (weights_L, windows_L, cache))
        return self.final_norm(x_BTD), cache
