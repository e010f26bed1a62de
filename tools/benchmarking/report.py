"""Results of runs to figures, tables, a file per machine, and the blocks of README.md and docs/benchmarks.md."""

import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.systems import REFERENCES, SYSTEMS, Result

MARKS = ("<!-- benchmark: written by `python tools/benchmark.py --readme` -->", "<!-- end of benchmark -->")
NOT_MEASURED = "Not measured yet: `python tools/benchmark.py --preset cpu-small`, then `--readme`."
# How far the first step's loss and gradient norm may be from the reference's, relatively.
TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (1e-2, 5e-2)}
COLUMNS = ("system", "pairs/s, max", "median", "tokens/s", "computed", "GFLOP/pair", "MFU", "peak GiB", "compile s",
           "step-1 loss")
OURS = "orpo_jax packed+shared"  # the system that the README compares with others


@dataclasses.dataclass(frozen=True)
class Work:
    """What the pairs of the timed steps hold, the same for all systems."""

    pairs: int  # of one step
    tokens: list[int]  # of each step: all tokens of both sequences of every pair
    flops_per_pair: float  # that training needs
    peak_flops: float | None  # per second, of the machine at this type; None where it is not known


def figures(rounds: Sequence[Result], work: Work) -> dict[str, Any]:
    """Returns the figures of one system from its rounds, the first of which counted FLOPs.

    Steps differ in their pairs, so each is compared with itself: the best speed has every step at its fastest round,
    the median one every step at its median, and both are over all steps together.
    """
    by_step = list(zip(*(run["seconds"] for run in rounds), strict=True))
    fastest, median = sum(map(min, by_step)), sum(map(statistics.median, by_step))
    pairs, last = work.pairs * len(by_step), rounds[-1]
    best = pairs / fastest
    return {
        "pairs_per_second": best,
        "median_pairs_per_second": pairs / median,
        "tokens_per_second": sum(work.tokens) / fastest,
        "computed_tokens_per_second": sum(last["computed_tokens"]) / fastest,
        "compiler_flops_per_pair": rounds[0]["compiler_flops"],
        "mfu": best * work.flops_per_pair / work.peak_flops if work.peak_flops else None,
        "peak_gib": max(run["peak_bytes"] for run in rounds) / 2**30,
        "compile_seconds": min(run["compile_seconds"] for run in rounds),
        "loss": last["loss"],
        "grad_norm": last["grad_norm"],
        "loss_from": last.get("loss_from"),
    }


def mark_void(systems: Mapping[str, dict[str, Any]], dtype: str) -> str | None:
    """Sets `void` in each system whose first step is not the reference's; returns the reference's name."""
    ran = [name for name, row in systems.items() if "error" not in row]
    reference = next((name for name in (*REFERENCES, *ran) if name in ran), None)
    for row in systems.values():
        if "error" not in row and reference is not None:
            off = lambda key, row=row: abs(row[key] / systems[reference][key] - 1)
            # Not a number is void too.
            row["void"] = not all(off(key) <= most
                                  for key, most in zip(("loss", "grad_norm"), TOLERANCE[dtype], strict=True))
    return reference


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """Returns a system's row of the table as text."""
    if "error" in row:
        return [name, row["error"], *[""] * (len(COLUMNS) - 2)]
    if row["void"]:
        return [name, "VOID", *[""] * (len(COLUMNS) - 3), f"{row['loss']:.5f}"]
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return [name, f"{row['pairs_per_second']:.2f}", f"{row['median_pairs_per_second']:.2f}",
            f"{row['tokens_per_second']:,.0f}", f"{row['computed_tokens_per_second']:,.0f}",
            f"{row['compiler_flops_per_pair'] / 1e9:,.1f}", mfu, f"{row['peak_gib']:.2f}",
            f"{row['compile_seconds']:.1f}", f"{row['loss']:.5f}"]


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown, its header first, padded so that it can be read in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the systems as a table in Markdown."""
    return grid([COLUMNS, *(cells(name, row) for name, row in systems.items())])


def largest_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what fitted on the machine as a table in Markdown."""
    lines = ["| system | largest that fits | peak GiB | the next one |", "|---|---|---|---|"]
    lines += [f"| {name} | {row['fits'] or 'none'} | {row['peak_gib']:.1f} | {row['stopped'] or 'not tried'} |"
              for name, row in systems.items()]
    return "\n".join(lines)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(folder: pathlib.Path, title: str, run: Mapping[str, Any]) -> pathlib.Path:
    """Writes the run under its title into its machine's file, in place of an older one; returns the file."""
    file = folder / f"{slug(run['machine']['name'])}.json"
    runs = json.loads(file.read_text()) if file.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs | {title: run}, indent=1) + "\n")
    return file


def kept(folder: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the title of every run of every machine in the folder, and the run."""
    return [item for file in sorted(folder.glob("*.json")) for item in json.loads(file.read_text()).items()]


def markdown(folder: pathlib.Path) -> str:
    """Returns every run in the folder as Markdown."""
    parts = []
    for title, run in kept(folder):
        facts = ", ".join(f"{key} {value}" for key, value in run["machine"].items() if key != "name")
        parts += [f"**{title}** on {run['machine']['name']} ({facts}). {run['what']}",
                  (largest_table if run["kind"] == "largest" else table)(run["systems"])]
    return "\n\n".join(parts) or NOT_MEASURED


def summary(folder: pathlib.Path) -> str:
    """Returns, of every run that has OURS, how many times a peer's speed that was, in what part of its memory."""
    def valid(run: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
        row = run["systems"].get(name, {"void": True})
        return None if "error" in row or row["void"] else row

    runs = [(title, run, ours) for title, run in kept(folder)
            if run["kind"] == "compare" and (ours := valid(run, OURS))]
    peers = [name for name in SYSTEMS if name != OURS and any(valid(run, name) for _, run, _ in runs)]

    def beside(ours: Mapping[str, Any], peer: Mapping[str, Any] | None) -> str:
        return "" if peer is None else (f"{ours['pairs_per_second'] / peer['pairs_per_second']:.1f} x in "
                                        f"{ours['peak_gib'] / peer['peak_gib']:.2f}")

    rows = [[title, run["machine"]["name"], f"{ours['pairs_per_second']:.2f}",
             *(beside(ours, valid(run, peer)) for peer in peers)] for title, run, ours in runs]
    return grid([["run", "machine", "pairs/s", *peers], *rows]) if runs else NOT_MEASURED


def rewrite(file: pathlib.Path, text: str) -> None:
    """Puts the text between the file's marks and leaves all else; ValueError where it has not each mark once."""
    whole = file.read_text(encoding="utf-8")
    if any(whole.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{file}: must hold each of these lines once: {MARKS[0]} {MARKS[1]}")
    before, rest = whole.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    file.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
