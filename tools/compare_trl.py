"""Compare this trainer with TRL's ORPOTrainer: the same model, rows and settings, on CPU, in one command.

    python tools/compare_trl.py --model DIR --data ROWS.jsonl [--steps 8] [--batch-size 4] [--rounds 2] ...

Needs torch and TRL (the `test` extra). Prints both training curves, then the speed of each. Every run is a process of
its own, in turns (ours, TRL, ours, TRL); the curves are those of the first round. float32, one device, all cores, AdamW
without weight decay, constant learning rate, gradients clipped at norm 1, no recomputation of activations, rows in file
order.

Speed is pairs per second from the end of the first step to the end of the last: loading, tokenisation, compilation,
the first step, and whatever is saved after the last step, are left out. Both systems finish a step before the next.
TRL's is a run of its defaults but for what is named above; torch's threads wait without spinning (OMP_WAIT_POLICY),
since on a machine that has other work to do spinning threads can slow small models by a factor of a hundred.

What is done to the rows, so that both systems read the same tokens:
- Conversational rows are rendered with the tokenizer's chat template first, for both, into strings: the prompt with the
  generation prompt, the response as the whole text less that. TRL's ORPO (1.16) ends the conversational responses of
  some models with EOS twice; of rows that are strings, both append EOS unless the response ends in it.
- White space after the EOS of a rendered response ('<|im_end|>\\n') is stripped, since both would append an EOS to it.
- Rows whose longer sequence, with BOS and EOS, is over `--max-length` are left out: TRL 1.16 cuts them otherwise.
- Pairs of identical or empty responses stay in, as they do in TRL.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from orpo_jax import config as config_lib
from orpo_jax import preference
from orpo_jax.pretrained import open_pretrained

SYSTEMS = ("ours", "TRL")
# All that the two share but logits/*: TRL's count prompts and padding.
METRICS = ("loss", "grad_norm", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
           "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
Row = dict[str, str]
Run = dict[str, list]  # metrics: one dict a step; stamps: the second at which each step ended


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the settings; exits with a line of help where they make no run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder in Hugging Face format")
    parser.add_argument("--data", required=True, help="JSONL of prompt, chosen and rejected: strings or messages")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run; the first is not timed")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system")
    parser.add_argument("--output-json", type=pathlib.Path, help="also write everything to this file")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)  # what each of our own processes runs
    args = parser.parse_args(argv)
    if args.steps < 2 or args.batch_size < 1 or args.rounds < 1:
        parser.error("needs --steps of at least 2, and --batch-size and --rounds of at least 1")
    return args


def as_strings(row: Any, tokenizer: Any, where: str) -> Row:
    """Returns a row of any format as three strings; ValueError names the row and what is wrong with it."""
    template = tokenizer.apply_chat_template if tokenizer.chat_template else None
    texts = preference.render(preference.split_prompt(row, where), template, where)
    responses = {"chosen": texts.chosen[texts.boundary:], "rejected": texts.rejected[texts.boundary:]}
    if texts.templated:
        responses = {side: text.rstrip() if text.rstrip().endswith(tokenizer.eos_token) else text
                     for side, text in responses.items()}
    return {"prompt": texts.chosen[:texts.boundary], **responses}


def read_rows(file: pathlib.Path, tokenizer: Any, count: int, max_length: int) -> tuple[list[Row], int]:
    """Returns the first `count` rows that fit in max_length, as strings, and how many before them were left out."""
    rows, left_out = [], 0
    if not file.is_file():
        raise ValueError(f"--data: no such file, got {str(file)!r}")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = as_strings(json.loads(line), tokenizer, f"{file}, line {number}")
            ids = tokenizer([row["prompt"] + row[side] for side in ("chosen", "rejected")], add_special_tokens=False,
                            verbose=False)["input_ids"]
            if max(map(len, ids)) + 2 > max_length:
                left_out += 1
            else:
                rows.append(row)
            if len(rows) == count:
                return rows, left_out
    raise ValueError(f"--data: must hold --steps * --batch-size = {count} pairs of at most --max-length ({max_length}) "
                     f"tokens, got {len(rows)}; {left_out} are longer")


def run_ours(args: argparse.Namespace, rows: list[Row], output: str) -> Run:
    """Returns the metrics of each step of our trainer, and when it ended."""
    from orpo_jax import train

    stamps: list[float] = []
    train.run({
        "output_dir": output, "model": {"path": args.model, "dtype": "float32"},
        "data": {"shuffle": False, "max_length": args.max_length, "overlong": "error", "identical": "keep",
                 "empty": "keep"},
        "orpo": {"beta": args.beta},
        "optim": {"learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
                  "weight_decay": 0.0},
        "train": {"batch_size": args.batch_size, "max_steps": args.steps},
        "checkpoint": {"save_steps": args.steps}, "log": {"logging_steps": 1},
    }, train_rows=rows, on_step=lambda *_: stamps.append(time.perf_counter()))
    lines = (pathlib.Path(output) / "metrics.jsonl").read_text().splitlines()
    return {"metrics": [json.loads(line) for line in lines], "stamps": stamps}


def run_trl(args: argparse.Namespace, rows: list[Row], output: str) -> Run:
    """Returns the metrics of each step of TRL's trainer, and when it ended."""
    import datasets
    import torch  # pyright: ignore[reportMissingImports]
    import transformers
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # pyright: ignore[reportMissingImports]

    stamps: list[float] = []

    class InFileOrder(ORPOTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do
    settings = ORPOConfig(
        output_dir=output, per_device_train_batch_size=args.batch_size, max_steps=args.steps, beta=args.beta,
        learning_rate=args.learning_rate, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
        max_length=args.max_length, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True)
    trainer = InFileOrder(
        model=transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args=settings,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return {"metrics": [line for line in trainer.state.log_history if "grad_norm" in line], "stamps": stamps}


def run_here(args: argparse.Namespace) -> None:
    """Runs one system on rows that are strings already; the last line of stdout is the Run as JSON."""
    rows = [json.loads(line) for line in pathlib.Path(args.data).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as output:
        result = {"ours": run_ours, "TRL": run_trl}[args.one](args, rows, output)
    keep = [{name: line[name] for name in METRICS} for line in result["metrics"]]
    print("\n" + json.dumps({"metrics": keep, "stamps": result["stamps"]}))


def run_apart(args: argparse.Namespace, system: str, data: pathlib.Path) -> Run:
    """Returns the Run of one system in a process of its own; what that logs goes to stderr."""
    flags = {name: getattr(args, name) for name in ("model", "steps", "batch_size", "max_length", "beta",
                                                    "learning_rate")} | {"data": data, "one": system}
    command = [sys.executable, __file__, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                          env={"OMP_WAIT_POLICY": "passive", **os.environ, "JAX_PLATFORMS": "cpu",
                               "TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        raise ValueError(f"{system}: the run failed, with exit code {done.returncode}; its own message is above")
    run = json.loads(done.stdout.splitlines()[-1])
    assert len(run["metrics"]) == len(run["stamps"]) == args.steps
    return run


def machine() -> dict[str, Any]:
    """Returns the versions and the processor that the figures belong to, and how busy it was before."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in (info.read_text().splitlines() if info.is_file() else [])
             if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "trl", "transformers")}
    return {**versions, "cpu": names[0] if names else platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "load average": round(os.getloadavg()[0], 2)}


def summarise(runs: dict[str, list[Run]], batch_size: int) -> dict[str, Any]:
    """Returns the curves of the first round, their largest differences, and the speed and its ratio of every round."""
    curves = {system: runs[system][0]["metrics"] for system in SYSTEMS}
    both = list(zip(*curves.values(), strict=True))
    seconds = {system: [[b - a for a, b in itertools.pairwise(run["stamps"])] for run in runs[system]]
               for system in SYSTEMS}
    speeds = {system: [batch_size * len(steps) / sum(steps) for steps in seconds[system]] for system in SYSTEMS}
    ratios = [ours / trl for ours, trl in zip(*speeds.values(), strict=True)]
    return {"curves": curves,
            "max_abs_difference": {name: max(abs(a[name] - b[name]) for a, b in both) for name in METRICS},
            "pairs_per_second": speeds, "ratio": ratios, "seconds_per_step": seconds}


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    print(f"\n{'step':>4}{'loss ours':>13}{'loss TRL':>13}{'difference':>12}{'grad_norm ours':>16}{'TRL':>11}"
          f"{'accuracy ours':>15}{'TRL':>7}")
    for step, (a, b) in enumerate(zip(*result["curves"].values(), strict=True), 1):
        print(f"{step:>4}{a['loss']:>13.7f}{b['loss']:>13.7f}{a['loss'] - b['loss']:>12.1e}{a['grad_norm']:>16.5f}"
              f"{b['grad_norm']:>11.5f}{a['rewards/accuracies']:>15.3f}{b['rewards/accuracies']:>7.3f}")
    print("\nlargest absolute difference")
    for name, value in result["max_abs_difference"].items():
        print(f"  {name:<20}{value:>9.1e}")
    print(f"\n{'pairs/s':<12}{'min':>9}{'median':>9}   each round")
    for name, rounds in {**result["pairs_per_second"], "ours / TRL": result["ratio"]}.items():
        print(f"{name:<12}{min(rounds):>9.3f}{statistics.median(rounds):>9.3f}   "
              + " ".join(f"{value:.3f}" for value in rounds))


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.one:
        return run_here(args)
    rows, left_out = read_rows(pathlib.Path(args.data), open_pretrained(args.model).tokenizer,
                               args.steps * args.batch_size, args.max_length)
    facts = machine()
    print(*(f"{name} {value}" for name, value in facts.items()), sep=", ")
    print(f"{len(rows)} pairs in {args.steps} steps of {args.batch_size}; {left_out} left out, longer than "
          f"{args.max_length} tokens; beta {args.beta}, learning rate {args.learning_rate}", flush=True)
    runs: dict[str, list[Run]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for _ in range(args.rounds):
            for system in SYSTEMS:
                runs[system].append(run_apart(args, system, data))
    result = summarise(runs, args.batch_size)
    show(result)
    if args.output_json:
        settings = {name: getattr(args, name) for name in ("steps", "batch_size", "max_length", "beta",
                                                           "learning_rate", "rounds")}
        args.output_json.write_text(json.dumps({"machine": facts, "settings": settings, "rows_left_out": left_out,
                                                **result}, indent=1) + "\n")


if __name__ == "__main__":
    config_lib.main_errors(main)
