"""The training run, read top to bottom:

    python -m orpo_jax.train --config configs/NAME.py [--config.section.key=value ...]

The same command again goes on from the newest checkpoint; a finished run says so and exits.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orpo_jax import api, data, flops, loss, optim, weights
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.card import model_card
from orpo_jax.checkpoint import Checkpoints, read_meta
from orpo_jax.config import Config
from orpo_jax.data import Batches
from orpo_jax.evaluate import evaluate
from orpo_jax.families import Architecture, architecture
from orpo_jax.generate import generate
from orpo_jax.metrics import CompileCounter, Meter, Metrics, Progress, check_trackers, log, set_up_logging
from orpo_jax.model import remat_ladder
from orpo_jax.pretrained import Pretrained, find_folder, open_pretrained
from orpo_jax.rundir import BASE_MODEL, open_run, start_run
from orpo_jax.sharding import make_mesh, num_shards

Rows = Iterable[Mapping[str, Any]]


def run(config: Any, *, train_rows: Rows | None = None, eval_rows: Rows | None = None,
        optimizer: optax.GradientTransformation | None = None,
        on_step: Callable[[int, dict[str, float]], bool | None] | None = None) -> dict[str, float]:
    """Trains, or goes on with, the run that `config` describes, and returns its last metrics.

    config: a Config, or the ConfigDict or mapping that makes one. train_rows and eval_rows take the place of
    data.train and data.eval; optimizer takes the place of `optim`, clipping and schedule included. on_step(step,
    metrics) is called after every step; where it returns True, the run is saved and stops. Raises ValueError for what
    a user got wrong, before anything is written.
    """
    config = config if isinstance(config, Config) else config_lib.build(config)
    set_up_logging()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(data.CACHE / "xla"))

    # The folder comes first: if it holds another run, nothing else may happen.
    folder = pathlib.Path(config.output_dir).expanduser()
    check_trackers(config.log.report_to)
    config_lib.check(config.eval.eval_strategy == "no" or eval_rows is not None or bool(config.data.eval),
                     "eval.eval_strategy", "needs data.eval", config.eval.eval_strategy)
    last_step, replace = open_run(folder, config)
    if (folder / "hf").is_dir() and last_step is not None:
        meta = read_meta(folder / "checkpoints", last_step)
        if last_step == meta["total_steps"]:
            log.info("%s is finished, at step %d; its model is in %s", folder, last_step, folder / "hf")
            return meta["metrics"]

    # A run that goes on reads its own copy: its chat template and tokens are the ones that it was trained with.
    base = folder / BASE_MODEL if last_step is not None else None
    job = prepare(config, base, train_rows, eval_rows, optimizer)
    with jax.set_mesh(job.mesh):
        # Read whole before the folder is touched, so that a broken model or checkpoint leaves no trace.
        state, record = first_state(job) if last_step is None else saved_state(job, folder, last_step)
        start_run(folder, config, job.pretrained, afresh=last_step is None, replace=replace)
        with (Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints,
              contextlib.closing(Metrics(folder, config_lib.to_dict(config), last_step)) as sinks):
            state, done = train(job, state, record, last_step or 0, checkpoints, sinks, on_step)
        if done:
            log.info("writing %s", folder / "hf")
            model = api.LoadedModel(job.pretrained, job.arch, job.model.graph, state.params, record.dtypes)
            model.save(folder / "hf", overwrite=True, card=model_card(
                record.config, record.data, record.optimizer, job.total_steps, record.metrics, record.counts))
            log.info("done: the model is in %s", folder / "hf")
    return record.metrics


@dataclasses.dataclass
class Record:
    """What a run remembers beside its arrays; saved with every checkpoint."""

    config: dict[str, Any]
    data: str  # the source of the rows
    data_hash: str
    counts: dict[str, int]  # rows read, cut, dropped and kept
    dtype: str  # of activations
    dtypes: dict[str, str]  # of each tensor in the base model's files
    optimizer: str | None  # None: given by the program
    total_steps: int
    tokens: int = 0
    parts: list[dict[str, float]] = dataclasses.field(default_factory=list)  # sums of the steps since the last line
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # the last of each


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run needs before its first step, and that no step changes."""

    config: Config
    pretrained: Pretrained
    arch: Architecture
    mesh: jax.sharding.Mesh
    batches: Batches
    eval_batches: dict[str | None, Batches]
    total_steps: int
    counts: dict[str, int]
    data: str
    data_hash: str
    params: weights.Params  # shapes, types and shardings
    optimizer: optax.GradientTransformation
    optimizer_name: str | None
    shardings: step_lib.TrainState
    model: step_lib.Model
    make_train_step: Callable[[step_lib.Model], Any]
    eval_steps: dict[str | None, Callable]


def prepare(config: Config, base: pathlib.Path | None, train_rows: Rows | None, eval_rows: Rows | None,
            optimizer: optax.GradientTransformation | None) -> Job:
    """Reads the data and the model's config, and makes the steps; ValueError for what does not fit together."""
    pretrained = (open_pretrained(str(base)) if base is not None else
                  open_pretrained(config.model.path, config.model.revision, config.data.chat_template))
    arch = architecture(pretrained.config, config.data.max_length, pretrained.rows_needed)
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    params = weights.abstract_params(arch, jnp.dtype(config.model.param_dtype), mesh)

    source = (data.from_rows(train_rows, "train_rows") if train_rows is not None else
              data.read_source(config.data.train, config.data.train_name, config.data.train_split, "data.train"))
    pairs, counts = data.load_pairs(source, pretrained, config.data)
    eval_pairs = load_eval_pairs(config, eval_rows, pretrained)
    for name, some in {"data.train": pairs, **{f"data.eval {name or ''}".strip(): p for name, p in eval_pairs.items()}
                       }.items():
        data.check_tables(some, arch.spec.vocab_size, arch.spec.max_positions, name)

    coef = config.orpo.router_aux_loss_coef
    if arch.spec.num_experts:
        coef = arch.spec.router_aux_loss_coef if coef is None else coef
    elif coef:
        raise ValueError(f"orpo.router_aux_loss_coef: must be 0 or unset for a model without experts, got {coef}")
    for some in (pairs, *eval_pairs.values()):
        some.tail = int(bool(coef))  # the routers' statistics have the last response token too

    platform = mesh.devices.flat[0].platform
    dtype = step_lib.compute_dtype(config.model.dtype, platform)
    if arch.encodes:
        check_encodes(config)
    attention = "xla" if arch.encodes else step_lib.choose_attention(
        config.model.attention, platform, arch.spec, dtype,
        data.ROW_UNIT if config.data.row_length == "auto" else config.data.row_length)

    def lay_out(pairs: data.Pairs, batch_size: int, seed: int | None, rows_per_step: int | None
                ) -> tuple[Batches, step_lib.Model]:
        layout = data.make_layout(pairs, config.data, batch_size, config.train.rows_per_device, num_shards(mesh),
                                  platform, rows_per_step, attention, config.orpo.nll_scope,
                                  flops.key_cost(arch, attention))
        return (Batches(pairs, layout, batch_size, config.orpo, seed, rows_per_step),
                step_lib.make_model(arch, layout, dtype, config.orpo.beta, attention, coef or 0.0))

    batches, model = lay_out(pairs, config.train.batch_size, config.seed if config.data.shuffle else None,
                             config.train.rows_per_step)
    held_out = {name: lay_out(some, config.eval.batch_size, None, None) for name, some in eval_pairs.items()}

    total_steps = data.total_steps(batches, config.train.num_train_epochs, config.train.max_steps)
    schedule = optim.learning_rate_schedule(config.optim, total_steps)
    name = config.optim.name
    if optimizer is None:
        optimizer = optim.make_optimizer(config.optim, total_steps, arch.decay_mask())
    else:  # its learning rate is its own affair
        name, schedule = None, lambda _: jnp.nan
    shardings = step_lib.state_shardings(params, optimizer, mesh)
    layout = batches.layout
    log.info("%s: %.1f M parameters, %s; mesh %s; %d steps of %s, in rows of %s tokens, %d to a micro-batch; "
             "attention %s",
             config.model.path, sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, dtype, dict(mesh.shape),
             total_steps, f"{config.train.rows_per_step} rows" if config.train.rows_per_step is not None else
             f"{config.train.batch_size} pairs", " or ".join(map(str, layout.row_lengths)), layout.rows, attention)
    return Job(config, pretrained, arch, mesh, batches, {name: b for name, (b, _) in held_out.items()}, total_steps,
               counts, source.name, pairs.digest(), params, optimizer, name, shardings, model,
               lambda model: step_lib.make_train_step(model, optimizer, schedule, shardings),
               {name: step_lib.make_eval_step(m, shardings) for name, (_, m) in held_out.items()})


def check_encodes(config: Config) -> None:
    """Raises a ValueError for what an encoder-decoder has none of, and says what it does without."""
    config_lib.check(config.model.attention in ("auto", "xla"), "model.attention",
                     "must be 'auto' or 'xla' for an encoder-decoder", config.model.attention)
    config_lib.check(config.train.rows_per_step is None, "train.rows_per_step",
                     "must be None for an encoder-decoder", config.train.rows_per_step,
                     "its rows hold a pair each: set train.batch_size")
    if config.data.packing:
        log.info("data.packing is off for an encoder-decoder: a row holds one pair, and its prompt is encoded once")


def load_eval_pairs(config: Config, rows: Rows | None, pretrained: Pretrained) -> dict[str | None, data.Pairs]:
    """Returns the held-out sets by name; the only one of a run that names none is None."""
    if rows is not None:
        sources = {None: data.from_rows(rows, "eval_rows")}
    else:
        named = config.data.eval if isinstance(config.data.eval, dict) else (
            {None: config.data.eval} if config.data.eval else {})
        sources = {name: data.read_source(source, config.data.eval_name, config.data.eval_split, "data.eval")
                   for name, source in named.items()}
    return {name: data.load_pairs(source, pretrained, config.data)[0] for name, source in sources.items()}


def first_state(job: Job) -> tuple[step_lib.TrainState, Record]:
    """Returns the pretrained weights with a fresh optimiser."""
    folder = find_folder(job.config.model.path, job.config.model.revision)
    params = weights.load_params(folder, job.arch, dtype=jnp.dtype(job.config.model.param_dtype), mesh=job.mesh)
    record = Record(config_lib.to_dict(job.config), job.data, job.data_hash, job.counts, str(job.model.dtype),
                    weights.tensor_dtypes(folder, job.arch), job.optimizer_name, job.total_steps)
    return step_lib.initial_state(params, job.optimizer, job.shardings), record


def saved_state(job: Job, folder: pathlib.Path, step: int) -> tuple[step_lib.TrainState, Record]:
    """Returns the state of a checkpoint; ValueError where it is broken, or the rows are not the ones it was made of."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        meta = checkpoints.read_meta(step)
        record = Record(**{**meta, "config": config_lib.to_dict(job.config)})
        if record.data_hash != job.data_hash:
            raise ValueError(f"data.train: must be the rows that {folder} was started with, and they have changed; "
                             "restore them, or choose another output_dir")
        for key, was, now in (("model.dtype", record.dtype, str(job.model.dtype)),
                              ("optimizer", record.optimizer, job.optimizer_name)):
            if was != now:
                raise ValueError(f"{key}: must be what {folder} was started with, {was or 'one of the program'}, got "
                                 f"{now or 'one of the program'}; choose another output_dir")
        log.info("going on from step %d of %d", step, job.total_steps)
        return checkpoints.restore(step, step_lib.abstract_state(job.params, job.optimizer, job.shardings)), record


def train(job: Job, state: step_lib.TrainState, record: Record, start: int, checkpoints: Checkpoints, sinks: Metrics,
          on_step: Callable | None) -> tuple[step_lib.TrainState, bool]:
    """Takes the steps after `start`, keeping `record`; returns the state, and whether those were all."""
    config, batches = job.config, job.batches
    meter = Meter(record, config.orpo.beta, sinks, job.total_steps, batches.steps_per_epoch, work_of(job))
    train_step, compiles = compile_step(job), CompileCounter()

    def save(step: int) -> None:
        meter.write_pending()
        parts = [{name: float(value) for name, value in part.items()} for part in jax.device_get(record.parts)]
        checkpoints.save(step, state, dataclasses.asdict(dataclasses.replace(record, parts=parts)))

    if start == 0 and config.eval.eval_on_start:
        evaluate_all(job, state, record, 0, sinks)

    def make(step: int) -> tuple[data.StepBatch, data.BatchInfo]:
        batch, info = batches.batch(step - 1)
        return data.to_devices(batch, job.mesh), info

    steps = range(start + 1, job.total_steps + 1)
    with (Progress("training", job.total_steps, start) as progress,
          contextlib.closing(data.ahead(make, steps)) as made):
        for step, ((batch, info), waited) in zip(steps, made, strict=True):
            with compiles:
                state, sums, grad_norm, learning_rate = train_step(state, batch)
            # The line of the step before, read only now that the device has this step to work on.
            meter.write_pending()
            meter.add(sums, info, waited)
            last = step == job.total_steps
            if step % config.log.logging_steps == 0 or last:
                meter.end_interval(step, grad_norm, learning_rate)
            if evaluates(config, step, batches.steps_per_epoch, last):
                with meter.paused():
                    evaluate_all(job, state, record, step, sinks)
            stop = on_step is not None and on_step(step, loss.metrics(
                {name: float(value) for name, value in jax.device_get(sums).items()}, beta=config.orpo.beta))
            if stop or last or step % config.checkpoint.save_steps == 0:
                save(step)
            progress.advance()
            if stop and not last:
                log.info("stopped and saved at step %d of %d", step, job.total_steps)
                return state, False
    checkpoints.wait()
    return state, True


def compile_step(job: Job) -> Callable:
    """Returns the compiled train step, with the least recomputation that fits the devices."""
    remat = job.config.model.remat
    batch = job.batches.batch(0)[0]
    batch = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch,
                         data.batch_shardings(batch, job.mesh))
    state = step_lib.abstract_state(job.params, job.optimizer, job.shardings)
    limit = step_lib.device_bytes(job.mesh.local_devices[0])
    began = time.monotonic()
    compiled, remat, need = step_lib.compile_to_fit(
        lambda remat: job.make_train_step(dataclasses.replace(job.model, remat=remat)),
        remat_ladder(job.mesh.devices.flat[0].platform) if remat == "auto" else [remat], (state, batch), limit)
    log.info("the step is compiled, in %.0f s: remat %s, %.1f GB of %.1f GB per device", time.monotonic() - began,
             remat, need / 1e9, limit / 1e9)
    if need > limit:
        log.warning("the step may not fit; a smaller train.rows_per_device or data.max_length needs less")
    return compiled


def work_of(job: Job) -> Callable[[data.BatchInfo], float] | None:
    """Returns a step's useful share of a second of all devices at their peak; None where the peak is not known."""
    peak = flops.peak_flops(job.mesh.devices.flat[0].device_kind)
    if peak is None or job.model.dtype != jnp.bfloat16:
        return None
    return lambda info: flops.step_flops(job.arch, info.branches, info.encoded) / (peak * job.mesh.size)


def evaluates(config: Config, step: int, steps_per_epoch: int, last: bool) -> bool:
    """Returns whether a step ends in an evaluation; the last one does whenever there are any."""
    every = {"no": None, "epoch": steps_per_epoch, "steps": config.eval.eval_steps or config.log.logging_steps
             }[config.eval.eval_strategy]
    return every is not None and (last or step % every == 0)


def evaluate_all(job: Job, state: step_lib.TrainState, record: Record, step: int, sinks: Metrics) -> None:
    """Writes the metrics of every held-out set, and shows a few continuations."""
    for name, batches in job.eval_batches.items():
        values = evaluate(job.eval_steps[name], state.params, batches, job.mesh, beta=job.config.orpo.beta, name=name)
        sinks.write(step, values)
        record.metrics.update({key: value for key, value in values.items() if not key.endswith("_runtime")})
        prefix = "eval_" if name is None else f"eval_{name}_"
        log.info("step %d, held-out %s: %s", step, name or "pairs", "  ".join(
            f"{key} {values[prefix + key]:.4f}" for key in ("loss", "nll_loss", "rewards/accuracies",
                                                             "rewards/margins")))
        show_samples(job, state.params, batches.pairs)


def show_samples(job: Job, params: weights.Params, pairs: data.Pairs) -> None:
    """Prints continuations of the first held-out prompts."""
    settings, tokenizer = job.config.eval.generate, job.pretrained.tokenizer
    some = [pairs[i] for i in range(min(settings.num_samples, len(pairs)))]
    if not some:
        return
    prompts = [(pair.chosen_ids[:pair.chosen_prompt] if pair.encoder_ids is None else pair.encoder_ids).tolist()
               or [job.pretrained.stop_ids[0]] for pair in some]
    replies = generate(job.model.graph, params, prompts, stop_ids=job.pretrained.stop_ids,
                       max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=job.config.seed,
                       decoder_start=job.pretrained.decoder_start)
    for prompt, reply in zip(prompts, replies, strict=True):
        log.info("sample\n  prompt: %s\n  reply:  %s", tokenizer.decode(prompt).strip(),
                 tokenizer.decode(reply, skip_special_tokens=True).strip())


def main(args: list[str]) -> None:
    run(config_lib.from_args(args))


if __name__ == "__main__":
    config_lib.main_errors(main)
