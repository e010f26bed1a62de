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
from jax.ad_checkpoint import checkpoint_name

from orpo_jax import kernels
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


# What of each layer is kept for the backward pass, from the fastest to the smallest; the rest is computed again. The
# residuals of an attention kernel go with its output: without them it would run again all the same.
_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names("attn_out"), kernels.saves_residuals)
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "minimal": jax.checkpoint_policies.save_from_both_policies(  # all but norms and activations
        jax.checkpoint_policies.save_only_these_names("qkv", "attn_sum", "mlp_in"), _ATTENTION),
    "attention": _ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_ladder(platform: str) -> list[str]:
    """Returns what remat='auto' tries, in this order, until a step fits.

    On CPU it starts at 'minimal', which is no slower there than 'none' and holds less: 1.64 beside 1.69 to 1.78 s for
    forward and backward of 12 layers of SmolLM2 over 768 tokens on two cores.
    """
    return [name for name in REMAT if name != "none" or platform != "cpu"]


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(einsum: str, x: Array, weight: Array) -> Any:
    """Returns einsum(x, weight).

    JAX's own gradient of the weight is the transpose of a product, with the larger operand to transpose: XLA does that
    on a CPU. This one multiplies x' by the output's gradient as it lies.
    """
    return jnp.einsum(einsum, x, weight)


def _linear_backward(einsum: str, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = residuals
    of_x, of_weight, of_y = einsum.replace("->", ",").split(",")
    return (jnp.einsum(f"{of_y},{of_weight}->{of_x}", dy, weight), jnp.einsum(f"{of_x},{of_y}->{of_weight}", x, dy))


linear.defvjp(lambda einsum, x, weight: (linear(einsum, x, weight), (x, weight)), _linear_backward)


class Linear(nnx.Module):
    """A linear map as an einsum, with a bias if the family has one."""

    def __init__(self, param: Param, path: str, einsum: str):
        self.weight = param(f"{path}/weight")
        self.bias = param(f"{path}/bias")
        self.einsum = einsum

    def __call__(self, x: Array) -> Array:
        assert self.weight is not None
        y: Array = linear(self.einsum, x, self.weight[...])
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
        q_BTNH, k_BTKH, v_BTKH = checkpoint_name(
            (rope_lib.rotate(self.q(x_BTD), *rotation), rope_lib.rotate(self.k(x_BTD), *rotation), self.v(x_BTD)),
            "qkv")
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, window, cache)
        return self.o(checkpoint_name(out_BTNH, "attn_out")), cache


class GatedMlp(nnx.Module):
    def __init__(self, param: Param, path: str, activation: str):
        self.gate = Linear(param, f"{path}/gate", "btd,df->btf")
        self.up = Linear(param, f"{path}/up", "btd,df->btf")
        self.down = Linear(param, f"{path}/down", "btf,df->btd")
        self.activation = activation

    def __call__(self, x_BTD: Array) -> Array:
        gate_BTF, up_BTF = checkpoint_name((self.gate(x_BTD), self.up(x_BTD)), "mlp_in")
        return self.down(ACTIVATIONS[self.activation](gate_BTF) * up_BTF)


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
        x_BTD = checkpoint_name(x_BTD + y_BTD, "attn_sum")
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
                 remat: str = "none", unroll: bool = False) -> tuple[Array, Any]:
        """Returns the last hidden states [B, T, D] and the new cache.

        remat: a key of REMAT. unroll: whether layers are laid out one by one, which compiles longer.

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
        step = layer if remat == "none" else jax.checkpoint(layer, prevent_cse=unroll, policy=REMAT[remat])
        x_BTD, cache = jax.lax.scan(step, x_BTD, (weights_L, windows_L, cache), unroll=unroll)
        return self.final_norm(x_BTD), cache
