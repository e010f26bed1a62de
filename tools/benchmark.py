"""Measure this trainer beside TRL and Liger in PyTorch: one command, one table.

    python tools/benchmark.py --preset cpu-small         # the runs that are kept: also gpu-0.5b, gpu-1b, ...
    python tools/benchmark.py --preset smollm2-32 --model DIR --data ROWS.jsonl
    python tools/benchmark.py --model qwen2-0.5b --lengths hh --steps 5
    python tools/benchmark.py --model DIR --data ROWS.jsonl --max-length 512
    python tools/benchmark.py --readme                   # writes what is kept into README.md and docs/benchmarks.md

Every run of a system is a process of its own, in turns (A B A B ...), over the same weights and the same token pairs:
random ids with the lengths of a real set, or real rows. Timed is a whole optimiser step, pairs to padded batches,
forward, backward, clipping and AdamW, each step over pairs of its own and waited for before the next. All systems take
--pairs pairs to a step; those that lay pairs out as TRL does cut them into micro-batches of --micro.

With --alive a system has one process for all its rounds, so that each compiles once. The device must hold what all of
them keep while another one runs: 12 bytes a weight in PyTorch, the most that it has used in JAX.

Parity: the first step of every system, which is not timed, is over the first --micro pairs alone. Such a step is one
micro-batch to TRL, whose loss is the mean over micro-batches, so there all systems mean the same number. A row whose
loss or gradient norm there is not the reference's (report.TOLERANCE) is VOID: its speed is that of other work.

Columns
- pairs/s: every step at its fastest round, and at its median; all steps together.
- tokens/s: of both sequences of every pair, the same tokens for all. computed: positions that were in fact computed;
  padding adds to them, and a prompt that is computed once takes off.
- GFLOP/pair: what the timed steps compute, padding and recomputation included, the optimiser's work left out. In JAX
  it is XLA's count for the CPU, of every operation (flop_count.py); in PyTorch that of its FlopCounterMode, of matrix
  products and attention alone, counted as if nothing were masked (torch_side.width_flops).
- MFU: the FLOPs that the pairs need, nothing computed twice (flops.step_flops), over the chip's peak; a CPU's peak is
  that of the fastest float32 matrix product measured before each run.
- peak GiB: of the process on CPU (with the model's files read and the libraries), of the device's allocator on GPUs.
- compile s: what the first step took beyond a second one over the same pairs, the least of all rounds. Without a
  compiler it is what else happens once: memory is asked for, and kernels are chosen. orpo_jax compiles as many row
  lengths as it would for a run of jax_side.RUN_STEPS steps.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking import models, report
from benchmarking import pairs as pairs_lib
from benchmarking.systems import SYSTEMS, Result, Settings
from orpo_jax import config as config_lib
from orpo_jax import data, flops, packing, standin
from orpo_jax.families import Architecture, architecture, read_config
from orpo_jax.pretrained import open_pretrained

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRESETS: dict[str, dict[str, Any]] = {
    "cpu-small": {"device": "cpu", "model": "small", "scale": 0.35, "steps": 3, "rounds": 2},
    "cpu-small-hh": {"device": "cpu", "model": "small", "lengths": "hh", "steps": 3, "rounds": 2},
    "cpu-small-long-prompt": {"device": "cpu", "model": "small", "lengths": "long_prompt", "scale": 0.35, "pairs": 32,
                              "steps": 3, "rounds": 2},
    **{f"smollm2-{pairs}": {  # "": given beside the preset
        "device": "cpu", "model": "", "data": "", "max_length": 512, "pairs": pairs, "micro": 4, "steps": 3,
        "rounds": 2, "systems": "torch TRL; torch Liger; orpo_jax packed+shared"} for pairs in (4, 32)},
    "gpu-0.5b": {"device": "gpu", "model": "qwen2-0.5b", "steps": 4, "rounds": 2, "warmup": 2},
    "gpu-1b": {"device": "gpu", "model": "llama-1b", "steps": 4, "rounds": 2, "warmup": 2},
    "gpu-largest": {"device": "gpu", "model": "qwen2-0.5b", "steps": 1, "largest": True},
}
LARGEST_SYSTEMS = ("orpo_jax packed+shared", "orpo_jax packed+shared, recompute", "torch TRL, recompute",
                   "torch Liger, recompute")
OUT_OF_MEMORY = re.compile(r"out of memory|RESOURCE_EXHAUSTED|OutOfMemory|MemoryError", re.IGNORECASE)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments, a preset's beneath those given; exits with a line of help where they make no run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, help="arguments of a run that docs/benchmarks.md quotes")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--systems", default="", help="names, separated by ';', or 'all'; default: the device's")
    parser.add_argument("--model", default="small", help=f"a folder, or random weights: {', '.join(models.SHAPES)}")
    parser.add_argument("--lengths", choices=standin.SETS, default="ultrafeedback")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths")
    parser.add_argument("--data", default="", help="rows in place of synthetic pairs; needs a model folder")
    parser.add_argument("--max-length", type=int, default=1024, help="what rows are cut to")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--pairs", type=int, default=64, help="pairs per optimiser step")
    parser.add_argument("--micro", type=int, default=8, help="pairs of a micro-batch in TRL's layout")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch of orpo_jax; default: its own choice")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each system")
    parser.add_argument("--alive", action="store_true", help="one process for all rounds of a system")
    parser.add_argument("--largest", action="store_true", help="find the largest model, and micro-batch, that fits")
    parser.add_argument("--check-attention", action="store_true", help="check the attention kernels, then stop")
    parser.add_argument("--title", default="", help="keep the run in --results under this name; a preset has its own")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "tools" / "results")
    parser.add_argument("--readme", nargs="?", type=pathlib.Path, const=ROOT, metavar="FOLDER",
                        help="write the kept results into its README.md and docs/benchmarks.md, then stop")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)  # what each of our own processes runs
    parser.add_argument("--settings", type=pathlib.Path, help=argparse.SUPPRESS)
    preset = parser.parse_args(argv).preset
    if preset:
        parser.set_defaults(**PRESETS[preset], title=preset)
    args = parser.parse_args(argv)
    missing = [f"--{name}" for name, value in PRESETS.get(preset, {}).items() if value == getattr(args, name) == ""]
    if missing:
        parser.error(f"--preset {preset} needs {' and '.join(missing)} beside it")
    if min(args.pairs, args.micro, args.steps, args.rounds) < 1 or args.warmup < 0 or args.pairs % args.micro:
        parser.error("needs --steps, --rounds, --micro and --pairs of at least 1, and --pairs a multiple of --micro")
    if args.data and args.model in models.SHAPES:
        parser.error("--data needs --model to be a folder with a tokenizer")
    if args.device == "auto":
        args.device = "gpu" if gpu_name() else "cpu"
    if args.alive and args.device == "cpu":
        parser.error("--alive needs a GPU: the most memory that a process has held is not that of its timed steps")
    if args.dtype == "auto":
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    return args


def choose_systems(args: argparse.Namespace) -> list[str]:
    """Returns the systems to run; ValueError names one that does not exist, or can't run here."""
    if args.systems == "all":
        return [name for name, system in SYSTEMS.items() if args.device == "gpu" or not system.needs_gpu]
    names = [name.strip() for name in args.systems.split(";") if name.strip()]
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"--systems: must be 'all' or some of {'; '.join(SYSTEMS)}, got {name!r}")
        if SYSTEMS[name].needs_gpu and args.device == "cpu":
            raise ValueError(f"--systems: needs a GPU, got {name!r}")
    if args.largest:
        return names or list(LARGEST_SYSTEMS)
    return names or [name for name, system in SYSTEMS.items() if args.device == "gpu" or not system.only_gpu]


# What the systems are given


def make_pairs(args: argparse.Namespace, model: pathlib.Path, count: int) -> list[packing.Pair]:
    """Returns `count` synthetic pairs, or all of --data, of which steps take the first and layouts are made for all;
    ValueError where it holds too few."""
    if not args.data:
        sizes = standin.lengths(args.lengths, count, args.scale)
        return standin.make_pairs(sizes, read_config(model)["vocab_size"])
    data_config = config_lib.DataConfig(train=args.data, max_length=args.max_length)
    found, _ = data.load_pairs(data.read_source(args.data, None, "train", "--data"), open_pretrained(str(model)),
                               data_config)
    if len(found) < count:
        raise ValueError(f"--data: must hold (--warmup + --steps) * --pairs = {count} pairs, got {len(found)}")
    return [found[i] for i in range(len(found))]


def prepare(args: argparse.Namespace, folder: pathlib.Path, shape: str) -> Settings:
    """Writes the model, if it is a named shape, and the pairs into the folder; returns the settings of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    model = models.write_model(shape, folder / "model") if shape in models.SHAPES else pathlib.Path(shape)
    same = {name: getattr(args, name) for name in ("device", "dtype", "pairs", "micro", "warmup", "steps", "alive")}
    settings = Settings(str(model), str(folder / "pairs.npz"), rows=args.rows or "auto", **same)
    pairs_lib.save(make_pairs(args, model, settings.pairs_taken), folder / "pairs.npz")
    return settings


def branches(pairs: Sequence[pairs_lib.Pair]) -> np.ndarray:
    """Returns what packing.branch_lengths does, of pairs that share their prompts."""
    return packing.branch_lengths(np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]),
                                  np.array([pair.shared for pair in pairs]), share_prompt=True)


def make_work(settings: Settings, arch: Architecture, peak: float | None) -> report.Work:
    """Returns what the pairs of the timed steps hold, beside the machine's peak."""
    taken = pairs_lib.load(pathlib.Path(settings.pairs_file))[:settings.pairs_taken]
    timed = taken[settings.warmup * settings.pairs:]
    steps = [timed[i:i + settings.pairs] for i in range(0, len(timed), settings.pairs)]
    work = flops.step_flops(arch, branches(timed))
    return report.Work(settings.pairs, [sum(len(ids) for pair in step for ids in pair[:2]) for step in steps],
                       work / len(timed), peak)


def peak_flops(settings: Settings) -> float | None:
    """Returns the FLOPs per second that the machine can do in this type: measured on CPU, of the data sheet on GPUs."""
    if settings.device == "gpu":
        return flops.peak_flops(gpu_name()) if settings.dtype == "bfloat16" else None
    x, product, seconds = jnp.ones((2048, 2048)), jax.jit(jnp.dot), []
    for _ in range(12):  # the first compiles
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


# Runs


def run_here(system: str, settings: Settings) -> Iterator[Result]:
    """Yields what happens once, then rounds, of one system in this process."""
    side = importlib.import_module(f"benchmarking.{SYSTEMS[system].side}_side")
    return side.measure(SYSTEMS[system], settings)


MARK = "RESULT "  # before what a process answers; libraries print other lines


def serve(system: str, settings: Settings) -> None:
    """Prints, for each line that comes in, what happens once, then a round."""
    for _, result in zip(sys.stdin, run_here(system, settings), strict=False):
        print("\n" + MARK + json.dumps(result), flush=True)


class Process:
    """A system in a process of its own."""

    once: Result | None = None  # what happened before its first round

    def __init__(self, system: str, settings: Settings, folder: pathlib.Path):
        folder = pathlib.Path(tempfile.mkdtemp(dir=folder))
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {"OMP_WAIT_POLICY": "passive", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
                       "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if settings.alive else "true", **os.environ,
                       "PYTHONPATH": paths, "JAX_ENABLE_COMPILATION_CACHE": "false",
                       "JAX_PLATFORMS": "cpu" if settings.device == "cpu" else "cuda,cpu",
                       "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--one", system, "--settings", str(folder / "settings.json")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)

    def round(self) -> Result:
        """Returns a round of it, and what happened once before the first one; {'error': why} where it failed."""
        if self.once is None:
            self.once = self._ask()
        return self.once if "error" in self.once else self.once | self._ask()

    def _ask(self) -> Result:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        errors, returncode = self.errors.read_text(), self.process.wait()
        if OUT_OF_MEMORY.search(errors) or returncode == -9:
            return {"error": "out of memory"}
        print(errors[-3000:], file=sys.stderr)
        return {"error": "failed: " + " ".join((errors.strip().splitlines() or ["no message"])[-1].split())[:100]}

    def close(self) -> None:
        """Ends the process, which frees its memory."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()  # not read to its end: what compiles for the process may hold it open


def run_apart(system: str, settings: Settings, folder: pathlib.Path) -> Result:
    """Returns the result of one round of a system, in a process that ends with it."""
    process = Process(system, settings, folder)
    try:
        return process.round()
    finally:
        process.close()


def compare(args: argparse.Namespace, names: Sequence[str], folder: pathlib.Path) -> dict[str, Any]:
    """Runs the systems in turns; returns the run as it is kept."""
    settings = prepare(args, folder, args.model)
    pairs = pairs_lib.load(pathlib.Path(settings.pairs_file))
    arch = architecture(read_config(pathlib.Path(settings.model)), max(pair.longest for pair in pairs))
    rounds: dict[str, list[Result]] = {name: [] for name in names}
    peaks = []  # of a machine that others share it changes
    processes = {name: Process(name, settings, folder) for name in names if args.alive}
    try:
        for turn in range(args.rounds):
            for name in names:
                if not any("error" in result for result in rounds[name]):
                    print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                    peaks.append(peak_flops(settings))
                    counting = dataclasses.replace(settings, count_flops=turn == 0)
                    rounds[name].append(processes[name].round() if args.alive else run_apart(name, counting, folder))
    finally:
        for process in processes.values():
            process.close()
    work = make_work(settings, arch, max(peaks, key=lambda peak: peak or 0.0))
    rows = {name: dict(error=results[-1]["error"]) if "error" in results[-1] else report.figures(results, work)
            for name, results in rounds.items()}
    reference = report.mark_void(rows, settings.dtype)
    print(report.table(rows))
    return {"kind": "compare", "what": describe(args, reference), "systems": rows, "reference": reference,
            "work": dataclasses.asdict(work), "rounds": rounds}


def find_largest(args: argparse.Namespace, names: Sequence[str], folder: pathlib.Path) -> dict[str, Any]:
    """Tries each system on ever larger models, and on ever larger micro-batches of --model; returns the run."""
    rows: dict[str, dict[str, Any]] = {}

    def climb(trials: Iterator[tuple[str, Settings]], kind: str) -> None:
        alive = list(names)
        for label, settings in trials:
            for name in list(alive):
                print(f"{name}: {label}", file=sys.stderr, flush=True)
                result = run_apart(name, dataclasses.replace(settings, count_flops=False), folder)
                row = rows.setdefault(f"{name}, {kind}", {"fits": "", "peak_gib": 0.0, "stopped": ""})
                if "error" in result:
                    row["stopped"] = f"{label}: {result['error']}"
                    alive.remove(name)
                else:
                    row |= {"fits": label, "peak_gib": result["peak_bytes"] / 2**30}
            if not alive:
                return

    def by_model() -> Iterator[tuple[str, Settings]]:
        shapes = list(models.SHAPES)
        for shape in shapes[shapes.index(args.model):]:
            yield shape, prepare(args, folder / "models", shape)
            shutil.rmtree(folder / "models")  # the files of a large one fill a disk

    def by_micro() -> Iterator[tuple[str, Settings]]:
        settings = prepare(args, folder / "micro", args.model)
        pairs = pairs_lib.load(pathlib.Path(settings.pairs_file))
        positions = branches(pairs) @ (-1, 1, 1)
        per_row = max(1.0, positions.max() / positions.mean())
        micro = args.micro
        while micro <= args.pairs:
            rows = max(1, round(micro / per_row))  # about as many pairs
            yield f"{args.model}, {micro} pairs at a time", dataclasses.replace(settings, micro=micro, rows=rows)
            micro *= 2

    climb(by_model(), f"{args.micro} pairs at a time")
    climb(by_micro(), "micro-batch")
    print(report.largest_table(rows))
    return {"kind": "largest", "what": describe(args, None), "systems": rows}


def describe(args: argparse.Namespace, reference: str | None) -> str:
    """Returns in a sentence what a run was."""
    where = f"rows of {pathlib.Path(args.data).name}, at most {args.max_length} tokens" if args.data else (
        f"{args.lengths} lengths" + (f" times {args.scale:g}" if args.scale != 1 else ""))
    text = f"{pathlib.Path(args.model).name}, {args.dtype}, {where}, {args.pairs} pairs a step"
    text += f", micro-batches of {args.micro} in TRL's layout" + (f"; {args.rounds} rounds of {args.steps} steps")
    text += ", of processes that stay alive" * args.alive
    return text + (f"; parity with {reference}." if reference else ".")


# The machine


def gpu_name() -> str:
    """Returns the name of the first NVIDIA GPU, or an empty string."""
    if not shutil.which("nvidia-smi"):
        return ""
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout.strip() else ""


def machine(device: str) -> dict[str, Any]:
    """Returns the machine's name, and the versions and memory pages that the figures belong to."""
    info = pathlib.Path("/proc/cpuinfo")
    cpus = [line.split(":", 1)[1].strip() for line in (info.read_text().splitlines() if info.is_file() else [])
            if line.startswith("model name")]
    cpu = f"{cpus[0] if cpus else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = {}
    for name in ("jax", "torch", "transformers", "trl", "liger-kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    pages = os.environ.get("GLIBC_TUNABLES")
    return {"name": gpu_name() if device == "gpu" else cpu, **versions, **({"GLIBC_TUNABLES": pages} if pages else {})}


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.one:
        serve(args.one, Settings(**json.loads(args.settings.read_text())))
        return
    if args.readme:
        report.rewrite(args.readme / "README.md", report.summary(args.results))
        report.rewrite(args.readme / "docs" / "benchmarks.md", report.markdown(args.results))
        return
    if args.check_attention:
        from benchmarking import attention_check
        attention_check.main()
        return
    jax.config.update("jax_platforms", "cpu")  # this process measures nothing on a GPU, and must not hold one
    names = choose_systems(args)
    facts = machine(args.device)
    print(*(f"{name} {value}" for name, value in facts.items()), sep=", ", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        run = (find_largest if args.largest else compare)(args, names, pathlib.Path(temporary))
    if args.title:
        print("kept in", report.save(args.results, args.title, {"machine": facts, **run}))


if __name__ == "__main__":
    config_lib.main_errors(main)
