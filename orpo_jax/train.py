"""The training run, read top to bottom:

    python -m orpo_jax.train --config configs/NAME.py [--config.section.key=value ...]

The same command again goes on from the newest checkpoint; a finished run says so and exits. SIGTERM saves and stops it,
with exit code 75. Several processes, of one host or many, train together (hosts.py).
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

import orpo_jax
from orpo_jax import api, batching, data, flops, hosts, loss, weights
from orpo_jax import config as config_lib
from orpo_jax import program as program_lib
from orpo_jax import step as step_lib
from orpo_jax.batching import Batches
from orpo_jax.card import model_card
from orpo_jax.checkpoint import Checkpoints, latest_step, read_meta
from orpo_jax.config import Config
from orpo_jax.evaluate import evaluate
from orpo_jax.families import architecture
from orpo_jax.generate import generate
from orpo_jax.metrics import CompileCounter, Meter, Metrics, Progress, check_trackers, log, set_up_logging
from orpo_jax.pretrained import Pretrained, find_folder, open_pretrained
from orpo_jax.program import Program, lay_out, make_program
from orpo_jax.rundir import BASE_MODEL, checkpoint_folder, open_run, start_run
from orpo_jax.sharding import make_mesh

Rows = Iterable[Mapping[str, Any]]


def run(config: Any, *, train_rows: Rows | None = None, eval_rows: Rows | None = None,
        optimizer: optax.GradientTransformation | None = None,
        on_step: Callable[[int, dict[str, float]], bool | None] | None = None) -> dict[str, float]:
    """Trains, or goes on with, the run that `config` describes, and returns its last metrics.

    config: a Config, or the ConfigDict or mapping that makes one. train_rows and eval_rows take the place of
    data.train and data.eval; optimizer takes the place of `optim`, clipping and schedule included. on_step(step,
    metrics) is called after every step; where it returns True, in every process, the run is saved and stops. Raises
    ValueError for what a user got wrong, before anything is written, and hosts.Preempted once a run that SIGTERM stops
    is saved.
    """
    config = config if isinstance(config, Config) else config_lib.build(config)
    set_up_logging()
    # Of several processes JAX lets only the first write there, and those of GPUs tune their kernels together.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not hosts.several():
        jax.config.update("jax_compilation_cache_dir", str(data.CACHE / "xla"))
    with hosts.Stop() as stop:
        return _run(config, train_rows, eval_rows, optimizer, on_step, stop)


def _run(config: Config, train_rows: Rows | None, eval_rows: Rows | None,
         optimizer: optax.GradientTransformation | None, on_step: Callable | None, stop: hosts.Stop
         ) -> dict[str, float]:
    # The folder comes first: if it holds another run, nothing else may happen.
    folder = pathlib.Path(config.output_dir).expanduser()
    steps = checkpoint_folder(folder, config.checkpoint.folder)
    check_trackers(config.log.report_to)
    config_lib.check(config.eval.eval_strategy == "no" or eval_rows is not None or bool(config.data.eval),
                     "eval.eval_strategy", "needs data.eval", config.eval.eval_strategy)
    hosts.agree({**config_lib.flat(config), "jax": jax.__version__, "orpo_jax": orpo_jax.__version__})
    last_step, replace, exported = hosts.told_by_first(lambda: (*open_run(folder, config), (folder / "hf").is_dir()))
    shared = "output_dir" if config.checkpoint.folder is None else "checkpoint.folder"
    if last_step is None:
        hosts.check_shared(steps, shared)
    else:
        hosts.check_all_see(lambda: latest_step(steps) == last_step, shared, steps)
    if exported and last_step is not None:
        meta = read_meta(steps, last_step)
        if last_step == meta["total_steps"]:
            log.info("%s is finished, at step %d; its model is in %s", folder, last_step, folder / "hf")
            return meta["metrics"]

    # A run that goes on reads its own copy: its chat template and tokens are the ones that it was trained with.
    base = folder / BASE_MODEL if last_step is not None and (folder / BASE_MODEL).is_dir() else None
    job = prepare(config, base, train_rows, eval_rows, optimizer)
    hosts.agree({"data.train": job.data_hash, "the program": str(job),
                 **{f"config.json of model.path, {key}": value for key, value in job.pretrained.config.items()},
                 **{f"data.eval {name or ''}": held_out.pairs.digest() for name, held_out in job.eval_batches.items()}})
    stop.check()
    with jax.set_mesh(job.mesh):
        # Read whole before the folder is touched, so that a broken model or checkpoint leaves no trace.
        state, record = first_state(job) if last_step is None else saved_state(job, steps, last_step)
        stop.check()
        start_run(folder, config, job.pretrained, afresh=last_step is None, replace=replace)
        hosts.exchange("started")  # process 0 may have deleted checkpoints, which the others must not see any more
        with (Checkpoints(steps, config.checkpoint) as checkpoints,
              contextlib.closing(Metrics(folder, config_lib.to_dict(config), last_step,
                                         not record.owes_evaluation)) as sinks):
            state, done = train(job, state, record, last_step or 0, checkpoints, sinks, on_step, stop)
        if done:
            log.info("writing %s", folder / "hf")
            model = api.LoadedModel(job.pretrained, job.arch, job.model.graph, state.params, record.dtypes)
            model.save(folder / "hf", overwrite=True, card=model_card(
                record.config, record.data, record.optimizer, job.total_steps, record.metrics, record.counts))
            log.info("done: the model is in %s", folder / "hf")
    hosts.exchange("done")  # nobody leaves, and takes the runtime along, before process 0 has written
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
    owes_evaluation: bool = False  # this step's was cut short


@dataclasses.dataclass(frozen=True)
class Job(Program):
    """Everything that a run needs before its first step, and that no step changes."""

    pretrained: Pretrained
    eval_batches: dict[str | None, Batches]
    eval_steps: dict[str | None, Callable]
    counts: dict[str, int]
    data: str
    data_hash: str
    optimizer_name: str | None  # None: given by the program


def prepare(config: Config, base: pathlib.Path | None, train_rows: Rows | None, eval_rows: Rows | None,
            optimizer: optax.GradientTransformation | None) -> Job:
    """Reads the data and the model's config, and makes the steps; ValueError for what does not fit together."""
    pretrained = (open_pretrained(str(base)) if base is not None else
                  open_pretrained(config.model.path, config.model.revision, config.data.chat_template))
    arch = architecture(pretrained.config, config.data.max_length, pretrained.rows_needed)
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    weights.abstract_params(arch, mesh=mesh)  # a mesh that does not divide the weights is an error before the data

    source = (data.from_rows(train_rows, "train_rows") if train_rows is not None else
              data.read_source(config.data.train, config.data.train_name, config.data.train_split, "data.train"))
    pairs, counts = data.load_pairs(source, pretrained, config.data)
    eval_pairs = load_eval_pairs(config, eval_rows, pretrained)
    for name, some in {"data.train": pairs, **{f"data.eval {name or ''}".strip(): p for name, p in eval_pairs.items()}
                       }.items():
        data.check_tables(some, arch.spec.vocab_size, arch.spec.max_positions, name)

    program = make_program(config, arch, mesh, pairs, optimizer)
    evaluations = sum(evaluates(config, step, program.batches.steps_per_epoch, step == program.total_steps)
                      for step in range(1, program.total_steps + 1))
    held_out = {name: lay_out(config, arch, mesh, program.model.attention, some, config.eval.batch_size,
                              max(evaluations, 1) * len(some) / config.eval.batch_size)
                for name, some in eval_pairs.items()}
    log.info("%s", program)
    return Job(**vars(program), pretrained=pretrained, eval_batches={name: b for name, (b, _) in held_out.items()},
               eval_steps={name: step_lib.make_eval_step(m, program.shardings) for name, (_, m) in held_out.items()},
               counts=counts, data=source.name, data_hash=pairs.digest(),
               optimizer_name=config.optim.name if optimizer is None else None)


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


def saved_state(job: Job, steps: epath.Path, step: int) -> tuple[step_lib.TrainState, Record]:
    """Returns the state of a checkpoint; ValueError where it is broken, or the rows are not the ones it was made of."""
    record = Record(**{**read_meta(steps, step), "config": config_lib.to_dict(job.config)})
    if record.data_hash != job.data_hash:
        raise ValueError(f"data.train: must be the rows that {steps.parent} was started with, and they have changed; "
                         "restore them, or choose another output_dir")
    for key, was, now in (("model.dtype", record.dtype, str(job.model.dtype)),
                          ("optimizer", record.optimizer, job.optimizer_name)):
        if was != now:
            raise ValueError(f"{key}: must be what {steps.parent} was started with, {was or 'one of the program'}, got "
                             f"{now or 'one of the program'}; choose another output_dir")
    log.info("going on from step %d of %d", step, job.total_steps)
    with Checkpoints(steps) as checkpoints:
        return checkpoints.restore(step, step_lib.abstract_state(job.params, job.optimizer, job.shardings)), record


def train(job: Job, state: step_lib.TrainState, record: Record, start: int, checkpoints: Checkpoints, sinks: Metrics,
          on_step: Callable | None, stop: hosts.Stop) -> tuple[step_lib.TrainState, bool]:
    """Takes the steps after `start`, keeping `record`; returns the state, and whether those were all."""
    config, batches = job.config, job.batches
    meter = Meter(record, config.orpo.beta, sinks, job.total_steps, batches.steps_per_epoch, work_of(job))
    train_step, compiles = compile_step(job), CompileCounter()
    stop.check()

    def save(step: int) -> None:
        meter.write_pending()
        parts = [{name: float(value) for name, value in part.items()} for part in jax.device_get(record.parts)]
        checkpoints.save(step, state, dataclasses.asdict(dataclasses.replace(record, parts=parts)))

    if record.owes_evaluation or (start == 0 and config.eval.eval_on_start):
        record.owes_evaluation = not evaluate_all(job, state, record, start, sinks, stop)
        stop.check()

    def make(step: int) -> tuple[batching.StepBatch, batching.BatchInfo]:
        batch, info = batches.batch(step - 1)
        return batching.to_devices(batch, job.mesh), info

    steps = range(start + 1, job.total_steps + 1)
    with (Progress("training", job.total_steps, start) as progress,
          contextlib.closing(batching.ahead(make, steps)) as made):
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
                    record.owes_evaluation = not evaluate_all(job, state, record, step, sinks, stop)
            enough = on_step is not None and on_step(step, loss.metrics(
                {name: float(value) for name, value in jax.device_get(sums).items()}, beta=config.orpo.beta))
            told = stop.asked()
            if enough or told or last or step % config.checkpoint.save_steps == 0:
                save(step)
            progress.advance()
            if told or (enough and not last):
                checkpoints.wait()
                message = f"stopped and saved at step {step} of {job.total_steps}; the same command goes on"
                if told:
                    raise hosts.Preempted(message)
                log.info(message)
                return state, False
    checkpoints.wait()
    return state, True


def compile_step(job: Job) -> Callable:
    """Returns the compiled train step, with the least recomputation that fits the devices."""
    limit = min(hosts.exchange(step_lib.device_bytes(job.mesh.local_devices[0])))  # one step for all
    compiled = program_lib.compile_step(job, limit)
    hosts.agree({"model.remat": compiled.remat})
    log.info("the step is compiled, in %.0f s: remat %s, %.1f GB of %.1f GB per device", compiled.seconds,
             compiled.remat, compiled.need / 1e9, limit / 1e9)
    if compiled.need > limit:
        log.warning("the step may not fit; a smaller train.rows_per_device or data.max_length needs less")
    return compiled.step


def work_of(job: Job) -> Callable[[batching.BatchInfo], float] | None:
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


def evaluate_all(job: Job, state: step_lib.TrainState, record: Record, step: int, sinks: Metrics,
                 stop: hosts.Stop) -> bool:
    """Writes the metrics of every held-out set, and shows a few continuations; False, and nothing, if told to stop."""
    found = {}
    for name, batches in job.eval_batches.items():
        values = evaluate(job.eval_steps[name], state.params, batches, job.mesh, beta=job.config.orpo.beta, name=name,
                          stopped=stop.asked)
        if values is None:
            return False
        found[name] = values
    for name, values in found.items():
        sinks.write(step, values)
        record.metrics.update({key: value for key, value in values.items() if not key.endswith("_runtime")})
        prefix = "eval_" if name is None else f"eval_{name}_"
        log.info("step %d, held-out %s: %s", step, name or "pairs", "  ".join(
            f"{key} {values[prefix + key]:.4f}" for key in ("loss", "nll_loss", "rewards/accuracies",
                                                             "rewards/margins")))
        show_samples(job, state.params, job.eval_batches[name].pairs)
    return True


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
    with hosts.failing_together():
        run(config_lib.from_args(hosts.join(args)))


if __name__ == "__main__":
    config_lib.main_errors(main)
