"""The train state, where it lives, and the jitted train and eval steps; from shapes or from arrays."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from orpo_jax import head, loss
from orpo_jax.attention import row_attention
from orpo_jax.data import Layout, StepBatch
from orpo_jax.families import Architecture, flatten
from orpo_jax.packing import Rows
from orpo_jax.sharding import batch_sharding
from orpo_jax.weights import Params, make_graph

Array = jax.Array
Sums = dict[str, Array]


class TrainState(NamedTuple):
    """All that a step changes. There is no random key: what is random is a function of (seed, step)."""

    step: Any  # int32, finished optimiser steps
    params: Any
    opt_state: Any


def compute_dtype(dtype: str, platform: str) -> jnp.dtype:
    """Returns the type of activations; 'auto' is float32 on CPU, where bfloat16 is three times slower."""
    return jnp.dtype({"auto": "float32" if platform == "cpu" else "bfloat16"}.get(dtype, dtype))


def state_shardings(params: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the sharding of every array of the state.

    What lies at a parameter's path and has as many axes, such as moments and scales of blocks, is split as the
    parameter is, along each axis that divides; the rest is everywhere.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    by_path = flatten(params)

    def like_param(key_path: tuple, leaf: Any) -> jax.sharding.NamedSharding:
        keys = [str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            param = by_path.get("/".join(keys[start:]))
            if param is not None and param.ndim == leaf.ndim:
                spec = [axis if axis and size % mesh.shape[axis] == 0 else None
                        for axis, size in zip(param.sharding.spec, leaf.shape, strict=True)]
                return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return whole

    opt_state = jax.tree_util.tree_map_with_path(like_param, jax.eval_shape(optimizer.init, params))
    return TrainState(whole, jax.tree.map(lambda param: param.sharding, params), opt_state)


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
    """The decoder as a function of its parameters and some rows."""

    graph: nnx.GraphDef
    dtype: jnp.dtype
    remat: str
    chunks: int

    def sums(self, params: Params, rows: Rows) -> Sums:
        """Returns every sum of the loss and the metrics over the rows (loss.py)."""
        # Embedding and head stay as they are, and are cast where they are used.
        cast = {name: part if name in ("embed", "unembed") else jax.tree.map(lambda x: x.astype(self.dtype), part)
                for name, part in params.items()}
        module, attend = nnx.merge(self.graph, cast), row_attention(rows.positions, rows.q_end)
        with head.precision(self.dtype):
            hidden_BTD, _ = module(rows.ids, rows.positions, attend, remat=self.remat)
            logps_BT, mean_logits_BT = head.token_logps(hidden_BTD, module.unembedding(), rows.targets,
                                                        chunks=self.chunks)
        return loss.orpo_sums(logps_BT, mean_logits_BT, rows.nll_weights, rows.segments, rows.pair_weights)


def make_model(arch: Architecture, layout: Layout, dtype: jnp.dtype, remat: str) -> Model:
    chunks = head.num_chunks(layout.rows_per_device, layout.row_length, arch.spec.vocab_size)
    return Model(make_graph(arch), dtype, remat, chunks)


def _over_micro_batches(batch: StepBatch, one: Any, shapes: Any) -> Any:
    """Returns the sum of `one(rows)` over the micro-batches; the trip count is data: one program fits all steps."""
    def add(i: Array, total: Any) -> Any:
        rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch.rows)
        return jax.tree.map(jnp.add, total, one(rows))

    return jax.lax.fori_loop(0, batch.num_micro, add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def make_train_step(model: Model, optimizer: optax.GradientTransformation, schedule: optax.Schedule, beta: float,
                    shardings: TrainState) -> Any:
    """Returns the jitted `(state, batch) -> (state, sums, grad_norm, learning_rate)`; it consumes the state.

    Gradients are summed over the micro-batches in float32, with the whole step's counts as denominators: k
    micro-batches are one big batch. grad_norm is before clipping.
    """
    mesh = shardings.step.mesh

    def train_step(state: TrainState, batch: StepBatch) -> tuple[TrainState, Sums, Array, Array]:
        def part_of_loss(params: Params, rows: Rows) -> tuple[Array, Sums]:
            sums = model.sums(params, rows)
            return loss.step_loss(sums, beta=beta, nll_weight=batch.nll_weight, pairs=batch.pairs), sums

        def gradients(rows: Rows) -> tuple[Params, Sums]:
            grads, sums = jax.grad(part_of_loss, has_aux=True)(state.params, rows)
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
            return jax.lax.with_sharding_constraint(grads, shardings.params), sums

        one_rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.rows)
        grads, sums = _over_micro_batches(batch, gradients, jax.eval_shape(gradients, one_rows))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return (TrainState(state.step + 1, params, opt_state), sums, optax.global_norm(grads),
                jnp.asarray(schedule(state.step)))

    whole = shardings.step
    return jax.jit(train_step, donate_argnums=0, in_shardings=(shardings, _batch_shardings(mesh)),
                   out_shardings=(shardings, whole, whole, whole))


def make_eval_step(model: Model, shardings: TrainState) -> Any:
    """Returns the jitted `(params, batch) -> sums` of held-out rows."""
    def eval_step(params: Params, batch: StepBatch) -> Sums:
        one_rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch.rows)
        one = lambda rows: model.sums(params, rows)
        return _over_micro_batches(batch, one, jax.eval_shape(one, one_rows))

    return jax.jit(eval_step, in_shardings=(shardings.params, _batch_shardings(shardings.step.mesh)),
                   out_shardings=shardings.step)


def _batch_shardings(mesh: jax.sharding.Mesh) -> StepBatch:
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return StepBatch(batch_sharding(mesh), whole, whole, whole)  # type: ignore[arg-type]
