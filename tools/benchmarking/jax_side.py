"""The systems in JAX: the project's own step under three layouts, and TRL's layout as a port of it would have it.

The project's step is what `orpo_jax.train` runs, batches made and handed over inside the timed part. Each step is
waited for before the next one's batch is made, so the overlap that a run has is not counted in its favour.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarking.flop_count import at_full_depth, counted, row_flops
from benchmarking.pairs import Pair, load
from benchmarking.systems import Result, Settings, System, clock, peak_rss
from orpo_jax import batching, data, flops, head, loss, optim, packing, sharding, weights
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.attention import causal_attention
from orpo_jax.families import Architecture, architecture, read_config
from orpo_jax.model import remat_ladder, unrolls
from orpo_jax.program import second_logits

# How long a run the layout is made for: its row lengths are as many as pay for their compilation. Three epochs, the
# default, of UltraFeedback's 61,000 pairs, 64 to a step, are about as long.
RUN_STEPS = 3000


class Steps(NamedTuple):
    """What `clock` takes, and the compiler's count of the FLOPs per pair of the timed steps."""

    first: Callable[[], tuple[float, float]]
    step: Callable[[int], int]
    flops: Callable[[], float]


def own_step(system: System, settings: Settings, pairs: Sequence[Pair], arch: Architecture, params: weights.Params,
             mesh: jax.sharding.Mesh) -> Steps:
    """Returns the project's own train step over the pairs."""
    platform = mesh.devices.flat[0].platform
    data_config = config_lib.DataConfig(train="pairs", packing=system.packing, share_prompt=system.share_prompt)
    table = data.from_pairs([packing.Pair(*pair) for pair in pairs])
    attention = step_lib.choose_attention(system.attention, platform, arch.spec, settings.dtype, batching.ROW_UNIT)
    if system.attention not in ("auto", attention):
        raise ValueError(f"attention {system.attention!r} does not run here, and {attention!r} is not that system")
    layout = batching.make_layout(table, data_config, settings.pairs, settings.rows, 1, platform, attention=attention,
                                  position_flops=flops.position_flops(arch), num_steps=RUN_STEPS,
                                  second_logits=second_logits(arch))
    orpo = config_lib.OrpoConfig(beta=settings.beta)
    batches, micro = (batching.Batches(table, layout, size, orpo, None) for size in (settings.pairs, settings.micro))

    optimizer, schedule = make_optimizer(settings, arch)
    shardings = step_lib.state_shardings(weights.abstract_params(arch, jnp.float32, mesh), optimizer, mesh)
    model = dataclasses.replace(step_lib.make_model(
        arch, layout, jnp.dtype(settings.dtype), settings.beta, attention, unroll=unrolls(platform)),
        remat="full" if system.recompute else remat_ladder(platform)[0])
    state = step_lib.initial_state(params, optimizer, shardings)

    @functools.cache  # what the first step waits for
    def train_step() -> Any:
        make = lambda remat: step_lib.make_train_step(dataclasses.replace(model, remat=remat), optimizer, schedule,
                                                      shardings)
        example = batching.to_devices(batches.batch(0)[0], mesh)
        return step_lib.compile_to_fit(make, [model.remat], (state, example), sys.maxsize)[0]

    def take(batches: batching.Batches, i: int) -> tuple[dict[str, Any], float, int]:
        nonlocal state
        batch, info = batches.batch(i)
        state, sums, grad_norm, _ = train_step()(state, batching.to_devices(batch, mesh))
        jax.block_until_ready(state)
        return sums, float(grad_norm), info.slots

    def first() -> tuple[float, float]:
        sums, grad_norm, _ = take(micro, 0)
        return float(loss.metrics(sums, beta=settings.beta)["loss"]), grad_norm

    def count() -> float:
        timed = range(settings.warmup, settings.warmup + settings.steps)
        rows = layout.rows * np.sum([layout.num_micro(batches.plan(i)) for i in timed], axis=0)
        total = sum(count * row_flops(model, arch, length) for count, length in zip(
            rows.tolist(), layout.row_lengths, strict=True) if count)
        return total / (settings.steps * settings.pairs)

    return Steps(first, lambda i: take(batches, i)[2], count)


Attend = Callable[[jax.Array, jax.Array], Callable]


def trl_layout_loss(arch: Architecture, settings: Settings, attend_of: Attend | None = None,
                    **options: Any) -> Callable[..., jax.Array]:
    """Returns the loss of (params, (ids [2B, T], and each sequence's length and how many of its tokens are prompt)).

    attend_of(ids, lengths) gives the attention function (by default XLA's causal one); options are the decoder's.
    """
    graph, dtype = weights.make_graph(arch), jnp.dtype(settings.dtype)

    def loss_of(params: weights.Params, micro: tuple[jax.Array, ...]) -> jax.Array:
        ids_BT, lengths_B, prompts_B = micro
        half, positions_T = len(ids_BT) // 2, jnp.arange(ids_BT.shape[1])
        positions_BT = jnp.broadcast_to(positions_T, ids_BT.shape)
        module, spec = nnx.merge(graph, step_lib.cast(params, dtype)), arch.spec
        attend = (attend_of(ids_BT, lengths_B) if attend_of is not None else
                  causal_attention(positions_BT, spec.attn_softcap))
        hidden_BTD, _, _ = module(ids_BT, positions_BT, attend, **options)
        logits_BTV = head.logits(hidden_BTD, *module.unembedding(), softcap=spec.logit_softcap)
        logps_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        logps_BT = jnp.take_along_axis(logps_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
        real_BT = positions_T[1:] < lengths_B[:, None]
        response_BT = real_BT & (positions_T[1:] >= prompts_B[:, None])
        means_B = jnp.sum(logps_BT * response_BT, axis=1) / jnp.sum(response_BT, axis=1)
        nll = -jnp.sum((logps_BT * real_BT)[:half]) / jnp.sum(real_BT[:half])
        return loss.orpo_loss(means_B[:half], means_B[half:], nll, beta=settings.beta)[0]

    return loss_of


def trl_layout_step(system: System, settings: Settings, pairs: Sequence[Pair], arch: Architecture,
                    params: weights.Params, mesh: jax.sharding.Mesh) -> Steps:
    """Returns a step over micro-batches [2B, T], chosen above rejected, padded to the longest sequence of the run."""
    width = -(-max(pair.longest for pair in pairs[:settings.pairs_taken]) // 64) * 64
    loss_of = trl_layout_loss(arch, settings)
    optimizer, _ = make_optimizer(settings, arch)
    opt_state = optimizer.init(params)

    @jax.jit(donate_argnums=(0, 1))
    def train_step(params: weights.Params, opt_state: Any, micros: tuple[jax.Array, ...], count: jax.Array) -> tuple:
        def add(i: jax.Array, total: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, tuple(x[i] for x in micros)))

        total = jax.lax.fori_loop(0, count, add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)))
        value, grads = jax.tree.map(lambda x: x / count, total)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, optax.global_norm(grads)

    def take(members: Sequence[Pair]) -> tuple[float, float, int]:
        nonlocal params, opt_state
        micros = [stack_trl(members[i:i + settings.micro], width) for i in range(0, len(members), settings.micro)]
        # As many as a step has, so that one program fits: those past the count are not read.
        micros += micros[:1] * (settings.pairs // settings.micro - len(micros))
        batch = tuple(jnp.asarray(np.stack(part)) for part in zip(*micros, strict=True))
        params, opt_state, value, grad_norm = jax.block_until_ready(
            train_step(params, opt_state, batch, jnp.int32(len(members) // settings.micro)))
        return float(value), float(grad_norm), 2 * len(members) * width

    def count() -> float:
        micro = stack_trl(pairs[:settings.micro], width)  # as wide as every other
        return at_full_depth(lambda arch: counted(
            jax.value_and_grad(trl_layout_loss(arch, settings, unroll=True)), weights.abstract_params(arch), micro),
            arch) / settings.micro

    return Steps(lambda: take(pairs[:settings.micro])[:2],
                 lambda i: take(pairs[i * settings.pairs:(i + 1) * settings.pairs])[2], count)


def stack_trl(pairs: Sequence[Pair], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids [2B, T], and each sequence's length and how many of its tokens are prompt."""
    sequences = [pair.sequences[side] for side in (0, 1) for pair in pairs]
    ids = np.zeros((len(sequences), width), np.int32)
    for row, (sequence, _) in zip(ids, sequences, strict=True):
        row[:len(sequence)] = sequence
    return ids, np.array([len(sequence) for sequence, _ in sequences]), np.array([prompt for _, prompt in sequences])


def make_optimizer(settings: Settings, arch: Architecture) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns AdamW without weight decay, clipped at norm 1, at a constant learning rate."""
    config = config_lib.OptimConfig(learning_rate=settings.learning_rate, lr_scheduler_type="constant")
    return optim.make_optimizer(config, 1, arch.decay_mask()), optim.learning_rate_schedule(config, 1)


def measure(system: System, settings: Settings) -> Iterator[Result]:
    """Yields what `clock` does, in this process, on the first device; the first round has the FLOPs, if wanted."""
    device = jax.devices()[0]
    if (device.platform == "cpu") != (settings.device == "cpu"):
        raise ValueError(f"--device {settings.device}: JAX found only {device.platform} devices")
    pairs = load(pathlib.Path(settings.pairs_file))
    arch = architecture(read_config(pathlib.Path(settings.model)), max(pair.longest for pair in pairs))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), [device])
    make = trl_layout_step if system.trl_layout else own_step
    with jax.set_mesh(mesh), head.precision(jnp.dtype(settings.dtype)):
        params = weights.load_params(pathlib.Path(settings.model), arch, mesh=mesh)
        steps = make(system, settings, pairs, arch, params, mesh)
        for turn, result in enumerate(clock(settings, steps.first, steps.step, lambda: peak_memory(device))):
            if turn == 1 and settings.count_flops:
                with jax.default_device(jax.local_devices(backend="cpu")[0]):
                    result["compiler_flops"] = steps.flops()
            yield result


def peak_memory(device: Any) -> int:
    """Returns the most bytes held: by this process on CPU, on the device elsewhere."""
    return peak_rss() if device.platform == "cpu" else int((device.memory_stats() or {})["peak_bytes_in_use"])
