"""The embedded default: its rows, its model, and that it learns."""

import json
import pathlib

import pytest

from orpo_jax import config as config_lib
from orpo_jax import preference, train

ROOT = pathlib.Path(__file__).parent.parent


def rows_of(name):
    return [json.loads(line) for line in (ROOT / "configs" / "demo_data" / name).read_text().splitlines()]


def texts_of(rows):
    """Returns prompt, chosen and rejected of each row as text."""
    flat = lambda part: part if isinstance(part, str) else "".join(message["content"] for message in part)
    return [tuple(flat(part) for part in preference.split_prompt(row, "row")) for row in rows]


def test_the_rows_are_many_mixed_and_apart():
    train_rows, held_out = rows_of("train.jsonl"), rows_of("heldout.jsonl")
    assert len(train_rows) >= 400 and len(held_out) >= 100
    for rows in (train_rows, held_out):
        kinds = {(type(row.get("prompt")), type(row["chosen"])) for row in rows}
        assert kinds == {(str, str), (type(None), str), (list, list), (type(None), list), (str, list)}
        assert all(chosen.strip() and rejected.strip() and chosen != rejected for _, chosen, rejected in texts_of(rows))
    seen, new = texts_of(train_rows), texts_of(held_out)
    for column in range(3):
        assert not {row[column] for row in seen} & {row[column] for row in new}


def test_length_does_not_give_the_preference_away():
    longer = [len(chosen) > len(rejected) for _, chosen, rejected in texts_of(rows_of("heldout.jsonl"))]
    assert 0.4 < sum(longer) / len(longer) < 0.6


def demo(tmp_path, monkeypatch, **changes):
    monkeypatch.chdir(tmp_path)
    config = config_lib.load_file(str(ROOT / "configs" / "demo.py"))
    config.update_from_flattened_dict(changes)
    return train.run(config)


def test_the_demo_starts_from_nothing(tmp_path, monkeypatch):
    demo(tmp_path, monkeypatch, **{"train.max_steps": 2, "eval.eval_strategy": "no", "eval.eval_on_start": False})
    assert (tmp_path / "runs" / "demo" / "hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_demo_learns(tmp_path, monkeypatch):
    demo(tmp_path, monkeypatch, **{"mesh.fsdp": 1, "mesh.data": 8})
    lines = [json.loads(line) for line in (tmp_path / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval_rewards/accuracies"] for line in lines if "eval_loss" in line]
    assert 0.35 < accuracy[0] < 0.65 and accuracy[-1] >= 0.9
