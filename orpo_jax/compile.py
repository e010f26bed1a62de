"""Compiles the train step of a config for a TPU slice that need not be there, and says whether it fits:

    python -m orpo_jax.compile --config configs/NAME.py --topology v5p:4x4x4 [--num_slices 2] [--json]
        [--config.section.key=value ...]

--topology names a kind of chip and the shape of a slice, such as v5e:4x8, v6e:4x4 or v5p:2x2x4; cpu:8 is this machine
as eight devices. Any machine will do: of the model it needs config.json, of the data nothing. The exit code is 0 where
the step fits, and 1 where it does not, or where an error says why there is no answer.

The step is the one that `train` runs (program.py). Where it does not fit, changes that need less memory are compiled
too, the cheapest first, and the first that fits is named.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from orpo_jax import batching, data, flops, standin
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.config import Config
from orpo_jax.families import Architecture, architecture, complete, read_config
from orpo_jax.metrics import log, set_up_logging
from orpo_jax.packing import Pair
from orpo_jax.preference import MAX_COMPLETION_LENGTH, truncate
from orpo_jax.pretrained import Pretrained, find_folder, open_pretrained
from orpo_jax.program import Program, compile_step, make_program
from orpo_jax.sharding import make_mesh

GIB = 2**30
# What a program may hold on one device, by its kind: as libtpu's compiler says where it refuses one ("exceeds available
# HBM"). The data sheets (cloud.google.com/tpu/docs/v5e and its sisters) have 16 GB for v5e, 95 for v5p and 32 for v6e.
# Of v2 to v4 and TPU7x, libtpu compiles for half a chip as one device, where a v4 that runs is one.
HBM = {"TPU v5 lite": 15.75 * GIB, "TPU v5": 95.74 * GIB, "TPU v6 lite": 31.25 * GIB, "TPU v4": 15.25 * GIB,
       "TPU v3": 15.48 * GIB, "TPU v2": 7.48 * GIB, "TPU7x": 94.75 * GIB}
# Slices that Google Cloud rents out, the smallest first (of v5p there are many more shapes).
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES}
# Chips to a host unless told otherwise: libtpu takes smaller slices only if told.
HOST_CHIPS = 4

# Where there is no data to read: so many pairs, of which the longest are as long as those of a whole data set.
STANDIN_PAIRS = 16384
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


# The devices


def topology_devices(topology: str, num_slices: int = 1) -> list[Any]:
    """Returns the devices of a topology, which can be compiled for but not run; ValueError where there is none such."""
    kind, _, shape = topology.partition(":")
    if not re.fullmatch(r"\d+(x\d+){0,2}", shape) or (kind == "cpu" and ("x" in shape or num_slices > 1)):
        raise ValueError(f"--topology: must be {_forms()}, got {topology!r}")
    if num_slices < 1:
        raise ValueError(f"--num_slices: must be at least 1, got {num_slices}")
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine stays free for others
    if kind == "cpu":
        return _cpu_devices(int(shape))
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError("--topology: needs libtpu, which holds the TPU's compiler; pip install 'jax[tpu]' takes the "
                         "one that fits this jax (no TPU is needed)")
    # libtpu would ask the metadata server of a TPU machine who it is, and lock a TPU that is there.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
                        ("TPU_ACCELERATOR_TYPE", "v5e-4"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    sizes = [int(size) for size in shape.split("x")]
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if math.prod(sizes) < HOST_CHIPS:
        options["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology: must be {_forms()}, got {topology!r}, of which libtpu says: "
                         f"{str(error).splitlines()[0]}") from error


def _forms() -> str:
    slices = ", ".join(f"{kind}:{shapes[3]}" for kind, shapes in SLICES.items())
    return f"a kind of chip and the shape of a slice, such as {slices}, or cpu:8 (v5e and v6e are flat, to 16x16)"


def _cpu_devices(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # there are devices already
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise ValueError(f"--topology: this process has {len(jax.devices())} CPU devices already, got cpu:{count}")
    return jax.devices()[:count]


def device_limit(device: Any) -> int:
    """Returns the bytes that a program may hold on a device."""
    if device.platform != "tpu":
        return step_lib.device_bytes(device)
    if device.device_kind not in HBM:
        raise ValueError(f"--hbm: what a {device.device_kind} holds is not known; give it in GB")
    return int(HBM[device.device_kind])


# The model and the rows


def open_model(config: Config) -> tuple[Architecture, Pretrained | None]:
    """Returns the model of a config, and its tokenizer where its folder has one: it may need more embeddings.

    Of a hub id only config.json is fetched.
    """
    folder = find_folder(config.model.path, config.model.revision, ["config.json"])
    fields = read_config(folder)
    complete(fields)
    pretrained = None
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        pretrained = open_pretrained(str(folder), chat_template=config.data.chat_template)
    return architecture(fields, config.data.max_length, pretrained.rows_needed if pretrained else 0), pretrained


def open_pairs(config: Config, arch: Architecture, pretrained: Pretrained | None) -> tuple[data.Pairs, str]:
    """Returns the pairs that rows are laid out for, and what they are."""
    local = pathlib.Path(config.data.train).expanduser().exists()
    if local and pretrained is not None:
        source = data.read_source(config.data.train, config.data.train_name, config.data.train_split, "data.train")
        return data.load_pairs(source, pretrained, config.data)[0], f"the pairs of {config.data.train}"
    why = "the model has no tokenizer here" if local else f"data.train is no local file: {config.data.train}"
    return standin_pairs(config, arch), (
        f"{STANDIN_PAIRS:,} stand-in pairs with lengths like UltraFeedback's (log-normal, standin.py), cut to "
        f"data.max_length = {config.data.max_length} ({why})")


def standin_pairs(config: Config, arch: Architecture) -> data.Pairs:
    """Returns pairs of random ids, cut as the trainer cuts them."""
    drawn = standin.draw("ultrafeedback", STANDIN_PAIRS)
    cut = _apart if arch.encodes else lambda pair, config: truncate(pair, config, None)
    return data.from_pairs([cut(pair, config.data) for pair in standin.make_pairs(drawn, arch.spec.vocab_size)])


def _apart(pair: Pair, config: config_lib.DataConfig) -> Pair:
    """Returns a pair as an encoder-decoder has it (preference.Encoder), from one whose sequences hold the prompt."""
    prompt, longest = pair.chosen_prompt, config.max_completion_length or min(MAX_COMPLETION_LENGTH, config.max_length)
    responses = [np.insert(ids[prompt:][:longest], 0, 0) for ids in (pair.chosen_ids, pair.rejected_ids)]
    source = pair.chosen_ids[:prompt][:config.max_prompt_length or config.max_length]
    return Pair(responses[0], responses[1], 1, 1, 1, source)


# The report


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step takes of one device. Bytes, unless it says otherwise; None: the compiler did not say."""

    topology: str
    num_slices: int
    devices: int
    kind: str
    step: str  # the program, in words
    rows: str  # what the rows were laid out for
    remat: str
    params: int
    optimizer: int
    gradients: int
    limit: int
    total: int
    fits: bool
    useful_flops: float  # of a step, over all devices
    least_seconds: float | None  # of a step, at the devices' peak
    seconds: float | None = None  # of compiling; where it is None, so is all that follows
    inputs: int | None = None  # the batch, and what the tiles of arrays add
    activations: int | None = None
    counted_flops: float | None = None  # by the compiler, per device
    collectives: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # how many, and bytes
    kernels: int | None = None


def shard_bytes(tree: Any, itemsize: int | None = None) -> int:
    """Returns the bytes of arrays on one device; itemsize: of another type than their own."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)
               for leaf in jax.tree.leaves(tree))


def weigh(program: Program, topology: str, num_slices: int, rows: str, limit: int) -> Report:
    """Compiles a program, and returns what it takes of devices that hold `limit` bytes."""
    device, state, info = program.mesh.devices.flat[0], program.abstract_state(), program.batches.info(0)
    useful, peak = flops.step_flops(program.arch, info.branches, info.encoded), flops.peak_flops(device.device_kind)
    params, optimizer, gradients = (shard_bytes(state.params), shard_bytes(state.opt_state),
                                    shard_bytes(state.params, itemsize=4))
    found = Report(topology, num_slices, program.mesh.size, device.device_kind, str(program), rows,
                   program.remats()[-1], params, optimizer, gradients, limit, total=params + optimizer + gradients,
                   fits=False, useful_flops=useful,
                   least_seconds=useful / peak / program.mesh.size if peak else None)
    if found.total > limit:  # the sum of gradients goes through the loop of micro-batches beside the state
        return found
    try:
        with jax.set_mesh(program.mesh):
            compiled = compile_step(program, limit)
    except ValueError as error:
        if not isinstance(error.__cause__, jax.errors.JaxRuntimeError):
            raise
        return dataclasses.replace(found, total=max(found.total, _bytes_asked(str(error.__cause__))))
    arguments, text = compiled.step.memory_analysis().argument_size_in_bytes, _text(compiled.step)
    return dataclasses.replace(
        found, remat=compiled.remat, total=compiled.need, fits=compiled.need <= limit, seconds=compiled.seconds,
        inputs=arguments - params - optimizer, activations=max(0, compiled.need - arguments - gradients),
        counted_flops=compiled.step.cost_analysis().get("flops"), collectives=collectives(text),
        kernels=kernel_calls(text))


def _text(compiled: Any) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # an instruction that this jax does not know
        raise ValueError(f"--topology: libtpu is not the one of jax {jax.__version__}, which can't read its programs; "
                         "pip install 'jax[tpu]' takes the one that fits") from error


def _bytes_asked(message: str) -> int:
    """Returns what a program that the compiler refused would hold, by its message; 0 where it does not say."""
    found = re.search(r"\(?([\d.]+)([KMG])\)?(?: exceeds available| of [\d.]+[KMG] hbm)", message)
    return int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[found[2]]) if found else 0


def kernel_calls(text: str) -> int:
    """Returns the calls of Pallas kernels in a compiled program's text."""
    return text.count('custom_call_target="tpu_custom_call"')


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns how many collectives of each kind a compiled program's text has, and the bytes of their results.

    One that was split over other work is in the text several times, under one channel.
    """
    seen: dict[str, dict[str, int]] = {kind: {} for kind in COLLECTIVES}
    line = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(.*?channel_id=(\d+)")
    for types, kind, start, channel in line.findall(text):
        shapes = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", types)
        if start and kind in ("all-gather", "collective-permute"):  # (operand, result, ...)
            shapes = shapes[1:2]
        seen[kind][channel] = sum(_type_bytes(name) * math.prod(map(int, filter(None, sizes.split(","))))
                                  for name, sizes in shapes)
    return {kind: (len(sizes), sum(sizes.values())) for kind, sizes in seen.items() if sizes}


def _type_bytes(name: str) -> int:
    bits = re.search(r"\d+", name)
    return -(-int(bits[0]) // 8) if bits else 1


# What would fit


def changes(program: Program) -> list[dict[str, Any]]:
    """Returns settings that need less memory, the cheapest first: recomputation and rows change no number of the run,
    nor does the mesh; the optimiser's types change its rounding."""
    config, layout = program.config, program.batches.layout
    found: list[dict[str, Any]] = []
    if config.model.remat not in ("auto", "full"):
        found.append({"model.remat": "full"})
    if layout.rows_per_device > 1:
        found.append({"train.rows_per_device": 1})
    longest = int(program.batches.pairs.lengths(config.data.share_prompt).max())
    shortest = -(-longest // batching.ROW_UNIT) * batching.ROW_UNIT
    if layout.row_lengths[-1] > shortest:
        found.append({"data.row_length": shortest})
    whole = {f"mesh.{axis}": 1 for axis in ("data", "tensor") if program.mesh.shape[axis] > 1}
    if whole:
        found.append({**whole, "mesh.fsdp": -1})
    if config.optim.name == "adamw":
        if config.optim.mu_dtype != "bfloat16":
            found.append({"optim.mu_dtype": "bfloat16"})
        found.append({"optim.name": "adamw_8bit", "optim.mu_dtype": "auto"})
    return found


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """Returns a config with other values of some dotted keys."""
    values = config_lib.to_dict(config)
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    return config_lib.build(values)


def in_words(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def attempts(program: Program) -> Iterator[dict[str, Any]]:
    """Yields each change alone, then the first two, the first three, and so on."""
    found = changes(program)
    yield from found
    for count in range(2, len(found) + 1):
        yield {key: value for some in found[:count] for key, value in some.items()}


def larger(topology: str, chips: int) -> Iterator[str]:
    """Yields the slices of the same chip that have more of them, the smallest first."""
    kind = topology.partition(":")[0]
    for shape in SLICES.get(kind, ()):
        if math.prod(map(int, shape.split("x"))) > chips:
            yield f"{kind}:{shape}"


def what_would_fit(program: Program, pairs: data.Pairs, report: Report) -> str:
    """Returns the first change of which the compiled step fits, in words; logs what was tried."""
    config, limit, tried = program.config, report.limit, 0

    def fits(settings: Mapping[str, Any], topology: str, mesh: jax.sharding.Mesh | None = None) -> bool:
        nonlocal tried
        try:
            # The trainer would come to it by itself with 'auto'; here the rungs before it are not asked again.
            new = changed(config, {**settings, "model.remat": "full"} if config.model.remat == "auto" else settings)
            mesh = mesh or make_mesh(dataclasses.asdict(new.mesh), list(program.mesh.devices.flat))
            other = make_program(new, program.arch, mesh, pairs)
        except ValueError as error:
            log.info("tried %s: %s", in_words(settings) or topology, error)
            return False
        state = other.abstract_state()
        least = shard_bytes(state) + shard_bytes(state.params, itemsize=4)
        what = in_words(settings) or f"--topology {topology}"
        if least > limit:
            log.info("tried %s: parameters, optimiser state and gradients alone take %.3f GB", what, least / 1e9)
            return False
        tried += 1
        found = weigh(other, topology, report.num_slices, report.rows, limit)
        log.info("tried %s: %.3f GB", what, found.total / 1e9)
        return found.fits

    for settings in attempts(program):
        if fits(settings, report.topology):
            return f"it fits with {in_words(settings)}"
    for topology in larger(report.topology, report.devices // report.num_slices):
        try:
            mesh = make_mesh(dataclasses.asdict(config.mesh), topology_devices(topology, report.num_slices))
        except ValueError as error:
            return f"no change that was tried fits, and the mesh is for this slice only ({error})"
        if fits({}, topology, mesh):
            return f"no change of settings fits; as it is, it fits --topology {topology}"
    return f"nothing that was tried fits ({tried} programs compiled)"


# The command


def prepare(config: Config, devices: list[Any]) -> tuple[Program, data.Pairs, str]:
    """Returns the program of a config on some devices, the pairs that its rows are laid out for, and what those are."""
    arch, pretrained = open_model(config)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    pairs, rows = open_pairs(config, arch, pretrained)
    return make_program(config, arch, mesh, pairs), pairs, rows


def table(report: Report) -> str:
    """Returns the report for people."""
    gb = lambda count: "?" if count is None else f"{count / 1e9:.3f}"
    slices = f"{report.num_slices} slices of " if report.num_slices > 1 else ""
    lines = [f"{slices}{report.topology}: {report.devices} devices ({report.kind})", f"step: {report.step}",
             f"rows laid out for: {report.rows}", f"remat: {report.remat}", "", "bytes per device, in GB (10^9)",
             f"  parameters         {gb(report.params):>9}",
             f"  optimiser state    {gb(report.optimizer):>9}",
             f"  batch, tiles       {gb(report.inputs):>9}",
             f"  gradients          {gb(report.gradients):>9}  by arithmetic: float32, split as the parameters are",
             f"  activations        {gb(report.activations):>9}  an estimate: the rest, gathered weights included",
             f"  total              {gb(report.total):>9}  of {gb(report.limit)} that a program may hold", ""]
    lines.append(f"useful work of a step: {report.useful_flops:.3g} FLOPs" + (
        f", {report.least_seconds:.3g} s at the devices' peak" if report.least_seconds else ""))
    if report.seconds is not None:
        lines += ["in the compiled text, where a loop's body counts once:",
                  f"  work                {report.counted_flops:.3g} FLOPs per device, by the compiler's count",
                  f"  attention kernels   {report.kernels} (tpu_custom_call)"]
        lines += [f"  {kind:<19} {count} with results of {gb(size)} GB per device"
                  for kind, (count, size) in report.collectives.items()]
        lines += [f"compiled in {report.seconds:.0f} s", ""]
    lines.append("it fits" if report.fits else "it does not fit")
    return "\n".join(lines)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m orpo_jax.compile", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help=_forms())
    parser.add_argument("--num_slices", type=int, default=1, help="slices joined by the data-centre network")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    parser.add_argument("--hbm", type=float, help="GB that a program may hold on a device, in place of the chip's")
    parsed, rest = parser.parse_known_args(args)
    # Before the config, which is a program and may start JAX.
    devices = topology_devices(parsed.topology, parsed.num_slices)
    set_up_logging()
    config = config_lib.from_args(rest)
    limit = int(parsed.hbm * 1e9) if parsed.hbm else device_limit(devices[0])
    program, pairs, rows = prepare(config, devices)
    log.info("compiling for %s: %s", parsed.topology, program)
    report = weigh(program, parsed.topology, parsed.num_slices, rows, limit)
    advice = None if report.fits else what_would_fit(program, pairs, report)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(report) | {"advice": advice}))
    else:
        print("\n".join(filter(None, (table(report), advice))))
    sys.exit(0 if report.fits else 1)


if __name__ == "__main__":
    config_lib.main_errors(main)
