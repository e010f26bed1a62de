"""Where numbers go: metrics.jsonl, trackers, and progress on a terminal or in a log file."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from orpo_jax import loss

log = logging.getLogger("orpo_jax")


def set_up_logging() -> None:
    """Shows the project's own messages, process 0's only; other libraries keep their own level."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)


class Progress:
    """Counts work done: a bar on a terminal, else a line at the start of long work and every ten seconds."""

    def __init__(self, what: str, total: int, start: int = 0):
        self.what, self.total, self.count = what, total, start
        self.began = self.last = time.monotonic()
        self.start = start
        quiet = jax.process_index() != 0
        self.bar = tqdm(total=total, initial=start, desc=what, disable=quiet, leave=False, dynamic_ncols=True) if (
            sys.stderr.isatty()) else None
        self.quiet = quiet

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, count: int = 1) -> None:
        self.count += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(count)
        elif now - self.last > 10 and not self.quiet:
            self.last = now
            left = (now - self.began) / (self.count - self.start) * (self.total - self.count)
            log.info("%s: %d of %d, %.0f s left", self.what, self.count, self.total, left)


class JsonlSink:
    """One JSON object a line. Opening it at a step drops the lines past that step: a resumed run writes them again."""

    def __init__(self, path: pathlib.Path, step: int, evaluated: bool):
        """evaluated: whether that step's held-out lines are to be kept too."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < step or (
                _step_of(line) == step and (evaluated or '"eval_' not in line))]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.rename(path)
        self.file = path.open("a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {key: None if isinstance(value, float) and not np.isfinite(value) else value
                  for key, value in values.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a crash


def check_trackers(names: Iterable[str]) -> None:
    """Raises a ValueError for a tracker whose package is missing, before a run writes anything."""
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if name in names and importlib.util.find_spec(package) is None:
            raise ValueError(f"log.report_to: {name} needs {package}; pip install {package}")


class TensorboardSink:
    def __init__(self, folder: pathlib.Path, step: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
        import wandb  # type: ignore[import-not-found]

        id_file = folder / "wandb_id"
        run_id = id_file.read_text() if id_file.exists() else None
        self.run = wandb.init(id=run_id, resume="allow", dir=str(folder), name=config["log"]["run_name"],
                              config=dict(config))
        id_file.write_text(self.run.id)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def add_sums(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the sums of several steps as one, added in float64 in the order of the steps."""
    return {name: float(np.sum([np.float64(part[name]) for part in parts])) for name in parts[0]}


def device_memory() -> dict[str, float]:
    """Returns the peak of the first local device's memory, where the platform tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_memory_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}


class CompileCounter:
    """Counts what JAX compiles inside `with` blocks, and warns from the second block on: a step compiles once."""

    def __init__(self):
        self.blocks = self.compiled = 0
        self.inside = False
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, *_: Any, **__: Any) -> None:
        self.compiled += self.inside and event == "/jax/core/compile/backend_compile_duration"

    def __enter__(self) -> None:
        self.inside, self.before = True, self.compiled

    def __exit__(self, *_: Any) -> None:
        self.inside = False
        self.blocks += 1
        if self.compiled > self.before and self.blocks > 1:
            log.warning("step compiled again, %d programs so far: the shapes or types of its arrays have changed",
                        self.compiled)


@dataclasses.dataclass
class Interval:
    """What is counted between two train lines."""

    tokens: int = 0
    pairs: int = 0
    waited: float = 0.0  # seconds
    work: float = 0.0  # seconds of all devices at their peak


class Meter:
    """The train lines: exact means over the steps since the last line, written one step late.

    Reading a step's sums waits for that step; a step late, the device already works on the next one.
    """

    def __init__(self, record: Any, beta: float, sinks: "Metrics", total_steps: int, steps_per_epoch: int,
                 work: Callable[[Any], float] | None):
        """work: the seconds that all devices would need for a step at their peak, for `mfu`."""
        self.record, self.beta, self.sinks = record, beta, sinks
        self.total_steps, self.steps_per_epoch, self.work = total_steps, steps_per_epoch, work
        self.pending: tuple | None = None
        self.began, self.interval = time.monotonic(), Interval()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of an evaluation out of the training speed, once its own step's line is written."""
        self.write_pending()
        jax.block_until_ready(self.record.parts)
        start = time.monotonic()
        yield
        self.began += time.monotonic() - start

    def add(self, sums: Mapping[str, Any], info: Any, waited: float) -> None:
        """info: what the step's batch holds; waited: the seconds that the step had to wait for it."""
        self.record.parts.append({**sums, "tokens": info.tokens, "slots": info.slots})
        self.record.tokens += info.tokens
        interval = self.interval
        interval.tokens += info.tokens
        interval.pairs += len(info.branches)
        interval.waited += waited
        interval.work += self.work(info) if self.work is not None else 0.0

    def end_interval(self, step: int, grad_norm: Any, learning_rate: Any) -> None:
        self.pending = (step, grad_norm, learning_rate, self.record.tokens, self.interval)
        self.interval = Interval()

    def write_pending(self) -> None:
        if self.pending is None:
            return
        step, grad_norm, learning_rate, num_tokens, interval = self.pending
        self.pending = None
        sums = add_sums(jax.device_get(self.record.parts))
        self.record.parts.clear()
        # From one reading to the next: each waits for the end of its own interval's last step.
        now, counts = time.monotonic(), self.record.counts
        seconds, self.began = now - self.began, now
        values = {"epoch": round(step / self.steps_per_epoch, 6), **loss.metrics(sums, beta=self.beta),
                  "grad_norm": float(grad_norm), "learning_rate": float(learning_rate), "num_tokens": num_tokens,
                  "padding_fraction": 1 - sums["tokens"] / sums["slots"],
                  "truncated_fraction": counts["truncated"] / counts["pairs"]}
        self.record.metrics.update(values)
        speed = {"tokens_per_second": interval.tokens / seconds, "pairs_per_second": interval.pairs / seconds,
                 "data_wait_seconds": interval.waited}
        if self.work is not None:
            speed["mfu"] = interval.work / seconds
        self.sinks.write(step, values | speed | device_memory())
        log.info("step %d of %d: loss %.4f  nll %.4f  accuracy %.3f  margin %.4f  grad %.3f  lr %.2e  %.2f pairs/s  "
                 "waited %.1f s",
                 step, self.total_steps, values["loss"], values["nll_loss"], values["rewards/accuracies"],
                 values["rewards/margins"], values["grad_norm"], values["learning_rate"], speed["pairs_per_second"],
                 interval.waited)
        if not np.isfinite(values["loss"]):
            log.warning("step %d: the loss is not finite; a lower optim.learning_rate usually helps", step)


class Metrics:
    """Sends each line of numbers to the sinks of `log.report_to`, from process 0 only."""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any], resumed_at: int | None,
                 evaluated: bool = True):
        """resumed_at: the step after which a run goes on; evaluated: whether that step's held-out lines are written."""
        step = -1 if resumed_at is None else resumed_at
        makers = {
            "jsonl": lambda: JsonlSink(folder / "metrics.jsonl", step, evaluated),
            "tensorboard": lambda: TensorboardSink(folder, step),
            "wandb": lambda: WandbSink(folder, config),
        }
        self.sinks = [makers[name]() for name in config["log"]["report_to"]] if jax.process_index() == 0 else []

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(step, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
