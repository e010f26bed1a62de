"""Whole runs: killed and resumed, finished, stopped, exported and loaded again."""

import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import orpo_jax
from orpo_jax import batching, convert, data, evaluate, hosts, program, train
from orpo_jax import config as config_lib
from orpo_jax import metrics as metrics_lib
from orpo_jax import step as step_lib

ROOT = pathlib.Path(__file__).parent.parent
TIME_FIELDS = ("tokens_per_second", "pairs_per_second", "eval_runtime", "peak_memory_gb", "data_wait_seconds",
               "mfu")


def settings(folder, model, **changes):
    """Returns a run's config as a mapping; changes are given as section__key."""
    config = {
        "output_dir": str(folder), "model": {"path": str(model)}, "data": {"max_length": 64},
        "optim": {"learning_rate": 1e-3, "warmup_steps": 3}, "train": {"batch_size": 4, "max_steps": 12},
        "checkpoint": {"save_steps": 4}, "log": {"logging_steps": 3}, "eval": {"eval_strategy": "steps"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    return config


def lines_of(folder):
    """Returns metrics.jsonl without its time fields."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


@pytest.fixture
def rows(tmp_path):
    train_rows = [row for kind in ("standard", "conversational") for row in tiny.make_rows(15, kind)]
    return {"data__train": str(tiny.write_rows(tmp_path / "train.jsonl", train_rows)),
            "data__eval": str(tiny.write_rows(tmp_path / "eval.jsonl", tiny.make_rows(7, "implicit", seed=9)))}


def start(tmp_path, config):
    """Starts the command of a config in a process of its own."""
    file = tmp_path / "config.py"
    file.write_text(f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({config!r})\n")
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "orpo_jax.train", "--config", str(file)], env=environment, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_and_restart(tmp_path, config, kills, rng):
    """Runs one command until it ends, killing it at random steps; returns how often it went on from a checkpoint."""
    metrics, resumed = pathlib.Path(config["output_dir"]) / "metrics.jsonl", 0
    for _ in range(kills):
        process, lines = start(tmp_path, config), rng.randint(5, 15)
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        while process.poll() is None:
            # A resumed run cuts the file back first, so both growth and a fresh count mean that it is under way.
            now = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            if now >= before + lines or (now and now < before):
                time.sleep(rng.random() * 0.1)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        output = process.communicate()[0]
        resumed += "going on from step" in output
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    process = start(tmp_path, config)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return resumed + ("going on from step" in output)


def test_a_longer_run_is_laid_out_in_more_row_lengths(tmp_path, model_folder, rows, one_device):
    """The held-out rows too, by how often they are evaluated."""
    def lengths(max_steps, eval_steps):
        config = settings(tmp_path, model_folder, train__max_steps=max_steps, eval__eval_steps=eval_steps,
                          eval__batch_size=4, **{**rows, "data__eval": rows["data__train"]})
        job = train.prepare(config_lib.build(config), None, None, None, None)
        return tuple(len(batches.layout.row_lengths) for batches in (job.batches, job.eval_batches[None]))

    few, (many, held_out_once) = lengths(1, 1), lengths(10_000_000, 10_000_000)
    assert few == (1, 1) and many > 1 and held_out_once == 1
    assert lengths(10_000_000, 2)[1] > 1


@pytest.mark.parametrize("unroll", [False, True])
def test_layers_are_laid_out_as_the_platform_likes(tmp_path, model_folder, rows, one_device, monkeypatch, unroll):
    monkeypatch.setattr(program, "unrolls", lambda platform: unroll)
    job = train.prepare(config_lib.build(settings(tmp_path, model_folder, **rows)), None, None, None, None)
    assert job.model.unroll == unroll


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_killed_many_times_ends_like_one_that_was_not(tmp_path, model_folder, rows, kills):
    common = rows | dict(train__max_steps=120 * kills, checkpoint__save_steps=17, checkpoint__save_total_limit=2,
                         log__logging_steps=5, eval__eval_steps=20)
    whole = settings(tmp_path / "whole", model_folder, **common)
    killed = settings(tmp_path / "killed", model_folder, **common)
    assert kill_and_restart(tmp_path, whole, 0, random.Random(0)) == 0
    assert kill_and_restart(tmp_path, killed, kills, random.Random(1)) >= kills // 2
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "killed"))
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")


def test_steps_then_resume_then_the_rest_is_bitwise_one_run(tmp_path, model_folder, rows):
    whole = settings(tmp_path / "whole", model_folder, **rows)
    train.run(whole)
    for stop in (2, 7, None):  # not at a save nor at a log line
        parts = settings(tmp_path / "parts", model_folder, **rows)
        train.run(parts, on_step=lambda step, _, stop=stop: step == stop)
        assert (tmp_path / "parts" / "hf").exists() == (stop is None)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def terminate_at(monkeypatch, owner, name, count):
    """Sends this process SIGTERM at one call of a function."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_sigterm_saves_and_the_rest_is_bitwise_one_run(tmp_path, model_folder, rows, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    whole, parts = (settings(tmp_path / name, model_folder, **rows, eval__batch_size=1) for name in ("whole", "parts"))
    train.run(whole)
    # In the fifth step; in the second batch of the evaluation at step 6, twice: it is owed from then on.
    for owner, name, count, saved in ((metrics_lib.Meter, "add", 5, "5"), (evaluate, "to_devices", 2, "6"),
                                      (evaluate, "to_devices", 2, "6")):
        with monkeypatch.context() as patch, pytest.raises(hosts.Preempted) as stop:
            terminate_at(patch, owner, name, count)
            train.run(parts)
        assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) is before
        assert max(os.listdir(tmp_path / "parts" / "checkpoints"), key=int) == saved
        assert not [line for line in lines_of(tmp_path / "parts") if line["step"] == 6 and "eval_loss" in line]
    train.run(parts)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_sigterm_before_the_first_step_ends_at_once_and_leaves_nothing(tmp_path, model_folder, rows, monkeypatch):
    terminate_at(monkeypatch, data, "load_pairs", 1)
    with pytest.raises(hosts.Preempted):
        train.run(settings(tmp_path / "run", model_folder, **rows))
    assert not (tmp_path / "run").exists()


def test_checkpoints_in_a_folder_of_their_own_outlive_the_run_s(tmp_path, model_folder, rows):
    config = settings(tmp_path / "run", model_folder, **rows, checkpoint__folder=str(tmp_path / "steps"))
    train.run(config, on_step=lambda step, _: step == 5)
    assert sorted(os.listdir(tmp_path / "steps")) == ["4", "5"] and not (tmp_path / "run" / "checkpoints").exists()
    orpo_jax.load_model(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    steps = []
    train.run(config, on_step=lambda step, _: steps.append(step))
    assert steps == list(range(6, 13))
    convert.convert(str(tmp_path / "run"), str(tmp_path / "out"))
    for name in ("README.md", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "run" / "hf" / name).read_bytes()
    with pytest.raises(ValueError, match=r"holds a run of another config .*seed"):  # whose steps are there
        train.run({**config, "seed": 1, "output_dir": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"checkpoint\.folder: the run has"):
        train.run(settings(tmp_path / "run", model_folder, **rows))
    train.run({**config, "seed": 1, "checkpoint": {**config["checkpoint"], "overwrite": True}},
              on_step=lambda step, _: step == 1)
    assert os.listdir(tmp_path / "steps") == ["1"]


def test_a_damaged_run_may_be_deleted_for_another(tmp_path, model_folder, rows):
    """Whose config.json says enough of it."""
    config = settings(tmp_path / "run", model_folder, **rows)
    train.run(config, on_step=lambda step, _: step == 1)
    (tmp_path / "run" / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    train.run({**config, "seed": 1, "checkpoint": {"overwrite": True}}, on_step=lambda step, _: step == 2)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["2"]


def test_a_bucket_needs_its_package(tmp_path, model_folder, rows, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"checkpoint\.folder: a bucket needs gcsfs, got 'gs://a/b'"):
        train.run(settings(tmp_path / "run", model_folder, **rows, checkpoint__folder="gs://a/b"))


def test_a_resume_may_change_what_moves_no_number(tmp_path, model_folder, rows):
    whole = settings(tmp_path / "whole", model_folder, **rows)
    train.run(whole)
    first = settings(tmp_path / "parts", model_folder, **rows, mesh__fsdp=2, mesh__data=4)
    train.run(first, on_step=lambda step, _: step == 5)
    second = settings(tmp_path / "parts", model_folder, **rows, mesh__fsdp=4, mesh__tensor=2, data__packing=False,
                      model__remat="full", train__rows_per_device=2)
    train.run(second)
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    for name in a:
        assert np.linalg.norm(a[name] - b[name]) <= 5e-5 * np.linalg.norm(a[name]), name


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, model_folder, rows):
    config = settings(tmp_path / "run", model_folder, **rows)
    first = train.run(config)
    snapshot = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert train.run(config) == first
    assert snapshot == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_only_the_newest_checkpoints_are_kept(tmp_path, model_folder, rows):
    train.run(settings(tmp_path / "run", model_folder, **rows, checkpoint__save_steps=2,
                       checkpoint__save_total_limit=2))
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == ["10", "12"]


def test_lines_are_exact_means_over_their_steps(tmp_path, model_folder, rows):
    """The line of several steps is their weighted mean, not a mean of means."""
    each = []
    train.run(settings(tmp_path / "run", model_folder, **rows, eval__eval_strategy="no", train__max_steps=8),
              on_step=lambda _, metrics: each.append(metrics))
    train.run(settings(tmp_path / "by_one", model_folder, **rows, eval__eval_strategy="no", train__max_steps=8,
                       log__logging_steps=1))
    lines, by_one = lines_of(tmp_path / "run"), lines_of(tmp_path / "by_one")
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert [line["step"] for line in by_one] == list(range(1, 9))
    for line, metrics in zip(by_one, each, strict=True):
        np.testing.assert_allclose(line["loss"], metrics["loss"], rtol=1e-6)
    # 4, 4 and 4 pairs in steps 4 to 6; the epoch's last step, 8, has 2.
    accuracies = [line["rewards/accuracies"] for line in by_one]
    np.testing.assert_allclose(lines[1]["rewards/accuracies"], np.mean(accuracies[3:6]), rtol=1e-6)
    np.testing.assert_allclose(lines[2]["rewards/accuracies"], np.average(accuracies[6:8], weights=[4, 2]), rtol=1e-6)
    assert lines[2]["learning_rate"] == by_one[7]["learning_rate"]
    assert lines[2]["grad_norm"] == by_one[7]["grad_norm"]
    assert lines[2]["num_tokens"] == by_one[7]["num_tokens"]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path, model_folder, rows, batch_size):
    runs = [train.run(settings(tmp_path / str(size), model_folder, **rows, train__max_steps=1, eval__batch_size=size))
            for size in (7, batch_size)]
    for name in ("eval_loss", "eval_nll_loss", "eval_rewards/accuracies", "eval_logps/rejected"):
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-5)


def test_named_held_out_sets_and_rows_from_a_program(tmp_path, model_folder, rows):
    both = {"one": rows["data__eval"], "two": rows["data__train"]}
    config = settings(tmp_path / "run", model_folder, train__max_steps=1, eval__eval_on_start=True,
                      data__train=rows["data__train"], data__eval=both)
    metrics = train.run(config)
    assert {"eval_one_loss", "eval_two_rewards/accuracies"} <= set(metrics)
    config = settings(tmp_path / "from_rows", model_folder, train__max_steps=1)
    metrics = train.run(config, train_rows=tiny.make_rows(6, "standard"), eval_rows=iter(tiny.make_rows(3, "implicit")))
    assert np.isfinite(metrics["eval_loss"])


def test_training_learns_the_preference(tmp_path, model_folder):
    train_rows, held_out = (tiny.make_rows(count, "conversational", seed) for count, seed in ((64, 0), (20, 1)))
    config = settings(tmp_path / "run", model_folder, eval__eval_on_start=True, train__max_steps=60,
                      optim__learning_rate=3e-3, orpo__beta=1.0, eval__eval_steps=60)
    train.run(config, train_rows=train_rows, eval_rows=held_out)
    accuracy = [line["eval_rewards/accuracies"] for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert accuracy[-1] >= 0.95 > accuracy[0]


def test_every_weight_moves_and_moves_by_its_own_optimizer(tmp_path, model_folder, rows):
    import optax

    ends = {}
    for name, optimizer in {"sgd": optax.sgd(1e-2), "none": optax.set_to_zero()}.items():
        train.run(settings(tmp_path / name, model_folder, **rows, train__max_steps=2), optimizer=optimizer)
        ends[name] = load_file(tmp_path / name / "hf" / "model.safetensors")
    before = load_file(model_folder / "model.safetensors")
    for name, tensor in before.items():
        assert tensor.tobytes() == ends["none"][name].tobytes()
        assert not np.array_equal(tensor, ends["sgd"][name]), name


def test_a_run_that_goes_on_must_have_the_optimizer_it_had(tmp_path, model_folder, rows):
    import optax

    config = settings(tmp_path / "run", model_folder, **rows)
    train.run(config, optimizer=optax.sgd(1e-2), on_step=lambda step, _: step == 3)
    with pytest.raises(ValueError, match=r"optimizer: must be what .* was started with, one of the program, got adamw"):
        train.run(config)
    train.run(config, optimizer=optax.sgd(1e-2))
    assert {line["learning_rate"] for line in lines_of(tmp_path / "run") if "loss" in line} == {None}  # no NaN in JSON
    assert "given by the program" in (tmp_path / "run" / "hf" / "README.md").read_text()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path, model_folder, rows):
    train.run(settings(tmp_path / "run", model_folder, **rows))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    train.run(settings(tmp_path / "run", model_folder, **rows, orpo__beta=0.9, checkpoint__overwrite=True))
    after = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [3, 3, 6, 6, 9, 9, 12, 12]


def test_a_run_without_a_checkpoint_starts_with_the_tokenizer_of_now(tmp_path, rows):
    model = tiny.write_model(tmp_path / "model", scale=0.1)

    def die(step, _):
        raise RuntimeError("a crash before the first checkpoint")

    config = settings(tmp_path / "run", model, **rows)
    with pytest.raises(RuntimeError, match="a crash"):
        train.run(config, on_step=die)
    (model / "chat_template.jinja").write_text(tiny.TEMPLATE + "{# another #}")
    train.run(config)
    assert orpo_jax.load_model(tmp_path / "run").pretrained.tokenizer.chat_template.endswith("{# another #}")


def test_a_lost_last_checkpoint_is_trained_again(tmp_path, model_folder, rows):
    first = train.run(settings(tmp_path / "run", model_folder, **rows))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    assert train.run(settings(tmp_path / "run", model_folder, **rows)) == first


# Steps of full rows


def watch_batches(monkeypatch):
    """Returns a list that gets, of every batch handed to the devices, the row counts and the pairs' responses."""
    seen, to_devices = [], batching.to_devices

    def watched(batch, mesh):
        found = []
        for group in batch.groups:
            for row, slot in zip(*np.nonzero(group.rows.pair_weights.any(-1)), strict=True):
                rows = jax.tree.map(lambda x, row=row, slot=slot: x[row, slot], group.rows)
                for pair in np.flatnonzero(rows.pair_weights):
                    found.append(tuple(tuple(rows.targets[rows.segments == 2 * pair + side].tolist())
                                       for side in (1, 2)))
        seen.append((tuple(int(group.num_micro) for group in batch.groups), found))
        return to_devices(batch, mesh)

    monkeypatch.setattr(batching, "to_devices", watched)
    return seen


FULL_ROWS = dict(train__rows_per_step=2, train__max_steps=-1, train__num_train_epochs=4.0, data__row_length=192,
                 optim__learning_rate=3e-3, log__logging_steps=1, eval__eval_strategy="no")


def test_steps_of_full_rows_train_on_every_pair_once_an_epoch(tmp_path, model_folder, rows, monkeypatch):
    seen = watch_batches(monkeypatch)
    last = train.run(settings(tmp_path / "run", model_folder, **rows | FULL_ROWS))
    pairs = [pair for _, members in seen for pair in members]
    assert len(pairs) == 4 * 30 and len(set(pairs)) == 30
    assert all(len(set(pairs[epoch * 30:(epoch + 1) * 30])) == 30 for epoch in range(4))
    # A step has as many pairs as fit, not batch_size.
    assert max(len(members) for _, members in seen) > 4 and len({len(members) for _, members in seen}) > 1

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(seen) + 1))
    for line in lines:
        assert all(np.isfinite(value) for value in line.values()), line  # None is no number either
    assert last["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["num_tokens"] == 4 * lines[len(lines) // 4 - 1]["num_tokens"]
    assert lines[-1]["epoch"] == 4.0


def test_steps_of_full_rows_resume_bitwise(tmp_path, model_folder, rows):
    changes = rows | FULL_ROWS | dict(eval__eval_strategy="epoch")
    train.run(settings(tmp_path / "whole", model_folder, **changes))
    for stop in (2, 7, None):  # in the first epoch, and in a later one
        parts = settings(tmp_path / "parts", model_folder, **changes)
        train.run(parts, on_step=lambda step, _, stop=stop: step == stop)
        assert (tmp_path / "parts" / "hf").exists() == (stop is None)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


# What a step must not wait for


def uneven_rows(count):
    """Returns rows of which some are far longer than others, so that steps take different numbers of rows."""
    rng = random.Random(0)
    return [{"prompt": tiny.sentence(rng, 1, 3), "chosen": f" good {tiny.sentence(rng, 0, size)}",
             "rejected": f" bad {tiny.sentence(rng, 0, size)}"} for size in rng.choices((1, 25), k=count)]


def test_nothing_is_compiled_after_the_first_step(tmp_path, model_folder, one_device, monkeypatch):
    seen, compiled = watch_batches(monkeypatch), []
    config = settings(tmp_path / "run", model_folder, mesh__data=1, data__row_length=80, train__rows_per_device=1,
                      train__max_steps=25, eval__eval_strategy="no")
    counter = metrics_lib.CompileCounter()
    with counter:
        train.run(config, train_rows=uneven_rows(40), on_step=lambda *_: compiled.append(counter.compiled))
    assert len({count for count, _ in seen}) > 2
    assert len(compiled) == 25 and len(set(compiled)) == 1 and compiled[0] >= 1


@pytest.fixture
def warnings(monkeypatch):
    """Returns a list that gets the run's warnings."""
    lines = []
    monkeypatch.setattr(metrics_lib.log, "warning", lambda text, *args: lines.append(text % args))
    return lines


def longer_from(step, monkeypatch):
    """Gives batches one more micro-batch of padding from a step on, as no batch of a run may."""
    to_devices, count = batching.to_devices, [0]

    def changed(batch, mesh):
        count[0] += 1
        if count[0] >= step:
            batch = jax.tree.map(lambda x: np.concatenate([x, x[:1]]) if x.ndim else x, batch)
        return to_devices(batch, mesh)

    monkeypatch.setattr(batching, "to_devices", changed)


def test_a_step_that_is_compiled_again_is_a_warning(tmp_path, model_folder, rows, one_device, warnings, monkeypatch):
    """The run's step is compiled beforehand and would refuse such a batch: here it is not."""
    monkeypatch.setattr(step_lib, "compile_to_fit", lambda make, remats, args, limit: (make("none"), "none", 0))
    longer_from(5, monkeypatch)
    train.run(settings(tmp_path / "run", model_folder, **rows, eval__eval_strategy="no", data__row_length=128))
    assert [line.split(",")[0] for line in warnings] == ["step compiled again"]
    assert warnings[0].endswith("the shapes or types of its arrays have changed")


def test_a_compiled_step_refuses_a_batch_of_other_shapes(tmp_path, model_folder, rows, monkeypatch):
    longer_from(5, monkeypatch)
    with pytest.raises(TypeError, match="differ"):
        train.run(settings(tmp_path / "run", model_folder, **rows, eval__eval_strategy="no", data__row_length=128))


def waits_of(folder):
    """Returns the seconds that the steps after the first line waited for their batches."""
    return sum(json.loads(line)["data_wait_seconds"] for line in
               (folder / "metrics.jsonl").read_text().splitlines()[1:])


def test_batches_are_made_while_the_step_runs(tmp_path, model_folder, rows, one_device, monkeypatch):
    """A step that takes longer than its batch waits for none; a batch that takes longer is waited for, and it shows."""
    def run(name, batch_seconds, step_seconds):
        monkeypatch.setattr(batching.Batches, "batch",
                            lambda self, step: (time.sleep(batch_seconds), batch(self, step))[1])
        train.run(settings(tmp_path / name, model_folder, **rows, eval__eval_strategy="no", data__row_length=128,
                           train__max_steps=8, log__logging_steps=2), on_step=lambda *_: time.sleep(step_seconds))
        return waits_of(tmp_path / name)

    batch = batching.Batches.batch
    run("first", 0.0, 0.0)  # the tokens are cached from here on
    assert run("overlapped", 0.1, 0.3) < 0.1 * 6 * 0.3
    assert run("slow", 0.3, 0.0) > 0.5 * 6 * 0.3


# Out


def test_an_export_touches_no_folder_beside_it(tmp_path, model_folder):
    for name in ("out.old", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    orpo_jax.load_model(model_folder).save(tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.old", "out.tmp"]
    assert (tmp_path / "out.old" / "mine.txt").exists() and (tmp_path / "out.tmp" / "mine.txt").exists()


def test_the_export_and_every_way_to_load_it_agree(tmp_path, model_folder, rows):
    run = tmp_path / "run"
    train.run(settings(run, model_folder, **rows))
    ids = np.arange(30).reshape(2, 15)
    expected = orpo_jax.load_model(run / "hf").logits(ids)
    for path in (run, run / "checkpoints" / "12"):
        np.testing.assert_array_equal(orpo_jax.load_model(path).logits(ids), expected)
    assert not np.allclose(orpo_jax.load_model(run / "checkpoints" / "8").logits(ids), expected)
    assert not np.allclose(orpo_jax.load_model(model_folder).logits(ids), expected)
    convert.main(["--checkpoint", str(run), "--output", str(tmp_path / "out")])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        file.name for file in (run / "hf").iterdir())
    for file in (run / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    convert.main(["--checkpoint", str(run / "checkpoints" / "8"), "--output", str(tmp_path / "half"), "--dtype",
                  "bfloat16"])
    half = orpo_jax.load_model(tmp_path / "half")
    assert set(half.dtypes.values()) == {"bfloat16"} and half.arch.config["dtype"] == "bfloat16"
    np.testing.assert_allclose(half.logits(ids), orpo_jax.load_model(run / "checkpoints" / "8").logits(ids), atol=0.3)


def test_pytorch_s_logits_of_the_export_are_ours(tmp_path, model_folder, rows):
    torch = pytest.importorskip("torch", reason="torch is the reference: a CPU build is at hand on Python 3.11 only")
    import transformers

    train.run(settings(tmp_path / "run", model_folder, **rows))
    ids = np.random.default_rng(0).integers(0, 400, (2, 40))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    with torch.no_grad():
        expected = loaded(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(orpo_jax.load_model(tmp_path / "run" / "hf").logits(ids), expected, atol=1e-4)
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_the_card_tells_what_was_done(tmp_path, model_folder, rows):
    metrics = train.run(settings(tmp_path / "run", model_folder, **rows))
    card = (tmp_path / "run" / "hf" / "README.md").read_text()
    for words in ("2403.07691", "train.jsonl", "llama", "| beta | 0.1 |", "30 preference pairs of 30 rows",
                  f"| `eval_loss` | {metrics['eval_loss']:.4g} |"):
        assert words in card, words
    assert str(tmp_path) not in card


def test_a_chat_template_of_the_config_goes_with_the_export(tmp_path, rows):
    model = tiny.write_model(tmp_path / "base", tokenizer=tiny.make_tokenizer(template=None), scale=0.1)
    (tmp_path / "template.jinja").write_text(tiny.TEMPLATE)
    train.run(settings(tmp_path / "run", model, **rows, data__chat_template=str(tmp_path / "template.jinja"),
                       train__max_steps=2))
    assert orpo_jax.load_model(tmp_path / "run" / "hf").pretrained.tokenizer.chat_template == tiny.TEMPLATE


def test_tokens_added_to_the_tokenizer_add_embedding_rows(tmp_path, rows):
    tokenizer = tiny.make_tokenizer()
    model = tiny.write_model(tmp_path / "base", tokenizer=tokenizer, scale=0.1)
    tokenizer.add_tokens([f"<new{i}>" for i in range(408 - len(tokenizer) + 3)])
    tokenizer.save_pretrained(model)
    train.run(settings(tmp_path / "run", model, **rows, train__max_steps=1),
              train_rows=[{"prompt": "the <new5>", "chosen": f" sky <new{411 - 401 - 1}>", "rejected": " old"}] * 4)
    grown = load_file(tmp_path / "run" / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(grown) == 411 == json.loads((tmp_path / "run" / "hf" / "config.json").read_text())["vocab_size"]
    before = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_allclose(grown[-1], before.mean(axis=0), atol=2e-3)


def test_trackers_go_on_with_the_run(tmp_path, model_folder, rows):
    pytest.importorskip("tensorboardX")
    config = settings(tmp_path / "run", model_folder, **rows, log__report_to=("jsonl", "tensorboard"))
    train.run(config, on_step=lambda step, _: step == 5)
    train.run(config)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2


def test_generation_stops_and_samples(model_folder):
    model = orpo_jax.load_model(model_folder)
    greedy = model.generate(["the sky", "please tell me what you think about cats"], max_new_tokens=8)
    alone = [model.generate(prompt, max_new_tokens=8)[0] for prompt in (
        "the sky", "please tell me what you think about cats")]
    assert greedy == alone  # a prompt's neighbours and its padding change nothing
    hot = {model.generate("the sky", max_new_tokens=8, temperature=1.5, seed=seed)[0] for seed in range(4)}
    assert len(hot) > 1
    assert model.generate("the sky", max_new_tokens=8, temperature=1.5, seed=1) == model.generate(
        "the sky", max_new_tokens=8, temperature=1.5, seed=1)


def test_the_config_in_the_folder_is_the_resolved_one(tmp_path, model_folder, rows):
    config = config_lib.build(settings(tmp_path / "run", model_folder, **rows))
    train.run(config)
    assert config_lib.build(json.loads((tmp_path / "run" / "config.json").read_text())) == config


def test_what_is_compiled_is_kept_beside_the_token_ids(tmp_path, model_folder, rows, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    of_tests = jax.config.jax_compilation_cache_dir
    try:
        train.run(settings(tmp_path / "run", model_folder, **rows))
        assert jax.config.jax_compilation_cache_dir == str(data.CACHE / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", of_tests)
