"""What fits where: the train step of a model, compiled for ever larger slices of TPUs until one fits.

    python tools/what_fits.py llama-8b v5e    # compiles, and appends a line to docs/what_fits.jsonl for each program
    python tools/what_fits.py                 # prints the table of what is there, and writes it into docs/pods.md

Each chip has one row of 2,048 tokens at a time and 8 pairs a step; float32 weights and AdamW, full recomputation.
Weights lie over all chips (mesh.fsdp), and heads, mlp and words over four (mesh.tensor) where that alone does not fit.
A line is the report of `orpo_jax.compile`. GPUs are by arithmetic. There is no LoRA here: the trainer has none yet.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarking import models
from orpo_jax import compile as compile_lib
from orpo_jax import config as config_lib
from orpo_jax.families import Architecture, architecture

DOCS = pathlib.Path(__file__).parents[1] / "docs"
LINES, PAGE = DOCS / "what_fits.jsonl", DOCS / "pods.md"
START, END = "<!-- what fits: written by `python tools/what_fits.py` -->\n", "\n<!-- end -->"
MODELS = {"qwen2-0.5b": "Qwen2-0.5B", "qwen2-1.5b": "Qwen2-1.5B", "llama-3b": "Llama-3.2-3B",
          "llama-8b": "Llama-3.1-8B", "qwen2.5-32b": "Qwen2.5-32B", "llama-70b": "Llama-3.1-70B"}
ROW_LENGTH, PAIRS_PER_CHIP, TENSOR = 2048, 8, (1, 4)
# 90 % of 80 GB. JAX takes 75 % of a GPU, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
H100_LIMIT, H100_COUNTS = 72e9, (1, 2, 4, 8, 16, 32, 64)

Line = Mapping[str, Any]


def chips_of(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def cloud_name(topology: str) -> str:
    """Returns what Google Cloud calls a slice: of v5p it counts the cores, two to a chip."""
    kind, _, shape = topology.partition(":")
    return f"{kind}-{chips_of(shape) * (2 if kind == 'v5p' else 1)}"


def candidates(kind: str) -> Iterator[tuple[str, int]]:
    """Yields (topology, mesh.tensor), the smallest slice first."""
    for shape in compile_lib.SLICES[kind]:
        yield from ((f"{kind}:{shape}", tensor) for tensor in TENSOR if tensor <= chips_of(shape))


def arithmetic(arch: Architecture, chips: int) -> float:
    """Returns the bytes that one of some chips must hold with mesh.fsdp alone, by arithmetic."""
    sizes = arch.spec.sizes
    count = {weight.path: math.prod(weight.shape(sizes)) for weight in arch.table}
    layers = sum(size for path, size in count.items() if path.startswith("layers/"))
    words, width, depth = (sizes[letter] for letter in "vdl")
    # Weights, two moments and gradients in float32; the layers' weights and their gradients in bfloat16.
    split = 16 * sum(count.values()) + 4 * layers
    # The input of each layer; one layer whole, with its gradient, while the next one comes.
    whole = 2 * depth * ROW_LENGTH * width + 2 * 3 * layers / depth
    # The head, whole: its weight in bfloat16, its gradient in float32, and the logits of a row.
    return split / chips + whole + 6 * words * width + 4 * ROW_LENGTH * words


def compile_case(model: str, topology: str, tensor: int) -> dict[str, Any]:
    """Returns the line of one program."""
    devices = compile_lib.topology_devices(topology)
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(models.SHAPES[model]))
        config = config_lib.build({
            "output_dir": "none", "model": {"path": folder, "remat": "full"}, "mesh": {"tensor": tensor},
            "data": {"train": "stand-in", "row_length": ROW_LENGTH},
            "train": {"rows_per_device": 1, "batch_size": PAIRS_PER_CHIP * len(devices)}})
        program, _, rows = compile_lib.prepare(config, devices)
    report = compile_lib.weigh(program, topology, 1, rows, compile_lib.device_limit(devices[0]))
    found = dataclasses.asdict(report)
    return {"model": model, "tensor": tensor} | {name: value for name, value in found.items() if name != "step"}


def read_lines() -> list[Line]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def find(lines: Iterable[Line], model: str, topology: str, tensor: int) -> Line | None:
    return next((line for line in lines if (line["model"], line["topology"], line["tensor"]) ==
                 (model, topology, tensor)), None)


def fill(model: str, kind: str) -> None:
    """Compiles what is not there yet, up to the first slice that fits."""
    for topology, tensor in candidates(kind):
        line = find(read_lines(), model, topology, tensor)
        if line is None:
            line = compile_case(model, topology, tensor)
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(model, topology, f"tensor={tensor}", f"{line['total'] / 1e9:.1f} GB", f"fits={line['fits']}", flush=True)
        if line["fits"]:
            return


def cell(lines: Sequence[Line], model: str, kind: str) -> str:
    """Returns the smallest slice that fits, if all smaller ones are known not to."""
    for topology, tensor in candidates(kind):
        line = find(lines, model, topology, tensor)
        if line is None:
            return "not compiled"
        if line["fits"]:
            split = f", tensor={tensor}" if tensor > 1 else ""
            return f"{cloud_name(topology)} ({topology.partition(':')[2]}{split}): {line['total'] / 1e9:.1f} GB"
    return f"none up to {cloud_name(topology)}"


def gpu_cell(arch: Architecture) -> str:
    for count in H100_COUNTS:
        if (need := arithmetic(arch, count)) <= H100_LIMIT:
            return f"{count}: {need / 1e9:.0f} GB"
    return f"none up to {H100_COUNTS[-1]}"


def table(lines: Sequence[Line]) -> str:
    """Returns the table as markdown, from the lines alone."""
    limits = {line["topology"].partition(":")[0]: line["limit"] for line in lines}
    heads = [f"{kind}, of {limits[kind] / 1e9:.1f} GB" if kind in limits else kind for kind in compile_lib.SLICES]
    rows = [["model", *heads, f"H100 80 GB, by arithmetic, of {H100_LIMIT / 1e9:.0f} GB"], ["---"] * (len(heads) + 2)]
    for model, title in MODELS.items():
        rows.append([title, *(cell(lines, model, kind) for kind in compile_lib.SLICES),
                     gpu_cell(architecture(models.SHAPES[model], ROW_LENGTH))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("kind", nargs="?", choices=compile_lib.SLICES)
    args = parser.parse_args()
    if args.model is None:
        text = table(read_lines())
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(before + START + text + rest[rest.index(END):])
        print(text)
    elif args.kind is None:
        sys.exit("kind: must be named with a model, got none")
    else:
        fill(args.model, args.kind)


if __name__ == "__main__":
    main()
