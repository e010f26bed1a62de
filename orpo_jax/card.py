"""The model card of an export: what was trained from what, on what, how, and with what result."""

import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

CITATION = """@inproceedings{hong2024orpo,
  title = {{ORPO: Monolithic Preference Optimization without Reference Model}},
  author = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year = {2024},
  eprint = {2403.07691},
  archivePrefix = {arXiv},
}"""

SHOWN = ("loss", "nll_loss", "log_odds_ratio", "rewards/accuracies", "rewards/margins", "logps/chosen",
         "logps/rejected")


def model_card(config: Mapping[str, Any], data: str, optimizer: str | None, steps: int, metrics: Mapping[str, Any],
               counts: Mapping[str, int]) -> str:
    """Returns README.md with the front matter that model hubs read.

    config: the run's, resolved. data: the source of the rows. optimizer: None for one that the program gave.
    """
    def local(path: str) -> bool:
        return pathlib.Path(path).expanduser().exists()

    def name(path: str) -> str:  # a local path says nothing to others, and should not leave the machine
        return pathlib.Path(path).name if local(path) else path

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["orpo", "orpo_jax", "preference-optimization"]}
    model, optim = config["model"]["path"], config["optim"]
    if not local(model):
        front["base_model"] = model
    rows = [
        ("beta", config["orpo"]["beta"]), ("optimiser", optimizer or "given by the program"),
        *([("learning rate", optim["learning_rate"]), ("schedule", optim["lr_scheduler_type"]),
           ("warm-up steps", optim["warmup_steps"]), ("weight decay", optim["weight_decay"]),
           ("gradient clipping", optim["max_grad_norm"])] if optimizer else []),
        ("pairs per step", config["train"]["batch_size"]), ("steps", steps),
        ("maximum length", config["data"]["max_length"]), ("seed", config["seed"]),
    ]
    settings = "\n".join(f"| {key} | {value} |" for key, value in rows)
    results = "\n".join(f"| `{key}` | {value:.4g} |" for key, value in metrics.items()
                        if key.split("eval_")[-1] in SHOWN or any(key.endswith(f"_{name}") for name in SHOWN))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name(model)}, preference-tuned with ORPO

Fine-tuned from **{name(model)}** on **{name(data)}** ({counts['pairs']} preference pairs of {counts['rows']} rows) with
ORPO, by orpo_jax.

## Settings

| setting | value |
| --- | --- |
{settings}

## Final metrics

| metric | value |
| --- | --- |
{results}

`rewards/accuracies` is the share of pairs whose chosen response has the higher mean token log-probability.

## Citation

```bibtex
{CITATION}
```
"""
