"""The train step and the batches of a config, from shapes: what `train` runs and `compile` weighs.

It reads no weights, and makes nothing on a device: a mesh of chips that are not there will do.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orpo_jax import batching, data, flops, head, optim, weights
from orpo_jax import step as step_lib
from orpo_jax.batching import Batches
from orpo_jax.config import Config, check
from orpo_jax.families import Architecture
from orpo_jax.metrics import log
from orpo_jax.model import remat_ladder, unrolls
from orpo_jax.sharding import HEAD_AXES, num_shards, own_shards, parts


@dataclasses.dataclass(frozen=True)
class Program:
    """The train step of a run, and all that it is made of."""

    config: Config
    arch: Architecture
    mesh: jax.sharding.Mesh
    batches: Batches
    total_steps: int
    params: weights.Params  # shapes, types and shardings
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shardings: step_lib.TrainState
    model: step_lib.Model

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def make_train_step(self, remat: str) -> Any:
        """Returns the jitted step (step.py)."""
        model = dataclasses.replace(self.model, remat=remat)
        return step_lib.make_train_step(model, self.optimizer, self.schedule, self.shardings)

    def remats(self) -> Sequence[str]:
        """Returns what model.remat allows, in the order in which it is tried."""
        remat = self.config.model.remat
        return remat_ladder(self.platform) if remat == "auto" else [remat]

    def abstract_state(self) -> step_lib.TrainState:
        return step_lib.abstract_state(self.params, self.optimizer, self.shardings)

    def abstract_batch(self) -> batching.StepBatch:
        batch = self.batches.shapes()
        return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch,
                            batching.batch_shardings(batch, self.mesh))

    def __str__(self) -> str:
        train, layout = self.config.train, self.batches.layout
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        step = f"{train.batch_size} pairs" if train.rows_per_step is None else f"{train.rows_per_step} rows"
        return (f"{self.config.model.path}: {size / 1e6:.1f} M parameters, {self.model.dtype}; mesh "
                f"{dict(self.mesh.shape)}; {self.total_steps} steps of {step}, in rows of "
                f"{' or '.join(map(str, layout.row_lengths))} tokens, {layout.rows} to a micro-batch; attention "
                f"{self.model.attention}")


def make_program(config: Config, arch: Architecture, mesh: jax.sharding.Mesh, pairs: data.Pairs,
                 optimizer: optax.GradientTransformation | None = None) -> Program:
    """Returns the program of a config over some pairs; ValueError for what does not fit together.

    optimizer: takes the place of `optim`, schedule included.
    """
    params = weights.abstract_params(arch, jnp.dtype(config.model.param_dtype), mesh)
    if arch.encodes:
        check_encodes(config)
    dtype = step_lib.compute_dtype(config.model.dtype, mesh.devices.flat[0].platform)
    attention = "xla" if arch.encodes else step_lib.choose_attention(
        config.model.attention, mesh.devices.flat[0].platform, arch.spec, dtype,
        batching.ROW_UNIT if config.data.row_length == "auto" else config.data.row_length)
    train = config.train
    planned_steps = train.max_steps if train.max_steps > 0 else train.num_train_epochs * len(pairs) / train.batch_size
    batches, model = lay_out(config, arch, mesh, attention, pairs, train.batch_size, planned_steps,
                             config.seed if config.data.shuffle else None, train.rows_per_step)

    total_steps = batching.total_steps(batches, config.train.num_train_epochs, config.train.max_steps)
    schedule = optim.learning_rate_schedule(config.optim, total_steps)
    if optimizer is None:
        optimizer = optim.make_optimizer(config.optim, total_steps, arch.decay_mask())
    else:  # its learning rate is its own affair
        schedule = lambda _: jnp.nan
    return Program(config, arch, mesh, batches, total_steps, params, optimizer, schedule,
                   step_lib.state_shardings(params, optimizer, mesh), model)


def lay_out(config: Config, arch: Architecture, mesh: jax.sharding.Mesh, attention: str, pairs: data.Pairs,
            batch_size: int, num_steps: float, seed: int | None = None, rows_per_step: int | None = None
            ) -> tuple[Batches, step_lib.Model]:
    """Returns the batches of some pairs, for about num_steps steps, and the model that takes them.

    attention: a back end of kernels.py.
    """
    platform = mesh.devices.flat[0].platform
    coef = router_coef(config, arch)
    pairs.tail = int(bool(coef))  # the routers' statistics have the last response token too
    layout = batching.make_layout(pairs, config.data, batch_size, config.train.rows_per_device, num_shards(mesh),
                                  platform, rows_per_step, attention, config.orpo.nll_scope,
                                  flops.position_flops(arch) * num_shards(mesh) / mesh.size, num_steps,
                                  second_logits(arch, parts(mesh.shape, HEAD_AXES)))
    return (Batches(pairs, layout, batch_size, config.orpo, seed, rows_per_step, own_shards(mesh)),
            step_lib.make_model(arch, layout, step_lib.compute_dtype(config.model.dtype, platform), config.orpo.beta,
                                attention, coef, unroll=unrolls(platform)))


def second_logits(arch: Architecture, parts_of_words: int = 1) -> batching.SecondLogits:
    """Returns what it costs to compute logits twice, on a device that makes those of a part of the words."""
    return batching.SecondLogits(
        head.most_at_once(-(-arch.spec.vocab_size // parts_of_words)),
        2 * arch.spec.vocab_size * arch.spec.d_model / flops.position_flops(arch))


def router_coef(config: Config, arch: Architecture) -> float:
    """Returns the weight of the experts' balance in the loss; ValueError where there are no experts to balance."""
    coef = config.orpo.router_aux_loss_coef
    if arch.spec.num_experts:
        return (arch.spec.router_aux_loss_coef if coef is None else coef) or 0.0
    if coef:
        raise ValueError(f"orpo.router_aux_loss_coef: must be 0 or unset for a model without experts, got {coef}")
    return 0.0


def check_encodes(config: Config) -> None:
    """Raises a ValueError for what an encoder-decoder has none of, and says what it does without."""
    check(config.model.attention in ("auto", "xla"), "model.attention",
          "must be 'auto' or 'xla' for an encoder-decoder", config.model.attention)
    check(config.train.rows_per_step is None, "train.rows_per_step", "must be None for an encoder-decoder",
          config.train.rows_per_step, "its rows hold a pair each: set train.batch_size")
    if config.data.packing:
        log.info("data.packing is off for an encoder-decoder: a row holds one pair, and its prompt is encoded once")


@dataclasses.dataclass(frozen=True)
class Compiled:
    step: Any  # the compiled train step
    remat: str
    need: int  # bytes per device
    seconds: float  # of compiling


def compile_step(program: Program, limit: int) -> Compiled:
    """Returns the train step, compiled with the first of `remats` that fits devices of `limit` bytes."""
    began = time.monotonic()
    compiled, remat, need = step_lib.compile_to_fit(program.make_train_step, program.remats(),
                                                    (program.abstract_state(), program.abstract_batch()), limit)
    return Compiled(compiled, remat, need, time.monotonic() - began)
