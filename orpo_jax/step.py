"""The train state, where it lives, and the jitted train and eval steps; from shapes or from arrays."""

import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from orpo_jax import experts, head, kernels
from orpo_jax.batching import Group, Layout, StepBatch
from orpo_jax.families import Architecture, flatten
from orpo_jax.model import Spec
from orpo_jax.packing import Rows
from orpo_jax.sharding import names, parts, spec_entry, within
from orpo_jax.weights import Params, make_graph

Array = jax.Array
Sums = dict[str, Array]


class TrainState(NamedTuple):
    """All that a step changes. There is no random key: what is random is a function of (seed, step)."""

    step: Any  # int32, finished optimiser steps
    params: Any
    opt_state: Any


def compute_dtype(dtype: str, platform: str) -> jnp.dtype:
    """Returns the type of activations; 'auto' is float32 on CPUs.

    There bfloat16 takes three times as long on an AMD EPYC, and as long on an Intel with AMX, whose units XLA uses only
    for products that are float32.
    """
    return jnp.dtype({"auto": "float32" if platform == "cpu" else "bfloat16"}.get(dtype, dtype))


def choose_attention(name: str, platform: str, spec: Spec, dtype: Any, row_length: int) -> str:
    """Returns the back end that runs for `model.attention` and a model's spec (kernels.choose)."""
    return kernels.choose(name, platform, head_dim=spec.head_dim, dtype=dtype, row_length=row_length,
                          windows=spec.windows, softcap=spec.attn_softcap)


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the sharding of every array of the state.

    What lies at a parameter's path is split as the parameter is: moments, scales of blocks, and factors, which lack one
    of its axes. What can't lie along its own axis lies along another that divides. The rest is everywhere.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_path = flatten(params)

    def like_param(key_path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        keys = [str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            param = by_path.get("/".join(keys[start:]))
            if param is not None:
                spec = _spec_like(mesh, leaf.shape, param)
                return whole if spec is None else jax.sharding.NamedSharding(mesh, spec)
        return whole

    opt_state = jax.tree_util.tree_map_with_path(like_param, jax.eval_shape(optimizer.init, params))
    return TrainState(whole, jax.tree.map(lambda param: param.sharding, params), opt_state)


def _spec_like(mesh: jax.sharding.Mesh, shape: Sequence[int], param: jax.ShapeDtypeStruct
               ) -> jax.sharding.PartitionSpec | None:
    """Returns how to split what has all axes of a parameter, or all but one of them; None for anything else."""
    spec = [*param.sharding.spec, *[None] * (param.ndim - len(param.sharding.spec))]
    if len(shape) == param.ndim - 1:
        left = [at for at in range(param.ndim) if [*param.shape[:at], *param.shape[at + 1:]] == [*shape]]
        if not left:
            return None
        del spec[left[0]]
    if len(shape) != len(spec):
        return None
    placed = [list(within(mesh.shape, names(entry), size)) for entry, size in zip(spec, shape, strict=True)]
    for axis in (axis for entry in param.sharding.spec for axis in names(entry)):
        room = [(size // parts(mesh.shape, axes), axes) for size, axes in zip(shape, placed, strict=True)
                if size % parts(mesh.shape, [*axes, axis]) == 0]
        if room and not any(axis in axes for axes in placed):
            max(room, key=lambda size_and_axes: size_and_axes[0])[1].append(axis)
    return jax.sharding.PartitionSpec(*map(spec_entry, placed))


def abstract_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns shapes, types and shardings of the state, to restore a checkpoint into or to compile for."""
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state,
                        shardings)


def initial_state(params: Params, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the state before the first step; the optimiser's part is born sharded."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)


@dataclasses.dataclass(frozen=True)
class Model:
    """The model as a function of its parameters and some rows."""

    graph: nnx.GraphDef
    dtype: jnp.dtype
    layout: Layout
    head_settings: head.Settings
    attention: str = "xla"  # a back end of kernels.py
    router_aux_loss_coef: float = 0.0
    remat: str = "none"
    unroll: bool = False  # see model.unrolls

    @property
    def balances(self) -> bool:
        """Whether the loss has a part for the balance of experts."""
        return self.router_aux_loss_coef > 0

    def loss(self, params: Params, rows: Rows, counts: head.Counts, expert_counts_X: Array | None = None
             ) -> tuple[Array, Sums]:
        """Returns the rows' part of the step's loss, and every sum of its metrics (loss.py).

        expert_counts_X: how often the whole step uses each expert; None or zeros where these rows are the whole step.
        """
        hidden_BTD, module, routed = self.hidden(params, rows)
        settings = self.head_settings._replace(scored=self.layout.room(rows.ids.shape[1]).scored)
        with head.precision(self.dtype):
            result: Any = head.orpo(settings, hidden_BTD, *module.unembedding(), rows, counts)
        part, sums = result
        if routed is not None:
            counts_X = routed.counts
            if expert_counts_X is not None:
                counts_X = jnp.where(jnp.any(expert_counts_X > 0), expert_counts_X, counts_X)
            aux = experts.balance_loss(routed, counts_X, counts.inputs * module.spec.num_layers)
            part += self.router_aux_loss_coef * aux
            sums |= {"aux_loss": aux, "weighted_aux_loss": self.router_aux_loss_coef * aux,
                     "steps": jnp.sum(branches_of(rows)) / counts.inputs}
        return part, sums

    def hidden(self, params: Params, rows: Rows) -> tuple[Array, Any, experts.Routed | None]:
        """Returns the last hidden states, the module as it was run, and its routers' statistics."""
        module = nnx.merge(self.graph, cast(params, self.dtype))
        if rows.encoder_ids is not None:
            with head.precision(self.dtype):
                return module(rows.encoder_ids, rows.encoder_lengths, rows.ids, rows.positions, rows.q_end,
                              remat=self.remat, unroll=self.unroll), module, None
        room = self.layout.room(rows.ids.shape[1])
        token_weights_BT = branches_of(rows) if self.balances else None
        attend = kernels.row_attention_of(self.attention, rows, branch_length=self.layout.branch_length,
                                          expanded_length=room.expanded, softcap=module.spec.attn_softcap,
                                          unroll=self.unroll)
        with head.precision(self.dtype):
            hidden_BTD, _, routed = module(rows.ids, rows.positions, attend, token_weights_BT=token_weights_BT,
                                           remat=self.remat, unroll=self.unroll)
        return hidden_BTD, module, routed


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Returns the parameters in the type of activations.

    Embeddings, head, routers and biases of distances are cast where they are used.
    """
    def leaf(key_path: tuple, x: Array) -> Array:
        return x if key_path and key_path[-1].key == "router" else x.astype(dtype)

    return {name: jax.tree_util.tree_map_with_path(leaf, part) if name.endswith(("layers", "norm")) else part
            for name, part in params.items()}


def by_layer(params: Any) -> Any:
    """Returns the parameters with a list of layers in place of stacked ones."""
    def layers(part: Any) -> list[Any]:
        return [jax.tree.map(lambda x_L, i=i: x_L[i], part) for i in range(len(jax.tree.leaves(part)[0]))]

    return {name: layers(part) if name.endswith("layers") else part for name, part in params.items()}


def stacked(params: Any) -> Any:
    """Returns what `by_layer` was given."""
    stack = lambda layers: jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return {name: stack(part) if isinstance(part, list) else part for name, part in params.items()}


def branches_of(rows: Rows) -> Array:
    """Returns of how many sequences each position is a token, float32 [B, T]: 2 in a shared trunk, 0 in padding."""
    at_T1 = jnp.arange(rows.ids.shape[1])[:, None]
    start_B1S, chosen_B1S, _, end_B1S = jnp.moveaxis(rows.bounds[:, None], -1, 0)
    inside_BTS, trunk_BTS = ((start_B1S <= at_T1) & (at_T1 < stop_B1S) for stop_B1S in (end_B1S, chosen_B1S))
    return jnp.sum(inside_BTS.astype(jnp.float32) + trunk_BTS, axis=-1)


def make_model(arch: Architecture, layout: Layout, dtype: jnp.dtype, beta: float, attention: str = "xla",
               router_aux_loss_coef: float = 0.0, unroll: bool = False) -> Model:
    return Model(make_graph(arch), dtype, layout, head.Settings(beta, softcap=arch.spec.logit_softcap), attention,
                 router_aux_loss_coef, unroll=unroll)


def _over_micro_batches(batch: StepBatch, one: Callable[[Rows], Any]) -> Any:
    """Returns the sum of `one(rows)` over the micro-batches; trip counts are data: one program fits all steps."""
    def rows_of(group: Group, i: Any) -> Rows:
        # Where a group has one micro-batch at most, its rows do not depend on i: without the barrier XLA would move the
        # whole pass out of the loop, and take it in every step.
        rows, i = jax.lax.optimization_barrier((group.rows, i))
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows)

    shapes = jax.eval_shape(lambda: one(rows_of(batch.groups[0], 0)))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    for group in batch.groups:
        add = lambda i, total, group=group: jax.tree.map(jnp.add, total, one(rows_of(group, i)))
        total = jax.lax.fori_loop(0, group.num_micro, add, total)
    return total


def _step_sums(model: Model, params: Params, batch: StepBatch, one: Callable[[Rows, Array | None], Any]) -> Any:
    """Returns the sum of one(rows, expert_counts) over the micro-batches.

    The balance of experts is a product of two sums over the step, one of which has no gradient: where there are several
    micro-batches, a first pass counts how often each expert is used.
    """
    if not model.balances:
        return _over_micro_batches(batch, lambda rows: one(rows, None))

    def counts_of(rows: Rows) -> Array:
        routed = model.hidden(params, rows)[2]
        assert routed is not None
        return routed.counts

    several = sum(group.num_micro for group in batch.groups) > 1
    first_pass = batch._replace(groups=tuple(
        group._replace(num_micro=jnp.where(several, group.num_micro, 0)) for group in batch.groups))
    total_X = _over_micro_batches(first_pass, counts_of)
    return _over_micro_batches(batch, lambda rows: one(rows, total_X))


def make_train_step(model: Model, optimizer: optax.GradientTransformation, schedule: optax.Schedule,
                    shardings: TrainState) -> Any:
    """Returns the jitted `(state, batch) -> (state, sums, grad_norm, learning_rate)`; it consumes the state.

    Gradients are summed over the micro-batches in float32, with the whole step's counts as denominators: k
    micro-batches are one big batch. grad_norm is before clipping.
    """
    # Layers that are laid out one by one have their gradients summed so too, and stacked once a step. Stacked in every
    # micro-batch, those of Llama-1B's mlps were 30 ms of a step's 855 in a profile on an H200, at half the speed of its
    # memory.
    split, join = (by_layer, stacked) if model.unroll else (lambda params: params,) * 2

    def train_step(state: TrainState, batch: StepBatch) -> tuple[TrainState, Sums, Array, Array]:
        def gradients(rows: Rows, expert_counts_X: Array | None) -> tuple[Params, Sums]:
            loss = lambda params: model.loss(join(cast(params, model.dtype)), rows, batch.counts, expert_counts_X)
            grads, sums = jax.grad(loss, has_aux=True)(split(state.params))
            return constrained(jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)), sums

        def constrained(grads: Params) -> Params:
            return split(jax.lax.with_sharding_constraint(join(grads), shardings.params))

        grads, sums = _step_sums(model, state.params, batch, gradients)
        grads = join(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return (TrainState(state.step + 1, params, opt_state), sums, optax.global_norm(grads),
                jnp.asarray(schedule(state.step)))

    whole = shardings.step
    return jax.jit(train_step, donate_argnums=0, in_shardings=(shardings, None),
                   out_shardings=(shardings, whole, whole, whole))


def make_eval_step(model: Model, shardings: TrainState) -> Any:
    """Returns the jitted `(params, batch) -> sums` of held-out rows."""
    def eval_step(params: Params, batch: StepBatch) -> Sums:
        return _step_sums(model, params, batch, lambda rows, expert_counts_X: model.loss(
            params, rows, batch.counts, expert_counts_X)[1])

    return jax.jit(eval_step, in_shardings=(shardings.params, None), out_shardings=shardings.step)


def bytes_needed(compiled: Any) -> int:
    """Returns the bytes per device of a compiled step: what it is given, makes, and holds meanwhile."""
    memory = compiled.memory_analysis()
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if device.platform == "tpu" and memory.peak_memory_in_bytes:
        # By this libtpu refuses a program (tests/test_compile.py). Its temp_size also counts what lies where something
        # else lay before: with it, 17.3 GB of a step that it takes for a chip of 16.9.
        return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes)


def device_bytes(device: Any) -> int:
    """Returns the memory that a device may use; CPU devices share the machine's."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(
        jax.local_devices())


def release_freed_memory() -> None:
    """Gives the system back what this process has freed: glibc keeps it, and on a CPU a step could use it.

    After compiling twelve row lengths of SmolLM2-135M's step, the process holds 1.0 GiB in place of 2.5.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def compile_to_fit(make: Callable[[str], Any], remats: Sequence[str], args: Sequence[Any],
                   limit: int) -> tuple[Any, str, int]:
    """Returns the first step of make(remat) that fits, compiled for shapes `args`, its remat, and its bytes.

    ValueError where the compiler finds no room even for the last one.
    """
    refused = None
    for remat in remats:
        try:
            compiled = make(remat).lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refused = error
            continue
        finally:
            release_freed_memory()
        if bytes_needed(compiled) <= limit or remat == remats[-1]:
            return compiled, remat, bytes_needed(compiled)
    raise ValueError(f"model.remat: must leave room for the step on a device of {limit / 1e9:.1f} GB, got "
                     f"{remats[-1]!r}; choose a smaller train.rows_per_device or data.max_length, or more devices for "
                     "mesh.fsdp") from refused
