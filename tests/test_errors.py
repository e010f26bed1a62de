"""What a user gets wrong is said in one sentence that names the key or the file, before anything is written."""

import contextlib
import dataclasses
import gzip
import json
import logging
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import datasets
import numpy as np
import pytest
import tiny
import zstandard
from safetensors.numpy import load_file, save_file

from orpo_jax import config as config_lib
from orpo_jax import convert, data, train

ROWS = tiny.make_rows(12, "standard")
CONFIG = """
from orpo_jax.config import default

def get_config():
    config = default()
    config.model.path = "model"
    config.data.train = "rows.jsonl"
    config.data.max_length = 64
    config.output_dir = "out"
    config.data.row_length = 128
    config.train.batch_size = 4
    config.train.max_steps = 2
    config.optim.learning_rate = 1e-3
    return config
"""


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder with a config file, a model and data that would train as they are; the commands run in it."""

    folder: pathlib.Path

    model = property(lambda self: self.folder / "model")
    rows = property(lambda self: self.folder / "rows.jsonl")
    config = property(lambda self: self.folder / "run.py")
    output = property(lambda self: self.folder / "out")

    def train(self, *flags: str) -> None:
        train.main(["--config=run.py", *flags])


def write_work(folder: pathlib.Path, model: pathlib.Path) -> Work:
    work = Work(folder)
    shutil.copytree(model, work.model)
    tiny.write_rows(work.rows, ROWS)
    work.config.write_text(CONFIG)
    return work


@pytest.fixture
def work(tmp_path, model_folder, monkeypatch):
    work = write_work(tmp_path / "work", model_folder)
    monkeypatch.chdir(work.folder)
    return work


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model_folder):
    """The output of a run that was stopped, and saved, after its first step of two."""
    work = write_work(tmp_path_factory.mktemp("stopped") / "work", model_folder)
    with contextlib.chdir(work.folder):
        train.run(config_lib.from_args(["--config=run.py"]), on_step=lambda step, metrics: True)
    return work.output


@pytest.fixture
def work_with_run(stopped, work):
    shutil.copytree(stopped, work.output)
    return work


def snapshot(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Returns every path below a folder with its bytes; folders have None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if "__pycache__" not in path.parts}


def message_of(work: Work, command: Callable[[], None]) -> str:
    """Returns the sentence of the ValueError that a command raises, and asserts that it left no trace."""
    before = snapshot(work.folder)
    with pytest.raises(ValueError) as caught:
        command()
    assert snapshot(work.folder) == before
    assert not list(data.CACHE.rglob("*.tmp"))
    return str(caught.value)


def assert_says(message: str, *words: str) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, message
    assert "\n" not in message and "Traceback" not in message
    assert ": " in message


# Ways to break things: each takes the work folder and returns the flags of the command, if it needs any.

Change = Callable[[Work], object]


def flags_of(change: Change, work: Work) -> list[str]:
    args = change(work)
    return args if isinstance(args, list) else []


def flags(*values: str) -> Change:
    return lambda work: [f"--config.{value}" for value in values]


def config_line(line: str) -> Change:
    """The config file with a line more before it returns."""
    return lambda work: work.config.write_text(work.config.read_text().replace("    return", f"    {line}\n    return"))


def config_text(text: str) -> Change:
    return lambda work: work.config.write_text(text)


def train_file(name: str, content: bytes) -> Change:
    """Other training data: a file of this name and content."""
    def change(work: Work) -> list[str]:
        (work.folder / name).write_bytes(content)
        return [f"--config.data.train={name}"]
    return change


def train_rows(*rows: object) -> Change:
    return train_file("some.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def model_json(**changes: object) -> Change:
    """config.json with some fields changed; None takes one out."""
    def change(work: Work) -> None:
        file = work.model / "config.json"
        fields = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return change


def model_file(name: str, content: str | bytes | None) -> Change:
    """A file of the model replaced, or taken out."""
    def change(work: Work) -> None:
        if content is None:
            (work.model / name).unlink()
        else:
            (work.model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def tokenizer(**changes: str | None) -> Change:
    def change(work: Work) -> None:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (work.model / file).unlink(missing_ok=True)
        tiny.make_tokenizer(**changes).save_pretrained(work.model)
    return change


def both(*changes: Change) -> Change:
    return lambda work: [flag for change in changes for flag in flags_of(change, work)]


def tensors(edit: Callable[[dict], object]) -> Change:
    def change(work: Work) -> None:
        file = work.model / "model.safetensors"
        found = load_file(file)
        edit(found)
        save_file(found, file)
    return change


def misfit(found: dict) -> None:
    del found["model.norm.weight"]
    found["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 16), np.float32)
    found["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)


def three_heads(found: dict) -> None:
    for name in found:
        if "k_proj" in name or "v_proj" in name:
            found[name] = np.zeros((24, 32), np.float32)


def cut(name: str, share: float = 0.5) -> Change:
    def change(work: Work) -> None:
        file = work.folder / name
        os.truncate(file, int(file.stat().st_size * share))
    return change


def two_files(work: Work) -> None:
    """The same tensor in two files of one index."""
    found = load_file(work.model / "model.safetensors")
    half = sorted(found)[:len(found) // 2]
    parts = [{name: found[name] for name in half}, {name: found[name] for name in found if name not in half[1:]}]
    (work.model / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, work.model / name)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (work.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def only_pickle(work: Work) -> None:
    (work.model / "model.safetensors").rename(work.model / "pytorch_model.bin")


def cut_parquet(work: Work) -> list[str]:
    datasets.Dataset.from_list(ROWS).to_parquet(str(work.folder / "rows.parquet"))
    cut("rows.parquet")(work)
    return ["--config.data.train=rows.parquet"]


def dataset_dict(work: Work) -> list[str]:
    datasets.DatasetDict(train_prefs=datasets.Dataset.from_list(ROWS)).save_to_disk(str(work.folder / "saved"))
    return ["--config.data.train=saved"]


def foreign_files(work: Work) -> None:
    work.output.mkdir()
    (work.output / "thesis.txt").write_text("years of work")


def foreign_model(work: Work) -> None:
    shutil.copytree(work.model, work.output)


LINES = [json.dumps(row) for row in ROWS]
TALK = {"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}]}
LONG = {"prompt": "the sky", "chosen": " blue" * 400, "rejected": " green"}
INDEX = "model.safetensors.index.json"

# name: (what is broken, the words that the message must hold)
BEFORE_A_RUN = {
    # the config
    "a mistyped key in a file": (config_line("config.optim.learning_rat = 1"), [
        "run.py", "learning_rat", "did you mean optim.learning_rate?"]),
    "a mistyped section in a file": (config_line("config.optm.learning_rate = 1"), [
        "run.py", "optm", "did you mean optim?"]),
    "a mistyped key in a flag": (flags("optim.learning_rat=1"), [
        "--config.optim.learning_rat", "did you mean optim.learning_rate?"]),
    "a flag without its section": (flags("learning_rate=1"), ["learning_rate", "did you mean optim.learning_rate?"]),
    "a section as a flag": (flags("optim=1"), ["--config.optim", "no such key"]),
    "another flag": (lambda work: ["--epochs=3"], ["--epochs", "no such flag", "--config.section.key=value"]),
    "a flag without a value": (flags("seed"), ["--config.seed", "needs a value"]),
    "a word for a number": (flags("train.batch_size=eight"), ["train.batch_size", "must be int", "'eight'"]),
    "a fraction for a whole number": (flags("train.batch_size=2.5"), ["train.batch_size", "must be int", "2.5"]),
    "an unknown choice": (flags("optim.name=adam"), ["optim.name", "'adamw'", "'adafactor'", "'adam'"]),
    "a number out of range": (flags("orpo.beta=-1"), ["orpo.beta", "at least 0", "-1"]),
    "a length out of range": (flags("data.max_prompt_length=64"), ["data.max_prompt_length", "less than", "64"]),
    "an unknown tracker": (flags("log.report_to=jsonl,mlflow"), ["log.report_to", "tensorboard", "mlflow"]),
    "evaluation without data": (flags("eval.eval_strategy=steps"), ["eval.eval_strategy", "data.eval"]),
    "a wrong type in a file": (config_line("config.train.batch_size = 'eight'"), ["run.py", "batch_size"]),
    "a wrong type in a section of a file": (config_line("config.data.max_prompt_length = 'ten'"), [
        "data.max_prompt_length", "int", "'ten'"]),
    "a value for a section in a file": (config_line("config.optim = 'adamw'"), ["run.py", "optim"]),
    "a config file without get_config": (config_text("config = 1"), ["run.py", "get_config"]),
    "a get_config that returns nothing": (config_text("def get_config(): pass"), ["run.py", "ConfigDict"]),
    "a config file that is not Python": (config_text("optim: {lr: 1"), ["run.py"]),
    "a config file that fails": (config_text("def get_config(): return defaults()"), ["run.py", "defaults"]),
    "a config file of another kind": (lambda work: [
        "--config", work.config.rename("run.yaml").name], ["run.yaml", ".py"]),
    "no model": (flags("model.path="), ["model.path", "folder or a hub id"]),
    "no data": (flags("data.train="), ["data.train"]),
    "no output": (flags("output_dir="), ["output_dir", "folder"]),
    # the data
    "a missing data file": (flags("data.train=/nowhere/rows.jsonl"), ["data.train", "/nowhere/rows.jsonl", "no such"]),
    "a missing held-out file": (flags("data.eval=/nowhere/rows.jsonl"), ["data.eval", "/nowhere/rows.jsonl"]),
    "an unknown kind of file": (train_file("rows.txt", b"x"), ["data.train", "rows.txt", ".jsonl", ".parquet"]),
    "an empty data file": (train_file("some.jsonl", b""), ["some.jsonl", "no pair"]),
    "binary data": (train_file("some.jsonl", bytes(range(256)) * 4), ["data.train", "some.jsonl"]),
    "invalid JSON on line 3": (train_file("some.jsonl", "\n".join([*LINES[:2], LINES[2][:-9], *LINES[3:]]).encode()), [
        "some.jsonl, line 3", "not valid JSON"]),
    "a JSON array cut short": (train_file("some.json", json.dumps(ROWS).encode()[:-30]), [
        "data.train", "some.json", "not valid JSON"]),
    "a parquet file cut short": (cut_parquet, ["data.train", "rows.parquet", "corrupted"]),
    "a gzip file cut short": (train_file("rows.jsonl.gz", gzip.compress(b"\n".join(map(str.encode, LINES)))[:-20]), [
        "data.train", "rows.jsonl.gz", "can't be read"]),
    "a zst file cut short": (train_file("rows.jsonl.zst", zstandard.compress(
        b"\n".join(map(str.encode, LINES)), level=1)[:-20]), ["data.train", "rows.jsonl.zst"]),
    "a missing column": (train_rows(ROWS[0], {"prompt": "a", "chosen": "b"}), [
        "some.jsonl, line 2", "rejected", "prompt, chosen"]),
    "a missing column of a csv": (train_file("some.csv", b"prompt,accepted,rejected\na,b,c\n"), [
        "some.csv, row 1", "chosen", "prompt, accepted, rejected"]),
    "a wrong type in a row": (train_rows(ROWS[0], ROWS[1], {**ROWS[2], "chosen": 3}), [
        "some.jsonl, line 3", "chosen", "string or a list of messages", "3"]),
    "a row that is no object": (train_rows(ROWS[0], [1, 2]), ["some.jsonl, line 2", "object"]),
    "a message without content": (train_rows({**TALK, "prompt": [{"role": "user"}]}), ["some.jsonl, line 1", "prompt"]),
    "an unknown split": (dataset_dict, ["data.train_split", "train_prefs", "'train'"]),
    "an over-long row that must not be": (both(train_rows(ROWS[0], LONG), flags("data.overlong=error")), [
        "some.jsonl, line 2", "data.max_length", "64", "data.overlong"]),
    "nothing but identical rows": (train_rows({"prompt": "a", "chosen": " b", "rejected": " b"}), [
        "some.jsonl", "no pair is left"]),
    "a row length below the data": (flags("data.row_length=8"), ["data.row_length", "8", "'auto'"]),
    # the tokenizer
    "messages without a template": (both(tokenizer(template=None), train_rows(TALK)), [
        "some.jsonl, line 1", "chat template", "data.chat_template"]),
    "a template file that is missing": (flags("data.chat_template=chat.jinja"), ["data.chat_template", "chat.jinja"]),
    "a template that is not Jinja": (both(train_rows(TALK), flags("data.chat_template={% for %}")), ["chat template"]),
    "a tokenizer without EOS": (tokenizer(eos=None), ["model", "eos_token", "tokenizer_config.json"]),
    "no tokenizer": (both(model_file("tokenizer.json", None), model_file("tokenizer_config.json", None)), [
        "model", "tokenizer"]),
    "a tokenizer cut short": (cut("model/tokenizer.json"), ["model", "tokenizer"]),
    "another model's tokenizer": (lambda work: tiny.write_model(work.model, vocab_size=300), [
        "data.train", "vocab_size (300)", "tokenizer"]),
    "positions past the model's": (both(train_rows(LONG), flags("data.max_length=512")), [
        "data.train", "256", "data.max_length"]),
    # the model
    "a missing model": (flags("model.path=/nowhere/model"), ["model.path", "/nowhere/model"]),
    "a file as the model": (flags("model.path=./rows.jsonl"), ["model.path", "rows.jsonl"]),
    "no hub id": (flags("model.path=a/b/c"), ["model.path", "'a/b/c'"]),
    "no config.json": (model_file("config.json", None), ["config.json", "no such file", "model.path"]),
    "a config.json that is not JSON": (model_file("config.json", "{model_type: llama}"), ["config.json", "JSON"]),
    "a config.json of binary data": (model_file("config.json", bytes(range(256))), ["config.json", "JSON"]),
    "a config.json with a list": (model_file("config.json", "[1]"), ["config.json", "object"]),
    "a generation_config.json that is not JSON": (model_file("generation_config.json", "{"), [
        "generation_config.json", "JSON"]),
    "an unknown model_type": (model_json(model_type="mamba"), ["config.json", "model_type", "llama", "'mamba'"]),
    "no model_type": (model_json(model_type=None), ["config.json", "model_type", "llama"]),
    "an unknown rope_type": (model_json(rope_scaling={"rope_type": "spiral", "factor": 2.0}), [
        "config.json", "rope_type", "yarn", "'spiral'"]),
    "a rope without its factor": (model_json(rope_scaling={"rope_type": "linear"}), ["config.json", "factor"]),
    "an unknown hidden_act": (model_json(hidden_act="snake"), ["config.json", "hidden_act", "silu", "'snake'"]),
    "a field that changes numbers": (model_json(attn_logit_softcapping=30.0), [
        "config.json", "attn_logit_softcapping", "not supported", "30.0"]),
    "a wrong type in config.json": (model_json(hidden_size="wide"), ["config.json", "hidden_size"]),
    "heads that do not divide": (both(model_json(num_key_value_heads=3), tensors(three_heads)), [
        "config.json", "num_attention_heads", "num_key_value_heads"]),
    # the weights
    "weights cut short": (cut("model/model.safetensors"), ["model.safetensors", "not a whole safetensors file",
                                                           "again"]),
    "weights of no bytes": (cut("model/model.safetensors", 0), ["model.safetensors", "not a whole safetensors file"]),
    "a missing tensor": (tensors(lambda found: found.pop("model.norm.weight")), ["missing: model.norm.weight"]),
    "an unexpected tensor": (tensors(lambda found: found.update(extra=np.zeros(1))), ["unexpected: extra"]),
    "tensors of every misfit": (tensors(misfit), [
        "missing: model.norm.weight", "unexpected: model.layers.2.mlp.up_proj.weight",
        "shape of model.layers.0.self_attn.q_proj.weight: expected [32, 32], got [32, 16]"]),
    "a tensor of integers": (tensors(lambda found: found.update(
        {"model.norm.weight": found["model.norm.weight"].astype(np.int8)})), ["type of model.norm.weight", "I8"]),
    "a tensor in two files": (two_files, ["model-00002-of-00002.safetensors", "lm_head.weight",
                                          "model-00001-of-00002.safetensors", "keep one"]),
    "an index that leaves the folder": (model_file(INDEX, json.dumps({"weight_map": {"a": "../x.safetensors"}})), [
        INDEX, "own folder", "../x.safetensors"]),
    "an index that names a missing file": (model_file(INDEX, json.dumps({"weight_map": {"a": "x.safetensors"}})), [
        "x.safetensors", "no such file"]),
    "an index that is not JSON": (model_file(INDEX, "{"), [INDEX, "weight_map"]),
    "an index with a list": (model_file(INDEX, "[]"), [INDEX, "weight_map"]),
    "an index with a number for a file": (model_file(INDEX, json.dumps({"weight_map": {"a": 3}})), [
        "model", "3"]),
    "only a pickle": (only_pickle, ["model.safetensors", "safetensors"]),
    # the mesh
    "a mesh that does not divide the devices": (flags("mesh.fsdp=3"), ["mesh", "number of devices (8)", "mesh.fsdp=3"]),
    "a mesh of too few devices": (flags("mesh.fsdp=4"), ["mesh", "number of devices (8)", "-1"]),
    "a mesh with two rests": (flags("mesh.data=-1"), ["mesh", "at most one axis may be -1"]),
    "a mesh that does not divide a weight": (flags("mesh.fsdp=1", "mesh.tensor=8"), [
        "mesh.tensor", "attn/q", "which is 4", "divisor"]),
    # the output
    "output among foreign files": (foreign_files, ["output_dir", "must be empty or hold a run", "thesis.txt",
                                                   "choose another"]),
    "output over a model": (foreign_model, ["output_dir", "must be empty or hold a run"]),
    "output over foreign files by force": (both(foreign_files, flags("checkpoint.overwrite=True")), [
        "output_dir", "must be empty or hold a run"]),
    "a file as the output": (lambda work: work.output.write_text("x"), ["output_dir", "folder"]),
    "output below a file": (flags("output_dir=rows.jsonl/out"), ["output_dir"]),
}


@pytest.mark.parametrize(("change", "words"), BEFORE_A_RUN.values(), ids=BEFORE_A_RUN)
def test_bad_input_is_named_before_anything_is_written(work, change, words):
    args = flags_of(change, work)
    assert_says(message_of(work, lambda: work.train(*args)), *words)


@pytest.mark.parametrize("package", ["tensorboardX", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(work, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.removesuffix("X")
    message = message_of(work, lambda: work.train(f"--config.log.report_to=jsonl,{name}"))
    assert_says(message, "log.report_to", f"pip install {package}")


def test_a_missing_config_file_is_named(work):
    work.config.unlink()
    assert_says(message_of(work, work.train), "--config", "no such file", "run.py")
    assert_says(message_of(work, lambda: train.main([])), "--config", "configs/")


# A folder that holds a run


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut_largest(work: Work) -> None:
    file = largest(work.output / "checkpoints" / "1" / "state")
    os.truncate(file, file.stat().st_size // 10)


def cut_all(work: Work) -> None:
    for file in (work.output / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def lose_largest(work: Work) -> None:
    largest(work.output / "checkpoints" / "1" / "state").unlink()


def lose_state(work: Work) -> None:
    shutil.rmtree(work.output / "checkpoints" / "1" / "state")


def cut_meta(work: Work) -> None:
    file = largest(work.output / "checkpoints" / "1" / "meta")
    os.truncate(file, file.stat().st_size // 2)


def rows(changed: list) -> Change:
    return lambda work: tiny.write_rows(work.rows, changed)


def cut_run_config(work: Work) -> None:
    os.truncate(work.output / "config.json", 20)


BROKEN_CHECKPOINTS = {"its files cut short": cut_all, "no state": lose_state, "its meta data cut short": cut_meta}
OVER_A_RUN = {
    "another config": (flags("optim.learning_rate=0.5", "orpo.beta=0.3"), [
        "output_dir", "optim.learning_rate: the run has 0.001, this command has 0.5",
        "orpo.beta: the run has 0.1, this command has 0.3", "checkpoint.overwrite"]),
    "a run that may not be resumed": (flags("checkpoint.resume=False"), [
        "output_dir", "checkpoint.resume", "checkpoint.overwrite"]),
    "changed data": (rows(ROWS[1:]), ["data.train", "changed", "output_dir"]),
    "data of another order": (rows(ROWS[::-1]), ["data.train", "changed", "output_dir"]),
    "missing data": (lambda work: work.rows.unlink(), ["data.train", "rows.jsonl"]),
    "a config cut short": (cut_run_config, ["output_dir", "must be empty or hold a run"]),
    **{f"a checkpoint with {name}": (change, ["checkpoints/1", "can't be read", "move this folder away"])
       for name, change in {**BROKEN_CHECKPOINTS, "its largest file cut short": cut_largest,
                            "its largest file missing": lose_largest}.items()},
}


@pytest.mark.parametrize(("change", "words"), OVER_A_RUN.values(), ids=OVER_A_RUN)
def test_a_run_that_can_not_go_on_is_left_as_it_is(work_with_run, change, words):
    args = flags_of(change, work_with_run)
    assert_says(message_of(work_with_run, lambda: work_with_run.train(*args)), *words)


def test_overwriting_deletes_nothing_while_the_new_run_is_wrong(work_with_run):
    args = ["--config.checkpoint.overwrite=True", "--config.orpo.beta=0.3", "--config.data.train=/nowhere.jsonl"]
    assert_says(message_of(work_with_run, lambda: work_with_run.train(*args)), "data.train", "/nowhere.jsonl")


def test_a_run_that_is_left_alone_goes_on(work_with_run):
    """The counterpart of the errors above: without a fault, the same command goes on, and then has nothing to do."""
    work_with_run.train()
    assert (work_with_run.output / "hf" / "model.safetensors").is_file()
    before = snapshot(work_with_run.output)
    work_with_run.train()
    assert snapshot(work_with_run.output) == before


# Converting


def convert_to(output: str, source: str = "out") -> Change:
    return lambda work: ["--checkpoint", source, "--output", output]


CONVERSIONS = {
    "a path that is not there": (convert_to("hf", "nowhere"), ["--checkpoint", "checkpoints/STEP", "nowhere"]),
    "a folder that is no run": (convert_to("hf", "model"), ["--checkpoint", "checkpoints/STEP", "model"]),
    "a step that is not there": (convert_to("hf", "out/checkpoints/7"), ["checkpoints/7", "no such"]),
    "a folder with files as the output": (convert_to("model"), [
        "model", "must not exist or be empty", "choose another"]),
    "a file as the output": (convert_to("rows.jsonl"), ["rows.jsonl", "folder"]),
    **{f"a checkpoint with {name}": (lambda work, change=change: change(work) or convert_to("hf")(work), [
        "checkpoints/1", "can't be read"]) for name, change in BROKEN_CHECKPOINTS.items()},
}


@pytest.mark.parametrize(("change", "words"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_conversion_that_can_not_be_is_named_and_writes_nothing(work_with_run, change, words):
    args = flags_of(change, work_with_run)
    assert_says(message_of(work_with_run, lambda: convert.main(args)), *words)


# The command line


@pytest.mark.parametrize("command", [train.main, convert.main])
def test_a_users_mistake_is_one_line_on_stderr_and_exit_code_1(command, work, monkeypatch, capsys):
    args = {train.main: ["--config", "nowhere.py"],
            convert.main: ["--checkpoint", "nowhere", "--output", str(work.output)]}[command]
    monkeypatch.setattr(sys, "argv", ["command", *args])
    with pytest.raises(SystemExit) as caught:
        config_lib.main_errors(command)
    assert caught.value.code == 1
    assert re.fullmatch(r"error: --c.*nowhere.*\n", capsys.readouterr().err)


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch):
    def broken(args):
        raise AssertionError("only a bug")

    with pytest.raises(AssertionError, match="only a bug"):
        config_lib.main_errors(broken)


def test_the_real_command_shows_no_traceback(work):
    project = str(pathlib.Path(train.__file__).parents[1])
    result = subprocess.run([sys.executable, "-m", "orpo_jax.train", "--config=run.py",
                             "--config.data.train=/nowhere/rows.jsonl"], capture_output=True, text=True, check=False,
                            env={**os.environ, "PYTHONPATH": project})
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "/nowhere/rows.jsonl" in lines[0]
    assert result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.stderr and not result.stdout
    assert not work.output.exists()


# What is no error


@pytest.fixture
def logged():
    """The messages of the project's own logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("orpo_jax")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("special", [{"bos": None, "pad": None}, {"pad": "<eos>"}],
                         ids=["no bos and no pad", "pad is eos"])
def test_odd_rows_and_tokenizers_run_and_are_counted(work, logged, special):
    tokenizer(**special)(work)
    odd = [{"prompt": "a", "chosen": " same", "rejected": " same"}, {"prompt": "a", "chosen": "", "rejected": " b"},
           {"prompt": "a", "chosen": " b", "rejected": "  \n"}, {**LONG, "chosen": " blue" * 90}]
    tiny.write_rows(work.rows, ROWS[:4] + odd)
    work.train()
    counted = next(message for message in logged if "identical" in message)
    assert "8 rows; identical 1 (drop), empty 2 (drop), over-long 1 (truncate); 5 pairs" in counted
    assert logged.index(counted) < next(i for i, message in enumerate(logged) if message.startswith("step "))
    line = json.loads((work.output / "metrics.jsonl").read_text().splitlines()[0])
    assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    assert line["truncated_fraction"] == pytest.approx(1 / 5)


def test_identical_and_empty_rows_may_be_kept(work, logged):
    rows = [{"prompt": "a", "chosen": " same", "rejected": " same"}, {"prompt": "a", "chosen": "", "rejected": " b"},
            {"prompt": "", "chosen": "", "rejected": ""}, {"prompt": "", "chosen": "", "rejected": " b"}]
    tiny.write_rows(work.rows, rows)
    tokenizer(bos=None)(work)
    work.train("--config.data.identical=keep", "--config.data.empty=keep")
    assert any("4 rows; identical 2 (keep), empty 3 (keep), over-long 0 (truncate); 4 pairs" in message
               for message in logged)
    line = json.loads((work.output / "metrics.jsonl").read_text().splitlines()[0])
    assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
