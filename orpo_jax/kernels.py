"""Attention of packed rows through kernels; it equals `attention.row_attention` except at padding, where it is finite.

Kernels that know only causal sequences get the branches of the shared rows: around attention alone, each pair's tokens
are gathered into `[trunk chosen]` and `[trunk rejected]`, and the outputs are gathered back. The others get the rows'
own mask. Every kernel, and XLA's attention too, sees one device's rows and heads.
Shapes: B rows, T tokens of a row, S pair slots, R = 2S branches, E places of a row's branches, N query heads,
K key/value heads, G = N / K, H head size.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from orpo_jax import attention
from orpo_jax.packing import Rows
from orpo_jax.sharding import BATCH_AXES, HEAD_AXES, parts

Array = jax.Array
Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any]]

log = logging.getLogger("orpo_jax")

# What 'auto' means on a platform, and what a back end that can't run gives way to.
PREFERRED = {"cpu": "xla", "gpu": "cudnn_packed", "tpu": "tokamax"}
FALLBACK = {"cudnn_packed": "cudnn", "cudnn": "xla", "cudnn_mask": "xla", "tokamax": "splash", "splash": "xla"}
PLATFORM = {"cudnn_packed": "gpu", "cudnn": "gpu", "cudnn_mask": "gpu", "tokamax": "tpu", "splash": "tpu"}

# What the backward pass of a kernel needs of the forward pass, the output and the log-sum-exp, goes by this name in
# splash and tokamax; cuDNN has no name for it, and is known by its primitive.
RESIDUALS = "attn_residuals"
SAVED_PRIMITIVES = ("dot_product_attention_fwd_wrapper",)

# Splash's tiles: the largest that divides the sequence. A sequence that no large one divides is made longer: small
# tiles would leave most of a TPU's matrix unit idle.
BLOCKS = (1024, 512, 256, 128)
LARGE_BLOCK = 512


# The choice


class Shape(NamedTuple):
    """What decides whether a kernel can run a model."""

    head_dim: int
    row_length: int
    dtype: jnp.dtype
    windows: Sequence[int | None]  # of each layer
    softcap: float | None


def choose(name: str, platform: str, *, head_dim: int, row_length: int, dtype: Any, windows: Sequence[int | None],
           softcap: float | None = None) -> str:
    """Returns the back end that runs for `model.attention`; logs one line where it is not the one asked for.

    platform: as jax.default_backend() spells it. windows: of each layer, None where it has none.
    """
    shape = Shape(head_dim, row_length, jnp.dtype(dtype), windows, softcap)
    backend = asked = PREFERRED.get(platform, "xla") if name == "auto" else name
    reasons = []
    while backend != "xla":
        reason = refusal(backend, platform, shape)
        if reason is None:
            break
        reasons.append(f"{backend}: {reason}")
        backend = FALLBACK[backend]
    if backend != asked:
        log.warning("model.attention=%s: runs as %s (%s)", name, backend, "; ".join(reasons))
    return backend


def refusal(backend: str, platform: str, shape: Shape) -> str | None:
    """Returns why a back end can't run, or None if it can."""
    if platform != PLATFORM[backend]:
        return f"needs a {PLATFORM[backend].upper()}, and this is a {platform.upper()}"
    if backend in ("cudnn_packed", "cudnn", "splash") and len(set(shape.windows)) > 1:
        return "takes one window for all layers, and this model's differ"
    if backend == "cudnn_mask" and shape.row_length % 2:
        return f"needs rows of an even length, and these have {shape.row_length}"
    if backend in ("cudnn", "cudnn_mask"):
        return _cudnn_refusal(shape, partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
    if backend == "cudnn_packed":
        if jax.__version_info__ < (0, 11):
            return f"is wrong in JAX before 0.11 where query heads share keys, and this is {jax.__version__}"
        table = jnp.zeros((1, 2), jnp.int32)
        return _cudnn_refusal(shape, lambda q, k, v: _cudnn_line(q, k, v, table, jnp.zeros((1, 3), jnp.int32), None))
    if backend == "tokamax":
        try:
            _tokamax()
        except ImportError as error:
            return f"is not installed: {error}"
    return None


def _cudnn_refusal(shape: Shape, attend: Callable[[Array, Array, Array], Array]) -> str | None:
    if shape.softcap is not None:
        return "has no soft cap of scores"
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {shape.dtype}"
    x = jax.ShapeDtypeStruct((1, 64, 1, shape.head_dim), shape.dtype)
    loss = lambda x: attend(x, x, x).sum()
    try:
        # JAX's own checks of the library, the device and the head size, forward and backward; nothing runs.
        jax.eval_shape(jax.grad(loss), x)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def row_attention_of(backend: str, rows: Rows, *, branch_length: int | None = None, expanded_length: int | None = None,
                     softcap: float | None = None, unroll: bool = False, interpret: bool = False) -> Attend:
    """Returns the attention function of some rows, as the decoder calls it: (q, k, v, window, cache).

    backend: what `choose` returned. branch_length: at least the longest branch, its trunk included; by default T.
    expanded_length: at least what the branches of a row add up to; by default 2T, which always is. Longer branches
    than these would be cut. unroll: lay XLA's attention out without loops. interpret: run the kernel's program without
    its platform, for tests.
    """
    T = rows.ids.shape[1]
    match backend:
        case "xla":
            return _xla(rows, softcap, unroll)
        case "cudnn_packed":
            return _cudnn_packed(rows, expanded_length or 2 * T, _interpreted_line if interpret else _cudnn_line)
        case "cudnn":
            return _cudnn(rows, branch_length or T, "xla" if interpret else "cudnn")
        case "cudnn_mask":
            return _cudnn_mask(rows, "xla" if interpret else "cudnn")
        case "splash":
            return _splash(rows, expanded_length or 2 * T, softcap, interpret)
        case "tokamax":
            return _tokamax_splash(rows, softcap, interpret)
    raise ValueError(f"model.attention: no such back end: {backend!r}")


def saves_residuals(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy for jax.checkpoint: kernels' residuals are kept, so that no kernel runs forward twice."""
    return primitive.name in SAVED_PRIMITIVES or params.get("name") == RESIDUALS


# Rows to branches and back


class Expansion(NamedTuple):
    """Where the tokens of rows lie in their branches, and back. An index past the end stands for none."""

    tokens_BE: Array  # the token at each place; T where there is none
    owned_BE: Array  # the same, but T at a trunk's second copy: a token's output is that of its first place
    places_BT: Array  # the place of each token, the first of two; E for padding
    copies_BT: Array  # the second place of a trunk's token; E for all others


def branch_lengths(bounds_BS4: Array) -> Array:
    """Returns the lengths [B, R] of the branches: slot s has 2s, trunk and chosen, and 2s+1, trunk and rejected."""
    trunk_BS, chosen_BS, rejected_BS, end_BS = jnp.moveaxis(bounds_BS4, -1, 0)
    return _paired(rejected_BS - trunk_BS, chosen_BS - trunk_BS + end_BS - rejected_BS)


def make_expansion(bounds_BS4: Array, starts_BR: Array, num_tokens: int, num_places: int) -> Expansion:
    """Returns the expansion of rows [B, T] into E places, given the place where each branch starts.

    starts_BR: rising or level along a row; a branch must end before the next one starts, and before E.
    """
    trunk_BS, chosen_BS, rejected_BS, end_BS = jnp.moveaxis(bounds_BS4, -1, 0)

    branch_BE = _branch_at_places(starts_BR, num_places)
    at_place = lambda x_BR: jnp.take_along_axis(x_BR, branch_BE, axis=1)
    offset_BE = jnp.arange(num_places, dtype=jnp.int32)[None] - at_place(starts_BR)
    in_trunk_BE = offset_BE < at_place(_paired(chosen_BS - trunk_BS, chosen_BS - trunk_BS))
    skipped_BE = at_place(_paired(jnp.zeros_like(trunk_BS), rejected_BS - chosen_BS))
    tokens_BE = at_place(_paired(trunk_BS, trunk_BS)) + offset_BE + jnp.where(in_trunk_BE, 0, skipped_BE)
    tokens_BE = jnp.where(offset_BE < at_place(branch_lengths(bounds_BS4)), tokens_BE, num_tokens)
    owned_BE = jnp.where(in_trunk_BE & (branch_BE % 2 == 1), num_tokens, tokens_BE)

    tokens_1T = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    inside_BTS = (trunk_BS[:, None] <= tokens_1T[..., None]) & (tokens_1T[..., None] < end_BS[:, None])
    at_token = lambda x_BS: jnp.sum(jnp.where(inside_BTS, x_BS[:, None], 0), axis=-1)
    first_BT = tokens_1T + at_token(starts_BR[:, 0::2] - trunk_BS)
    second_BT = tokens_1T + at_token(starts_BR[:, 1::2] - trunk_BS)
    in_first_BT = tokens_1T < at_token(rejected_BS)
    places_BT = jnp.where(in_first_BT, first_BT, second_BT - at_token(rejected_BS - chosen_BS))
    places_BT = jnp.where(inside_BTS.any(-1), places_BT, num_places)
    copies_BT = jnp.where(tokens_1T < at_token(chosen_BS), second_BT, num_places)
    return Expansion(tokens_BE, owned_BE, places_BT, copies_BT)


def _paired(chosen_BS: Array, rejected_BS: Array) -> Array:
    """Returns values [B, R] of the branches from those of the chosen and of the rejected ones."""
    return jnp.stack([chosen_BS, rejected_BS], axis=-1).reshape(chosen_BS.shape[0], -1)


def _branch_at_places(starts_BR: Array, num_places: int) -> Array:
    """Returns the last branch that starts at or before each place: of those that start at one, the one with tokens."""
    return jnp.sum(starts_BR[:, None] <= jnp.arange(num_places)[None, :, None], axis=-1, dtype=jnp.int32) - 1


def _take(x: Array, indices: Array) -> Array:
    """Returns x[b, indices[b, i]] as [B, I, ...], with zeros where the index is past the end."""
    return jax.vmap(lambda x, indices: x.at[indices].get(mode="fill", fill_value=0))(x, indices)


# Autodiff would make scatters of the two gathers, which are slow, and on GPUs add up in no fixed order.


@jax.custom_vjp
def expand(x_BT: Array, expansion: Expansion) -> Array:
    """Returns the branches [B, E, ...] of rows [B, T, ...], with zeros where there is no token."""
    return _take(x_BT, expansion.tokens_BE)


@jax.custom_vjp
def collapse(x_BE: Array, expansion: Expansion) -> Array:
    """Returns the rows [B, T, ...] of branches [B, E, ...]: of a trunk its first copy, and zeros for padding."""
    return _take(x_BE, expansion.places_BT)


expand.defvjp(lambda x_BT, expansion: (expand(x_BT, expansion), expansion),
              lambda expansion, g_BE: (_take(g_BE, expansion.places_BT) + _take(g_BE, expansion.copies_BT), None))
collapse.defvjp(lambda x_BE, expansion: (collapse(x_BE, expansion), expansion),
                lambda expansion, g_BT: (_take(g_BT, expansion.owned_BE), None))


# The back ends


def _xla(rows: Rows, softcap: float | None, unroll: bool) -> Attend:
    """Returns XLA's attention, under the rows' own mask."""
    def kernel(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, q_end_BT: Array,
               window: Array | int | None) -> Array:
        attend = attention.row_attention(positions_BT, q_end_BT, softcap, unroll)
        return attend(q_BTNH, k_BTKH, v_BTKH, window, None)[0]

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: Any) -> tuple[Array, Any]:
        return _on_devices(kernel, q_BTNH, k_BTKH, v_BTKH, rows.positions, rows.q_end, window), cache

    return call


def _in_line(rows: Rows, num_places: int) -> tuple[Array, Expansion]:
    """Returns the places [B, R] where branches start, end to end in their row's E places, and the expansion to them."""
    lengths_BR = branch_lengths(rows.bounds)
    starts_BR = jnp.cumsum(lengths_BR, axis=1, dtype=jnp.int32) - lengths_BR
    return starts_BR, make_expansion(rows.bounds, starts_BR, rows.ids.shape[1], num_places)


def _cudnn_line(q_BENH: Array, k_BEKH: Array, v_BEKH: Array, lengths_BR: Array, starts_BQ: Array, window: int | None
                ) -> Array:
    """Returns cuDNN's causal attention of sequences that lie in line; what is in none of them is anything.

    Q = R + 1. Lengths and starts are -1 where there is no sequence, and the last start always is.
    """
    # Not public: jax.nn.dot_product_attention takes each sequence in a batch row of its own.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    out: Any = cudnn.dot_product_attention(
        q_BENH, k_BEKH, v_BEKH, q_seqlen=lengths_BR, kv_seqlen=lengths_BR, q_offsets=starts_BQ, kv_offsets=starts_BQ,
        scale=q_BENH.shape[-1]**-0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL, sliding_window_length=window)
    return out


def _interpreted_line(q_BENH: Array, k_BEKH: Array, v_BEKH: Array, lengths_BR: Array, starts_BQ: Array,
                      window: int | None) -> Array:
    """Returns what `_cudnn_line` does, by XLA."""
    places_E = jnp.arange(q_BENH.shape[1])
    starts_BR = starts_BQ[:, :-1]
    # None where both are -1: such a sequence would end before it starts.
    inside_BER = (starts_BR[:, None] <= places_E[:, None]) & (places_E[:, None] < (starts_BR + lengths_BR)[:, None])
    mask_BEE = jnp.einsum("ber,bfr->bef", inside_BER, inside_BER)
    return jax.nn.dot_product_attention(
        q_BENH, k_BEKH, v_BEKH, mask=mask_BEE[:, None], is_causal=True,
        local_window_size=None if window is None else (window - 1, 0), implementation="xla")


def _cudnn_packed(rows: Rows, expanded_length: int, attend: Callable[..., Array]) -> Attend:
    """Returns attention by cuDNN's causal kernel, a row's branches end to end, each a sequence of its own."""
    starts_BR, expansion = _in_line(rows, expanded_length)
    lengths_BR = branch_lengths(rows.bounds)
    starts_BR, lengths_BR = (jnp.where(lengths_BR > 0, x_BR, -1) for x_BR in (starts_BR, lengths_BR))
    starts_BQ = jnp.pad(starts_BR, ((0, 0), (0, 1)), constant_values=-1)

    def kernel(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, expansion: Expansion, lengths_BR: Array, starts_BQ: Array,
               *, window: int | None) -> Array:
        in_line = (expand(x_BT, expansion) for x_BT in (q_BTNH, k_BTKH, v_BTKH))
        return collapse(attend(*in_line, lengths_BR, starts_BQ, window), expansion)

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: int | None, cache: Any) -> tuple[Array, Any]:
        return _on_devices(partial(kernel, window=window), q_BTNH, k_BTKH, v_BTKH, expansion, lengths_BR,
                           starts_BQ), cache

    return call


def _cudnn(rows: Rows, branch_length: int, implementation: str) -> Attend:
    """Returns attention by cuDNN's causal kernel, each branch a sequence of its own."""
    B, T = rows.ids.shape
    R = 2 * rows.bounds.shape[1]
    starts_BR = jnp.broadcast_to(jnp.arange(R, dtype=jnp.int32) * branch_length, (B, R))
    expansion = make_expansion(rows.bounds, starts_BR, T, R * branch_length)
    # An empty branch attends to one token of zeros, so it does not matter what a kernel does with a length of 0.
    lengths_BR = jnp.maximum(branch_lengths(rows.bounds), 1)

    def kernel(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, expansion: Expansion, lengths_BR: Array, *,
               window: int | None) -> Array:
        B = q_BTNH.shape[0]
        branches = lambda x_BT: expand(x_BT, expansion).reshape(B * R, branch_length, *x_BT.shape[2:])
        lengths = lengths_BR.reshape(B * R)
        out = jax.nn.dot_product_attention(
            branches(q_BTNH), branches(k_BTKH), branches(v_BTKH), is_causal=True, query_seq_lengths=lengths,
            key_value_seq_lengths=lengths, local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation)  # type: ignore[call-overload]
        return collapse(out.reshape(B, R * branch_length, *q_BTNH.shape[2:]), expansion)

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: int | None, cache: Any) -> tuple[Array, Any]:
        return _on_devices(partial(kernel, window=window), q_BTNH, k_BTKH, v_BTKH, expansion, lengths_BR), cache

    return call


def _cudnn_mask(rows: Rows, implementation: str) -> Attend:
    """Returns attention by cuDNN's causal kernel, under the rows' own mask as a bias of the scores."""
    T = rows.ids.shape[1]
    seen_BTT = _visible(rows, T)

    def kernel(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, mask_BTT: Array) -> Array:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask_BTT[:, None], is_causal=True,
            implementation=implementation)  # type: ignore[call-overload]

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: Any) -> tuple[Array, Any]:
        mask_BTT = seen_BTT if window is None else seen_BTT & _near(rows, window, T)
        return _on_devices(kernel, q_BTNH, k_BTKH, v_BTKH, mask_BTT), cache

    return call


def _splash(rows: Rows, expanded_length: int, softcap: float | None, interpret: bool) -> Attend:
    """Returns attention by JAX's splash kernel, a row's branches end to end, apart by segment ids."""
    T = rows.ids.shape[1]
    E = _whole_blocks(expanded_length)
    starts_BR, expansion = _in_line(rows, E)
    # Empty places see each other, so that no query sees nothing.
    segments_BE = jnp.where(expansion.tokens_BE < T, 1 + _branch_at_places(starts_BR, E), 0)
    blocks = splash_attention_kernel.BlockSizes(**dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), _block(E)))

    def kernel(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, expansion: Expansion, segments_BE: Array, *,
               window: int | None) -> Array:
        B, _, N, H = q_BTNH.shape
        K = k_BTKH.shape[2]
        heads_first = lambda x_BT: expand(x_BT, expansion).swapaxes(1, 2)
        q_BKGEH = heads_first(q_BTNH * H**-0.5).reshape(B, K, N // K, E, H)
        mask = splash_attention_mask.CausalMask((E, E)) if window is None else splash_attention_mask.LocalMask(
            (E, E), (window - 1, 0), 0)
        one_kv_head = splash_attention_kernel.make_splash_mqa_single_device(
            splash_attention_mask.MultiHeadMask([mask] * (N // K)), block_sizes=blocks, attn_logits_soft_cap=softcap,
            residual_checkpoint_name=RESIDUALS, interpret=interpret)
        one_row = jax.vmap(one_kv_head, in_axes=(0, 0, 0, None))
        segments = splash_attention_kernel.SegmentIds(segments_BE, segments_BE)
        out_BKGEH: Any = jax.vmap(one_row)(q_BKGEH, heads_first(k_BTKH), heads_first(v_BTKH), segments)
        return collapse(out_BKGEH.reshape(B, N, E, H).swapaxes(1, 2), expansion)

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: int | None, cache: Any) -> tuple[Array, Any]:
        return _on_devices(partial(kernel, window=window), q_BTNH, k_BTKH, v_BTKH, expansion, segments_BE), cache

    return call


def _tokamax() -> Any:
    """Returns tokamax's splash module; ImportError where tokamax, or what it needs, is missing."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as module,
    )
    return module


def _tokamax_splash(rows: Rows, softcap: float | None, interpret: bool) -> Attend:
    """Returns attention by tokamax's splash kernel, under the rows' own mask; it skips the blocks that nobody sees."""
    splash, T = _tokamax(), rows.ids.shape[1]
    whole_T = _whole_blocks(T)
    config = splash.SplashConfig(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), _block(whole_T)),
        attn_logits_soft_cap=softcap, residual_checkpoint_name=RESIDUALS, interpret=interpret)
    # The map of blocks is of the rows alone: made here, it is made once for all layers.
    seen_BTT = _visible(rows, whole_T)
    prepare = _sharded(jax.vmap(partial(splash.make_dynamic_splash_mha, config=config)), (P(BATCH_AXES),),
                       P(BATCH_AXES))
    unwindowed_B = prepare(seen_BTT)

    def kernel(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, row_kernels_B: Any) -> Array:
        heads_first = lambda x_BT: jnp.pad(x_BT, ((0, 0), (0, whole_T - T), (0, 0), (0, 0))).swapaxes(1, 2)
        out_BNTH = jax.vmap(lambda row_kernel, q, k, v: row_kernel(q, k, v))(
            row_kernels_B, heads_first(q_BTNH * q_BTNH.shape[-1]**-0.5), heads_first(k_BTKH), heads_first(v_BTKH))
        return out_BNTH.swapaxes(1, 2)[:, :T]

    def call(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, window: Array | int | None, cache: Any) -> tuple[Array, Any]:
        row_kernels_B = unwindowed_B if window is None else prepare(seen_BTT & _near(rows, window, whole_T))
        return _on_devices(kernel, q_BTNH, k_BTKH, v_BTKH, row_kernels_B), cache

    return call


def _visible(rows: Rows, length: int) -> Array:
    """Returns the rows' mask [B, length, length]; what lies past a row sees itself, so that no query sees nothing."""
    past_1P = jnp.arange(rows.ids.shape[1], length, dtype=jnp.int32)[None]
    past_BP = jnp.broadcast_to(past_1P, (rows.ids.shape[0], past_1P.shape[1]))
    tokens_L = jnp.arange(length)
    return attention.visible(tokens_L, tokens_L, jnp.concatenate([rows.q_end, past_BP + 1], axis=1))


def _near(rows: Rows, window: Array | int, length: int) -> Array:
    """Returns which keys lie in each query's window [B, length, length], by position."""
    positions_BL = jnp.pad(rows.positions, ((0, 0), (0, length - rows.positions.shape[1])))
    return attention.within_window(positions_BL, positions_BL, window)


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)


def _whole_blocks(length: int) -> int:
    """Returns the length that splash gets for a sequence of this one."""
    block = BLOCKS[-1] if length < LARGE_BLOCK else LARGE_BLOCK
    return -(-length // block) * block


# Devices


def _sharded(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """Returns the function as each device runs it on its own part; outside a mesh, the function."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # Pallas calls do not say over which axes their results vary, which the check would ask of them.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _on_devices(kernel: Callable, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, *of_rows: Any) -> Array:
    """Returns kernel(q, k, v, *of_rows), where each device has its own rows and heads, and all tokens of those rows.

    Along `sequence`, devices come with some tokens of all heads, and trade them for all tokens of some heads
    (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): every kernel runs as it does without.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q_BTNH, k_BTKH, v_BTKH, *of_rows)
    N, K, splits = q_BTNH.shape[2], k_BTKH.shape[2], parts(mesh.shape, HEAD_AXES)
    by_head = N % splits == 0
    assert by_head or mesh.shape["sequence"] == 1
    if by_head and K % splits:
        # Too few key/value heads to go round: as many copies of each as it takes.
        copies = math.lcm(K, splits) // K
        k_BTKH, v_BTKH = jnp.repeat(k_BTKH, copies, axis=2), jnp.repeat(v_BTKH, copies, axis=2)
    trade = partial(jax.lax.all_to_all, axis_name="sequence", tiled=True)

    def on_device(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, *of_rows: Any) -> Array:
        if mesh.shape["sequence"] == 1:
            return kernel(q_BTNH, k_BTKH, v_BTKH, *of_rows)
        whole_rows = (trade(x, split_axis=2, concat_axis=1) for x in (q_BTNH, k_BTKH, v_BTKH))
        # Kept beside the kernel's residuals, or the backward pass of each layer would trade it again.
        return checkpoint_name(trade(kernel(*whole_rows, *of_rows), split_axis=1, concat_axis=2), "attn_out")

    by_token = P(BATCH_AXES, "sequence", "tensor" if by_head else None)
    in_specs = (by_token, by_token, by_token, *jax.tree.map(lambda x: P(BATCH_AXES) if jnp.ndim(x) else P(), of_rows))
    return _sharded(on_device, in_specs, by_token)(q_BTNH, k_BTKH, v_BTKH, *of_rows)
