"""The model card of an export: what was trained from what, on what, how, and with what result."""

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


def model_card(config: Mapping[str, Any], steps: int, metrics: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Returns README.md with the front matter that model hubs read. config: the run's, resolved."""
    def name(path: str) -> str:  # a local path says nothing to others, and should not leave the machine
        return path.rstrip("/").rsplit("/", 1)[-1] if path.startswith((".", "/", "~")) else path

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["orpo", "orpo_jax", "preference-optimization"]}
    model, data = config["model"]["path"], config["data"]["train"]
    if model.count("/") == 1 and not model.startswith((".", "~", "runs/")):
        front["base_model"] = model
    optim = config["optim"]
    rows = [
        ("beta", config["orpo"]["beta"]), ("optimiser", optim["name"]), ("learning rate", optim["learning_rate"]),
        ("schedule", optim["lr_scheduler_type"]), ("warm-up steps", optim["warmup_steps"]),
        ("weight decay", optim["weight_decay"]), ("gradient clipping", optim["max_grad_norm"]),
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
