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

from orpo_jax import embedding, experts, kernels
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


# What of each layer is kept for the backward pass, from the fastest to the smallest; the rest is computed again.
# Attention keeps its own output, by name or as a kernel's residual: with a second name here it would be kept twice.
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

    On CPUs and GPUs it starts at 'minimal', which is no slower there than 'none' and holds less: 1.64 beside 1.69 to
    1.78 s for forward and backward of 12 layers of SmolLM2 over 768 tokens on two cores, 142 beside 140 pairs a second
    of Qwen2-0.5B's shape on an H200.
    """
    return [name for name in REMAT if name != "none" or platform not in ("cpu", "gpu")]


def unrolls(platform: str) -> bool:
    """Returns whether layers, and blocks of XLA's attention, are laid out one by one: on GPUs, where a loop copies all
    that it keeps of a layer, and the host decides whether it goes on.

    On an H200, 24 layers of Qwen2-0.5B's shape one by one train 140 pairs a second, and 108 in a loop; they take twice
    the time to compile.
    """
    return platform == "gpu"


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
    # The longest sequence that the positions reach.
    max_positions: int
    # The sliding window of each layer, in tokens, and its rope; None where a layer has none.
    windows: tuple[int | None, ...]
    ropes: tuple[rope_lib.Rope | None, ...]
    rope_interleaved: bool = False  # see rope.rotate
    norm: str = "rms"  # a key of NORMS
    # Whether attention and mlp read the same x; without a norm of its own, the mlp then reads attention's.
    parallel: bool = False
    # Where learned positions start in their table.
    position_offset: int = 0
    # What scores are multiplied with; None: head_dim ** -0.5.
    attn_scale: float | None = None
    # x becomes cap * tanh(x / cap), for scores and for logits.
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    # Factors of the embeddings, of what a layer adds, and of the logits.
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    # A mixture of experts: how many, how many a token uses, their size, whether the weights of those add up to one,
    # and how much the loss has of the load-balancing loss.
    num_experts: int = 0
    experts_per_token: int = 0
    d_expert: int = 0
    renormalise_experts: bool = False
    router_aux_loss_coef: float = 0.0

    @property
    def mixed_windows(self) -> bool:
        """Whether layers differ in their windows."""
        return len(set(self.windows)) > 1

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter of the weight tables."""
        return {"v": self.vocab_size, "d": self.d_model, "l": self.num_layers, "n": self.num_heads,
                "k": self.num_kv_heads, "h": self.head_dim, "f": self.d_mlp, "s": 1,
                "x": self.num_experts, "e": self.d_expert,
                "p": self.max_positions + self.position_offset}


# Whether the mean is taken off x before its size is made one, and what is added to the scale: Gemma's files hold its
# distance from one.
NORMS = {"rms": (False, 0.0), "unit_rms": (False, 1.0), "layer": (True, 0.0)}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normed(centred: bool, eps: float, x: Array, scale: Array) -> Any:
    """Returns the norm of x over as many of its last axes as the scale has, times the scale, float32.

    Its gradients' sums over products are dot products. JAX's own are a product and a sum: for 896 positions of 576
    numbers that is 2.3 ms on two CPU cores with JAX 0.10, and 0.09 ms as a dot product (with JAX 0.12 both are fast).
    GPUs and TPUs make a product and a sum of it.
    """
    return _unit(centred, eps, x, scale)[0] * scale


def _unit(centred: bool, eps: float, x: Array, scale: Array) -> tuple[Array, Array]:
    """Returns x at size one, and what it was multiplied by."""
    mean = partial(jnp.mean, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
    x = x.astype(jnp.float32)
    x = x - mean(x) if centred else x
    factor = jax.lax.rsqrt(mean(x * x) + eps)
    return x * factor, factor


def _normed_backward(centred: bool, eps: float, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, scale = residuals
    unit, factor = _unit(centred, eps, x, scale)
    outer, inner = tuple(range(x.ndim - scale.ndim)), tuple(range(x.ndim - scale.ndim, x.ndim))

    def dot(y: Any, over: tuple[int, ...], beside: tuple[int, ...]) -> Array:
        return jax.lax.dot_general(y, unit, ((over, over), (beside, beside)), precision=jax.lax.Precision.HIGHEST)

    dunit = dy * scale
    dx: Array = dunit - unit * jnp.expand_dims(dot(dunit, inner, outer) / scale.size, inner)
    if centred:
        dx -= jnp.mean(dunit, axis=inner, keepdims=True)
    return (dx * factor).astype(x.dtype), dot(dy, outer, inner)


normed.defvjp(lambda centred, eps, x, scale: (normed(centred, eps, x, scale), (x, scale)), _normed_backward)


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
    """A norm over as many of the last axes as its scale has; the identity where the family has none."""

    def __init__(self, param: Param, path: str, spec: Spec):
        self.scale = param(f"{path}/scale")
        self.bias = param(f"{path}/bias")
        self.kind, self.eps = spec.norm, spec.norm_eps

    def __call__(self, x: Array) -> Array:
        if self.scale is None:
            return x
        scale = self.scale[...].astype(jnp.float32)
        centred, offset = NORMS[self.kind]
        y: Array = normed(centred, self.eps, x, scale + offset)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, param: Param, path: str, spec: Spec):
        self.q = Linear(param, f"{path}/q", "btd,dnh->btnh")
        self.k = Linear(param, f"{path}/k", "btd,dkh->btkh")
        self.v = Linear(param, f"{path}/v", "btd,dkh->btkh")
        self.o = Linear(param, f"{path}/o", "btnh,nhd->btd")
        self.q_norm = Norm(param, f"{path}/q_norm", spec)
        self.k_norm = Norm(param, f"{path}/k_norm", spec)
        self.rope_interleaved = spec.rope_interleaved
        # Back ends scale scores by head_dim ** -0.5; what else is wanted is up to the queries.
        self.q_scale = 1.0 if spec.attn_scale is None else spec.attn_scale * spec.head_dim**0.5

    def __call__(self, x_BTD: Array, rotation: rope_lib.Rotation | None, window: Array | int | None, attend: Callable,
                 cache: Any) -> tuple[Array, Any]:
        q_BTNH, k_BTKH = self.q_norm(self.q(x_BTD)), self.k_norm(self.k(x_BTD))
        if rotation is not None:
            q_BTNH, k_BTKH = (rope_lib.rotate(x, rotation, self.rope_interleaved) for x in (q_BTNH, k_BTKH))
        if self.q_scale != 1:
            q_BTNH *= jnp.asarray(self.q_scale, q_BTNH.dtype)
        q_BTNH, k_BTKH, v_BTKH = checkpoint_name((q_BTNH, k_BTKH, self.v(x_BTD)), "qkv")
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, window, cache)
        return self.o(out_BTNH), cache


class Mlp(nnx.Module):
    """A gated mlp, or a plain one where the family has no gate."""

    def __init__(self, param: Param, path: str, spec: Spec):
        self.gate = Linear(param, f"{path}/gate", "btd,df->btf")
        self.up = Linear(param, f"{path}/up", "btd,df->btf")
        self.down = Linear(param, f"{path}/down", "btf,df->btd")
        self.activation = spec.activation

    def __call__(self, x_BTD: Array, token_weights_BT: Array | None = None) -> tuple[Array, None]:
        activate = ACTIVATIONS[self.activation]
        if self.gate.weight is None:
            return self.down(activate(checkpoint_name(self.up(x_BTD), "mlp_in"))), None
        gate_BTF, up_BTF = checkpoint_name((self.gate(x_BTD), self.up(x_BTD)), "mlp_in")
        return self.down(activate(gate_BTF) * up_BTF), None


class Experts(nnx.Module):
    """A mixture of experts, with an expert for every token where the family has one."""

    def __init__(self, param: Param, path: str, spec: Spec):
        self.router = param(f"{path}/router")
        self.gate, self.up, self.down = (param(f"{path}/{name}") for name in ("gate", "up", "down"))
        self.shared = Mlp(param, f"{path}/shared", spec)
        self.shared_gate = param(f"{path}/shared_gate")
        self.spec = spec

    def __call__(self, x_BTD: Array, token_weights_BT: Array | None = None) -> tuple[Array, experts.Routed | None]:
        """Returns the output and, given each token's weight in them, the router's statistics."""
        spec = self.spec
        assert self.router is not None and self.gate is not None and self.up is not None and self.down is not None
        router_DX = self.router[...].astype(jnp.float32)
        with jax.default_matmul_precision("float32"):
            logits_BTX = jnp.einsum("btd,dx->btx", x_BTD.astype(jnp.float32), router_DX)
        probs_BTX, weights_BTC, chosen_BTC = experts.route(logits_BTX, spec.experts_per_token, spec.renormalise_experts)
        y_BTD = experts.mix(ACTIVATIONS[spec.activation], x_BTD, weights_BTC, chosen_BTC,
                            (self.gate[...], self.up[...], self.down[...]))
        if self.shared_gate is not None:
            share_BT = jax.nn.sigmoid(jnp.einsum("btd,d->bt", x_BTD, self.shared_gate[...]))
            y_BTD += share_BT[..., None] * self.shared(x_BTD)[0]
        return y_BTD, None if token_weights_BT is None else experts.routed(probs_BTX, chosen_BTC, token_weights_BT)


class Layer(nnx.Module):
    """One layer; its weights have a leading axis L until `lax.scan` takes it away."""

    def __init__(self, param: Param, path: str, spec: Spec):
        self.attn_norm = Norm(param, f"{path}/attn_norm", spec)
        self.attn = Attention(param, f"{path}/attn", spec)
        self.attn_post_norm = Norm(param, f"{path}/attn_post_norm", spec)
        self.mlp_norm = Norm(param, f"{path}/mlp_norm", spec)
        self.mlp = (Experts if spec.num_experts else Mlp)(param, f"{path}/mlp", spec)
        self.mlp_post_norm = Norm(param, f"{path}/mlp_post_norm", spec)
        self.parallel, self.residual_scale = spec.parallel, spec.residual_scale

    def __call__(self, x_BTD: Array, rotation: rope_lib.Rotation | None, window: Array | int | None, attend: Callable,
                 cache: Any, token_weights_BT: Array | None) -> tuple[Array, Any, experts.Routed | None]:
        def scaled(y_BTD: Array) -> Array:
            return y_BTD if self.residual_scale == 1 else y_BTD * jnp.asarray(self.residual_scale, y_BTD.dtype)

        normed_BTD = self.attn_norm(x_BTD)
        y_BTD, cache = self.attn(normed_BTD, rotation, window, attend, cache)
        sum_BTD = checkpoint_name(x_BTD + scaled(self.attn_post_norm(y_BTD)), "attn_sum")
        mlp_in_BTD = self.mlp_norm(x_BTD if self.parallel else sum_BTD)
        if self.parallel and self.mlp_norm.scale is None:
            mlp_in_BTD = normed_BTD
        y_BTD, routed = self.mlp(mlp_in_BTD, token_weights_BT)
        return shard_rows(sum_BTD + scaled(self.mlp_post_norm(y_BTD))), cache, routed


class Decoder(nnx.Module):
    def __init__(self, param: Param, spec: Spec):
        self.embed = param("embed")
        self.positions = param("positions")
        self.layers = Layer(param, "layers", spec)
        self.final_norm = Norm(param, "final_norm", spec)
        self.unembed = param("unembed")
        self.unembed_bias = param("unembed_bias")
        self.spec = spec

    @property
    def dtype(self) -> jnp.dtype:
        """The type of activations. The embedding and the head may be wider: their gradients add up many tokens."""
        assert self.final_norm.scale is not None
        return self.final_norm.scale[...].dtype

    def unembedding(self) -> tuple[Array, Array | None]:
        """Returns the head's weight [V, D], the embedding's own where the two are tied, and its bias [V] or None."""
        weight = self.embed if self.unembed is None else self.unembed
        assert weight is not None
        return weight[...], None if self.unembed_bias is None else self.unembed_bias[...]

    def __call__(self, ids_BT: Array, positions_BT: Array, attend: Callable, cache: Any = None, *,
                 token_weights_BT: Array | None = None, remat: str = "none", unroll: bool = False
                 ) -> tuple[Array, Any, experts.Routed | None]:
        """Returns the last hidden states [B, T, D], scaled for the head, the new cache, and the routers' statistics.

        token_weights_BT: of each token in those; None, or a model without experts, makes none. remat: a key of REMAT.
        unroll: whether layers are laid out one by one, which compiles longer.

        attend(q, k, v, window, cache) -> (out, cache) is the attention of all layers (attention.py), and says what of
        it REMAT keeps; window is an int where all layers have the same one, which kernels want, and an array where they
        differ. cache: a pytree with a leading axis L, or None.
        """
        spec = self.spec
        assert self.embed is not None
        x_BTD = embedding.lookup(self.embed[...], ids_BT, self.dtype)
        if spec.embed_scale != 1:
            x_BTD *= jnp.asarray(spec.embed_scale, self.dtype)
        if self.positions is not None:
            x_BTD += embedding.lookup(self.positions[...], positions_BT + spec.position_offset, self.dtype, "pd")
        x_BTD = shard_rows(x_BTD)
        rotation, rotations_L = rope_lib.rotations(spec.ropes, positions_BT)
        graph, weights_L = nnx.split(self.layers)
        windows_L = None
        if spec.mixed_windows:
            windows_L = jnp.array([window or jnp.iinfo(jnp.int32).max for window in spec.windows], jnp.int32)

        def layer(x_BTD: Array, scanned: Any) -> tuple[Array, tuple[Any, Any]]:
            weights, window, which, cache = scanned
            window = window if spec.mixed_windows else spec.windows[0]
            rotated = rotation if which is None else jax.tree.map(lambda x: x[which], rotation)
            x_BTD, cache, routed = nnx.merge(graph, weights)(x_BTD, rotated, window, attend, cache, token_weights_BT)
            return x_BTD, (cache, routed)

        # prevent_cse only guards against a merge that can't happen across the iterations of a scan.
        step = layer if remat == "none" else jax.checkpoint(layer, prevent_cse=unroll, policy=REMAT[remat])
        x_BTD, (cache, routed) = jax.lax.scan(step, x_BTD, (weights_L, windows_L, rotations_L, cache), unroll=unroll)
        x_BTD = self.final_norm(x_BTD)
        if spec.logit_scale != 1:
            x_BTD *= jnp.asarray(spec.logit_scale, x_BTD.dtype)
        return x_BTD, cache, jax.tree.map(lambda x_LX: jnp.sum(x_LX, axis=0), routed)
