"""The schema: its defaults, its rules, how files and flags edit it; and which module may import which."""

import ast
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import typing

import ml_collections
import pytest

from orpo_jax import config as config_lib
from orpo_jax.config import FIELDS, Config, build, default, differences, from_args, load_file, to_dict

PROJECT = pathlib.Path(__file__).parents[1]
# What has no default: the paths of a run.
PATHS = {"model": {"path": "model"}, "data": {"train": "rows.jsonl"}, "output_dir": "out"}


def make(**values):
    """Returns the config of some dotted keys ('__' for the dot) over the defaults."""
    tree = json.loads(json.dumps(PATHS))
    for key, value in values.items():
        *sections, leaf = key.split("__")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    return build(tree)


def lookup(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def file(tmp_path):
    """A config file with the paths set."""
    path = tmp_path / "run.py"
    path.write_text("from orpo_jax.config import default\n\ndef get_config():\n    config = default()\n"
                    "    config.model.path, config.data.train, config.output_dir = 'model', 'rows.jsonl', 'out'\n"
                    "    config.optim.learning_rate = 5e-6\n    return config\n")
    return path


# Defaults


@pytest.mark.parametrize(("key", "value"), {
    "orpo.beta": 0.1, "optim.learning_rate": 1e-6, "optim.lr_scheduler_type": "linear", "optim.warmup_steps": 0,
    "optim.warmup_ratio": 0.0, "optim.weight_decay": 0.0, "optim.adam_beta1": 0.9, "optim.adam_beta2": 0.999,
    "optim.adam_epsilon": 1e-8, "optim.max_grad_norm": 1.0, "train.num_train_epochs": 3.0, "train.max_steps": -1,
    "train.batch_size": 8, "eval.batch_size": 8, "checkpoint.save_steps": 500, "checkpoint.save_total_limit": None,
    "seed": 42, "data.max_length": 1024, "data.max_completion_length": None, "data.truncation_mode": "keep_end",
    "data.dataset_num_proc": None, "eval.eval_strategy": "no", "eval.eval_steps": None, "eval.eval_on_start": False,
    "log.run_name": None,
    # TRL's are 128 and 500: see the design.
    "data.max_prompt_length": None, "log.logging_steps": 10,
}.items())
def test_defaults_are_trl_s(key, value):
    got = lookup(make(), key)
    assert got == value and type(got) is type(value)


def test_every_default_passes_its_own_rule_and_has_its_type():
    assert build(PATHS) == build({**default().to_dict(), "output_dir": "out",
                                  "model": {"path": "model"}, "data": {"train": "rows.jsonl"}})
    for key, field in FIELDS.items():
        assert config_lib._matches(lookup(make(), key), field.type), key


def test_only_paths_have_no_default():
    for section, key in (("model", "path"), ("data", "train"), (None, "output_dir")):
        tree = json.loads(json.dumps(PATHS))
        if section:
            del tree[section]
        elif key in tree:
            del tree[key]
        if (section, key) == ("data", "train"):
            continue  # rows may be handed over instead: `train.run(config, train_rows=...)`
        with pytest.raises(ValueError, match=f"{section + '.' if section else ''}{key}: must name"):
            build(tree)


# Files


def test_the_config_dict_is_locked_and_typed():
    config = default()
    with pytest.raises(AttributeError, match="learning_rat"):
        config.optim.learning_rat = 1.0
    with pytest.raises(AttributeError):
        config.extra = 1
    with pytest.raises(TypeError):
        config.train.batch_size = "eight"
    config.train.batch_size = 16
    config.optim.max_grad_norm = None
    config.eval.eval_steps = 5
    assert (config.train.batch_size, config.optim.max_grad_norm, config.eval.eval_steps) == (16, None, 5)


def test_a_file_may_set_dicts_and_tuples_and_each_default_is_fresh():
    config = default()
    config.update(PATHS)
    config.optim.lr_scheduler_type = "polynomial"
    config.optim.lr_scheduler_kwargs = {"power": 2.0}
    config.log.report_to = ("jsonl", "tensorboard")
    config.data.eval = {"a": "a.jsonl"}
    built = build(config)
    assert built.optim.lr_scheduler_kwargs == {"power": 2.0} and built.data.eval == {"a": "a.jsonl"}
    assert built.log.report_to == ("jsonl", "tensorboard")
    assert default().to_dict()["optim"]["lr_scheduler_kwargs"] == {} and default().log.report_to == ("jsonl",)


def test_what_a_file_sets_is_kept_and_a_flag_wins(file):
    assert from_args(["--config", str(file)]).optim.learning_rate == 5e-6
    assert from_args([f"--config={file}", "--config.orpo.beta=0.2"]).optim.learning_rate == 5e-6
    assert from_args([f"--config={file}", "--config.optim.learning_rate", "1e-5"]).optim.learning_rate == 1e-5


def test_a_partial_config_dict_is_enough(tmp_path):
    file = tmp_path / "run.py"
    file.write_text("import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict("
                    "{'model': {'path': 'm'}, 'data': {'train': 'r'}, 'output_dir': 'o', 'orpo': {'beta': 1}})\n")
    config = from_args(["--config", str(file), "--config.train.batch_size=4"])
    assert config == make(model__path="m", data__train="r", output_dir="o", orpo__beta=1.0, train__batch_size=4)
    assert isinstance(config.orpo.beta, float)
    assert build(ml_collections.ConfigDict(PATHS)) == make()


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_config_that_is_shipped_builds(path):
    assert isinstance(build(load_file(str(path))), Config)


# Flags


@pytest.mark.parametrize(("flag", "value"), [
    ("train.batch_size=16", 16),
    ("train.max_steps=-1", -1),
    ("optim.learning_rate=1e-5", 1e-5),
    ("optim.learning_rate=1", 1.0),
    ("train.num_train_epochs=.5", 0.5),
    ("data.shuffle=False", False),
    ("data.shuffle=true", True),
    ("model.path=42", "42"),
    ("model.path=a=b", "a=b"),
    ("data.chat_template={{ messages }}", "{{ messages }}"),
    ("model.revision=None", None),
    ("model.revision=1.0", "1.0"),
    ("optim.max_grad_norm=None", None),
    ("optim.max_grad_norm=2", 2.0),
    ("data.max_prompt_length=None", None),
    ("data.max_prompt_length=100", 100),
    ("data.row_length=auto", "auto"),
    ("data.row_length=2048", 2048),
    ("train.rows_per_device=auto", "auto"),
    ("train.rows_per_device=2", 2),
    ("optim.name=lion", "lion"),
    ("log.report_to=jsonl,tensorboard", ("jsonl", "tensorboard")),
    ("log.report_to=('jsonl', 'tensorboard')", ("jsonl", "tensorboard")),
    ("log.report_to=[\"jsonl\"]", ("jsonl",)),
    ("log.report_to=jsonl", ("jsonl",)),
    ("log.report_to=", ()),
    ("data.eval=held_out.jsonl", "held_out.jsonl"),
    ("data.eval={'a': 'a.jsonl', 'b': 'b.jsonl'}", {"a": "a.jsonl", "b": "b.jsonl"}),
    ("data.eval=None", None),
    ("eval.generate.temperature=0.5", 0.5),
    ("seed=7", 7),
])
def test_a_flag_has_the_type_of_its_field(file, flag, value):
    got = lookup(from_args([f"--config={file}", f"--config.{flag}"]), flag.partition("=")[0])
    assert got == value and (type(got) is type(value) or isinstance(value, float))


def test_a_flag_may_hold_a_dict(file):
    config = from_args([f"--config={file}", "--config.optim.lr_scheduler_type=polynomial",
                        "--config.optim.lr_scheduler_kwargs={'power': 2.0}"])
    assert config.optim.lr_scheduler_kwargs == {"power": 2.0}


def spelled(value):
    """Returns the text of a flag for a value."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("key", FIELDS)
def test_every_default_survives_being_given_as_a_flag(file, key):
    base = from_args([f"--config={file}"])
    assert from_args([f"--config={file}", f"--config.{key}={spelled(lookup(base, key))}"]) == base


@pytest.mark.parametrize("flag", ["train.batch_size=None", "train.batch_size=1e3", "train.batch_size=True",
                                  "data.shuffle=1", "data.shuffle=yes", "optim.learning_rate=fast",
                                  "optim.learning_rate=True", "data.row_length=long", "data.max_prompt_length=auto",
                                  "optim.name=None", "model.dtype=float16", "optim.lr_scheduler_kwargs=power",
                                  "train.batch_size=__import__('os').getpid()"])
def test_a_flag_of_another_type_names_its_key(file, flag):
    with pytest.raises(ValueError, match=rf"^--config\.{re.escape(flag.partition('=')[0])}: must be "):
        from_args([f"--config={file}", f"--config.{flag}"])


# Rules


@pytest.mark.parametrize(("key", "value"), [
    ("data.max_length", 1), ("data.max_prompt_length", 0), ("data.max_prompt_length", 1024),
    ("data.max_completion_length", 0), ("data.max_completion_length", 2000), ("data.row_length", 1),
    ("data.dataset_num_proc", 0), ("data.eval", {"a": 3}), ("data.truncation_mode", "keep_middle"),
    ("data.overlong", "ignore"), ("data.identical", "error"), ("data.empty", None),
    ("orpo.beta", -0.1), ("orpo.beta", float("nan")), ("orpo.nll_scope", "prompt"), ("orpo.nll_reduction", "sum"),
    ("optim.learning_rate", -1e-6), ("optim.learning_rate", float("nan")), ("optim.learning_rate", float("inf")),
    ("optim.warmup_steps", -1), ("optim.warmup_ratio", -0.1), ("optim.warmup_ratio", 1.1),
    ("optim.weight_decay", -0.1), ("optim.adam_beta1", 1.0), ("optim.adam_beta2", 1.0), ("optim.adam_beta1", -0.1),
    ("optim.adam_beta2", -0.1), ("optim.adam_epsilon", 0.0), ("optim.max_grad_norm", 0.0),
    ("optim.mu_dtype", "float16"),
    ("optim.lr_scheduler_kwargs", {"power": 2.0}), ("optim.lr_scheduler_type", "exponential"),
    ("train.batch_size", 0), ("train.max_steps", 0), ("train.max_steps", -2), ("train.num_train_epochs", 0.0),
    ("train.num_train_epochs", float("inf")), ("train.rows_per_device", 0), ("mesh.data", 0), ("mesh.fsdp", -2),
    ("mesh.tensor", 0), ("eval.batch_size", 0), ("eval.eval_steps", 0),
    ("eval.generate.num_samples", -1), ("eval.generate.max_new_tokens", 0), ("eval.generate.temperature", -0.1),
    ("checkpoint.save_steps", 0), ("checkpoint.save_total_limit", 0), ("log.logging_steps", 0),
    ("log.report_to", ("mlflow",)), ("seed", -1), ("seed", 2**32), ("model.path", ""), ("output_dir", ""),
    ("model.dtype", "float16"), ("model.param_dtype", "float16"), ("model.remat", "some"), ("model.attention", "fast"),
])
def test_a_value_against_its_rule_names_its_key(key, value):
    with pytest.raises(ValueError, match=f"^{key}: .*, got ") as caught:
        make(**{key.replace(".", "__"): value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "sgd"])
def test_a_type_is_only_for_a_first_moment_that_has_one(name):
    with pytest.raises(ValueError, match=rf"^optim.mu_dtype: must be 'auto' with optim.name='{name}', .* 'bfloat16'"):
        make(optim__name=name, optim__mu_dtype="bfloat16")
    make(optim__name=name), make(optim__name="lion", optim__mu_dtype="bfloat16")


def test_two_rests_on_a_mesh_are_an_error():
    with pytest.raises(ValueError, match=r"^mesh: at most one axis may be -1"):
        make(mesh__data=-1)


@pytest.mark.parametrize("values", [
    dict(train__max_steps=5, train__num_train_epochs=0.0), dict(optim__adam_beta1=0.0), dict(orpo__beta=0.0),
    dict(optim__max_grad_norm=None), dict(optim__learning_rate=0.0), dict(seed=2**32 - 1), dict(train__batch_size=1),
    dict(eval__eval_strategy="steps", data__eval="x"), dict(optim__warmup_ratio=1.0), dict(data__max_length=2),
    dict(optim__lr_scheduler_type="cosine", optim__lr_scheduler_kwargs={"num_cycles": 0.5}), dict(log__report_to=()),
])
def test_values_at_the_edge_of_their_rule_are_fine(values):
    make(**values)


@pytest.mark.parametrize(("key", "meant"), [
    ("optim.learning_rat", "optim.learning_rate"), ("lr_scheduler_type", "optim.lr_scheduler_type"),
    ("opt.learning_rate", "optim.learning_rate"), ("beta", "orpo.beta"), ("training.batch_size", "train.batch_size"),
    ("seeed", "seed"), ("data.max_lenght", "data.max_length"), ("batchsize", "train.batch_size or eval.batch_size"),
    ("train_name", "data.train_name"), ("orpo_beta", "orpo.beta"), ("train_batch_size", "train.batch_size"),
])
def test_a_mistyped_key_gets_a_suggestion(file, key, meant):
    with pytest.raises(ValueError, match=rf"^--config\.{key}: no such key; did you mean {meant}\?"):
        from_args([f"--config={file}", f"--config.{key}=1"])
    if key.split(".")[0] in PATHS or "." not in key:
        with pytest.raises(ValueError, match=f"^{key}: no such key; did you mean {meant}"):
            make(**{key.replace(".", "__"): 1})


@pytest.mark.parametrize(("section", "meant"), [
    ("optm", "optim"), ("training", "train"), ("checkpoints", "checkpoint")])
def test_a_mistyped_section_gets_a_suggestion(section, meant):
    with pytest.raises(ValueError, match=rf"^{section}: no such key; did you mean {meant}\?"):
        make(**{f"{section}__x": 1})


def test_a_key_like_no_other_gets_the_sections():
    assert "the sections are model, data" in config_lib.did_you_mean("zzzzzz")


# Saved with the run


def other(key):
    """Returns another valid value of a field."""
    field, now = FIELDS[key], lookup(make(), key)
    special = {"data.eval": "b.jsonl", "optim.lr_scheduler_kwargs": {"num_cycles": 2}, "mesh.fsdp": 2,
               "optim.adam_beta1": 0.5, "optim.adam_beta2": 0.5, "optim.warmup_ratio": 0.5, "log.report_to": (),
               "train.max_steps": 7, "eval.eval_strategy": "steps"}
    if key in special:
        return special[key]
    choices = [choice for kind in (field.type, *typing.get_args(field.type))
               if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind) if choice != now]
    if choices:
        return choices[0]
    if isinstance(now, bool):
        return not now
    if isinstance(now, (int, float)):
        return now + 1
    return "other" if str in (field.type, *typing.get_args(field.type)) else 4


@pytest.mark.parametrize("key", FIELDS)
def test_a_difference_shows_if_and_only_if_the_field_is_not_free(key):
    base = dict(data__eval="a.jsonl", optim__lr_scheduler_type="cosine")
    if key == "optim.lr_scheduler_type":
        before, after = make(data__eval="a.jsonl"), make(**base)
    else:
        before, after = make(**base), make(**{**base, key.replace(".", "__"): other(key)})
    assert before != after
    shown = differences(after, to_dict(before))
    if FIELDS[key].metadata.get("free"):
        assert shown == []
    else:
        (line,) = shown
        assert line.startswith(f"{key}: the run has ")
        assert repr(to_dict(make(**base))["seed"] if key == "seed" else lookup(before, key)) in line


def test_what_changes_a_number_is_not_free():
    """The design's list: weights, dtype, data, batch size, seed, orpo, optim and epochs."""
    bound = {key for key, field in FIELDS.items() if not field.metadata.get("free")}
    assert {key for key in FIELDS if key.startswith(("orpo.", "optim."))} <= bound
    assert {"model.path", "model.revision", "model.dtype", "model.param_dtype", "data.train", "data.max_length",
            "data.shuffle", "train.batch_size", "train.num_train_epochs", "train.max_steps", "seed"} <= bound
    # With another folder of checkpoints a run would find none, and start again.
    assert {key for key in bound if key.startswith(("mesh.", "log.", "checkpoint.", "eval."))} == {"checkpoint.folder"}


def test_a_config_survives_json():
    config = make(log__report_to=("jsonl", "tensorboard"), data__eval={"a": "a.jsonl"}, optim__max_grad_norm=None,
                  data__row_length=256, optim__lr_scheduler_type="cosine", optim__lr_scheduler_kwargs={"num_cycles": 2})
    assert build(json.loads(json.dumps(to_dict(config)))) == config
    assert differences(config, to_dict(config)) == []
    assert build(to_dict(make())) == make()


def test_a_run_of_an_older_schema_differs_only_where_it_says_so():
    saved = to_dict(make())
    del saved["orpo"]["nll_scope"]
    assert differences(make(), saved) == [
        "orpo.nll_scope: the run has None, this command has 'sequence'"]


def test_the_resolved_config_is_frozen():
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.orpo.beta = 1.0


# The modules


# Each module imports from those before it only.
ORDER = [
    "config", "packing", "loss", "sharding", "rope", "card", "adam8bit", "standin",
    "attention", "kernels", "experts", "embedding", "head", "model", "t5", "preference", "optim", "checkpoint",
    "metrics", "hosts",
    "tables", "families", "flops", "generate", "pretrained", "data", "batching", "evaluate", "rundir",
    "weights", "step", "program", "api",
    "train", "convert", "compile",
]


def imports_of(module):
    """Returns the modules of the project that a module imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse((PROJECT / "orpo_jax" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("orpo_jax.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "orpo_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orpo_jax."):
            names.add(node.module.split(".")[1])
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"
    return names


MODULES = sorted(path.stem for path in (PROJECT / "orpo_jax").glob("*.py") if path.stem != "__init__")
COMMANDS = {"train", "convert", "chat", "report", "compile"}


def test_every_module_has_its_place():
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert module in ORDER
    assert imports_of(module) <= set(ORDER[:ORDER.index(module)])
    if module in ("config", "packing", "loss", "sharding", "rope", "adam8bit"):
        assert not imports_of(module)
    assert not imports_of(module) & COMMANDS


def test_torch_is_never_imported():
    code = f"""
import importlib, sys
sys.modules["torch"] = None  # `import torch` raises, and nobody finds it
for name in {MODULES!r}:
    importlib.import_module("orpo_jax." + name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
