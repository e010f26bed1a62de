"""The schema: every setting with its default, its rule, and whether a resumed run may change it.

The frozen dataclasses below are the only schema. `default()` hands them out as a locked, typed ConfigDict; a config
file edits that, flags edit the file's, and `build` turns the result back into dataclasses, which check every value.
A name that TRL's ORPOConfig has means here what it means there; `docs/trl_fields.md` lists them all.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import ml_collections
from ml_collections import config_dict

T = TypeVar("T")


def free(default: Any) -> Any:
    """A field that a resumed run may change: it moves no number, or only what is shown and kept."""
    return dataclasses.field(default=default, metadata={"free": True})


def check(ok: bool, key: str, rule: str, value: Any, advice: str = "") -> None:
    if not ok:
        raise ValueError(f"{key}: {rule}, got {value!r}" + (f"; {advice}" if advice else ""))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    revision: str | None = None
    # The type of activations and matmuls: 'auto' is float32 on CPU (XLA's bfloat16 is slower there), else bfloat16.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # The type of the master weights and, but for optim.mu_dtype and 8-bit codes, of the optimiser's state.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # The attention of training and evaluation (kernels.py); 'auto' goes by the platform.
    attention: Literal["auto", "xla", "cudnn_packed", "cudnn", "cudnn_mask", "splash", "tokamax"] = free("auto")
    # What the backward pass computes again, from nothing to everything but the layers' inputs; 'auto': the least with
    # which the step fits the device.
    remat: Literal["auto", "none", "minimal", "attention", "full"] = free("auto")

    def __post_init__(self):
        check(bool(self.path), "model.path", "must name a folder or a hub id", self.path)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str = ""
    train_name: str | None = None
    train_split: str = "train"
    # One source, or {name: source}: named sets are logged as eval_NAME_metric.
    eval: str | dict | None = free(None)
    eval_name: str | None = free(None)
    eval_split: str = free("test")
    # Text of a Jinja template, or a file that holds one; None takes the tokenizer's.
    chat_template: str | None = None
    max_length: int = 1024
    # What an over-long pair's prompt is cut down to before its responses are; None: as far as a single token.
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    identical: Literal["drop", "keep"] = "drop"
    empty: Literal["drop", "keep"] = "drop"
    shuffle: bool = True
    dataset_num_proc: int | None = free(None)
    packing: bool = free(True)
    share_prompt: bool = free(True)
    # Tokens of one row; 'auto': the longest pair of the data.
    row_length: int | Literal["auto"] = free("auto")

    def __post_init__(self):
        check(self.max_length >= 2, "data.max_length", "must be at least 2", self.max_length)
        for key in ("max_prompt_length", "max_completion_length"):
            value = getattr(self, key)
            if value is not None:
                check(1 <= value < self.max_length, f"data.{key}",
                      f"must be at least 1 and less than data.max_length ({self.max_length})", value)
        if self.row_length != "auto":
            check(self.row_length >= 2, "data.row_length", "must be 'auto' or at least 2", self.row_length)
        if self.dataset_num_proc is not None:
            check(self.dataset_num_proc >= 1, "data.dataset_num_proc", "must be at least 1", self.dataset_num_proc)
        if isinstance(self.eval, dict):
            for name, source in self.eval.items():
                check(isinstance(name, str) and isinstance(source, str), "data.eval",
                      "must be a source, or map names to sources", self.eval)


@dataclasses.dataclass(frozen=True)
class OrpoConfig:
    # TRL's name; lambda in the paper. 0 is plain supervised fine-tuning on prompt and chosen.
    beta: float = 0.1
    # Whether the NLL covers the prompt and the chosen response, or the chosen response only.
    nll_scope: Literal["sequence", "completion"] = "sequence"
    # Whether the NLL is a mean over the step's tokens (TRL), or over its sequences' means (the paper).
    nll_reduction: Literal["token", "sequence"] = "token"
    # Weight of the load-balancing loss of a mixture of experts. None: what config.json says, where it also has
    # output_router_logits, as TRL does; else 0.
    router_aux_loss_coef: float | None = None

    def __post_init__(self):
        check(self.beta >= 0, "orpo.beta", "must be at least 0", self.beta)
        coef = self.router_aux_loss_coef
        check(coef is None or coef >= 0, "orpo.router_aux_loss_coef", "must be at least 0", coef)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "adamw_8bit", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-6
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    # num_cycles (cosine, cosine_with_restarts), power and lr_end (polynomial), timescale (inverse_sqrt).
    lr_scheduler_kwargs: dict = dataclasses.field(default_factory=dict)
    warmup_steps: int = 0
    # A share of all steps; warmup_steps wins where both are set.
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    # The type of adamw's and lion's first moment; 'auto': model.param_dtype.
    mu_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_grad_norm: float | None = 1.0

    def __post_init__(self):
        check(0 <= self.learning_rate < math.inf, "optim.learning_rate", "must be at least 0 and finite",
              self.learning_rate)
        check(self.warmup_steps >= 0, "optim.warmup_steps", "must be at least 0", self.warmup_steps)
        check(0 <= self.warmup_ratio <= 1, "optim.warmup_ratio", "must be from 0 to 1", self.warmup_ratio)
        check(self.weight_decay >= 0, "optim.weight_decay", "must be at least 0", self.weight_decay)
        check(0 <= self.adam_beta1 < 1, "optim.adam_beta1", "must be from 0 to below 1", self.adam_beta1)
        check(0 <= self.adam_beta2 < 1, "optim.adam_beta2", "must be from 0 to below 1", self.adam_beta2)
        check(self.adam_epsilon > 0, "optim.adam_epsilon", "must be above 0", self.adam_epsilon)
        check(self.mu_dtype == "auto" or self.name in ("adamw", "lion"), "optim.mu_dtype",
              f"must be 'auto' with optim.name={self.name!r}, which has no first moment of a float type", self.mu_dtype)
        if self.max_grad_norm is not None:
            check(self.max_grad_norm > 0, "optim.max_grad_norm", "must be above 0 or None", self.max_grad_norm)
        allowed = {"cosine": ["num_cycles"], "cosine_with_restarts": ["num_cycles"],
                   "polynomial": ["power", "lr_end"], "inverse_sqrt": ["timescale"]}.get(self.lr_scheduler_type, [])
        for key in self.lr_scheduler_kwargs:
            check(key in allowed, "optim.lr_scheduler_kwargs",
                  f"{self.lr_scheduler_type} takes {allowed or 'no arguments'}", key)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_train_epochs: float = 3.0
    # Above 0: the number of optimiser steps, whatever num_train_epochs says.
    max_steps: int = -1
    # Pairs per optimiser step over all devices and micro-batches.
    batch_size: int = 8
    # None: a step takes exactly batch_size pairs. Else it takes this many full rows over all devices, whatever the
    # number of pairs that they hold: for speed first.
    rows_per_step: int | None = None
    # Rows of one micro-batch on one device. Changes speed and memory, never a number.
    rows_per_device: int | Literal["auto"] = free("auto")

    def __post_init__(self):
        check(self.batch_size >= 1, "train.batch_size", "must be at least 1", self.batch_size)
        check(self.max_steps == -1 or self.max_steps >= 1, "train.max_steps", "must be -1 or at least 1",
              self.max_steps)
        check(self.max_steps > 0 or 0 < self.num_train_epochs < math.inf, "train.num_train_epochs",
              "must be above 0 and finite", self.num_train_epochs)
        if self.rows_per_step is not None:
            check(self.rows_per_step >= 1, "train.rows_per_step", "must be at least 1 or None", self.rows_per_step)
        if self.rows_per_device != "auto":
            check(self.rows_per_device >= 1, "train.rows_per_device", "must be 'auto' or at least 1",
                  self.rows_per_device)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left (sharding.py)."""

    data: int = free(1)
    fsdp: int = free(-1)
    tensor: int = free(1)
    expert: int = free(1)
    # The tokens of each row, for rows that are too long for one device; divides the heads, with mesh.tensor.
    sequence: int = free(1)

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            check(size == -1 or size >= 1, f"mesh.{axis}", "must be -1 or at least 1", size)
        check(list(sizes.values()).count(-1) <= 1, "mesh", "at most one axis may be -1", sizes)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Continuations of held-out prompts, shown after each evaluation."""

    num_samples: int = free(0)
    max_new_tokens: int = free(64)
    # 0 is greedy.
    temperature: float = free(0.0)

    def __post_init__(self):
        check(self.num_samples >= 0, "eval.generate.num_samples", "must be at least 0", self.num_samples)
        check(self.max_new_tokens >= 1, "eval.generate.max_new_tokens", "must be at least 1", self.max_new_tokens)
        check(self.temperature >= 0, "eval.generate.temperature", "must be at least 0", self.temperature)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    eval_strategy: Literal["no", "steps", "epoch"] = free("no")
    # None: log.logging_steps.
    eval_steps: int | None = free(None)
    eval_on_start: bool = free(False)
    batch_size: int = free(8)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)

    def __post_init__(self):
        check(self.batch_size >= 1, "eval.batch_size", "must be at least 1", self.batch_size)
        if self.eval_steps is not None:
            check(self.eval_steps >= 1, "eval.eval_steps", "must be at least 1", self.eval_steps)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    save_steps: int = free(500)
    save_total_limit: int | None = free(None)
    # Where checkpoints go if not to output_dir/checkpoints: a folder that every host sees, or a bucket (gs://...).
    folder: str | None = None
    # Whether the same command again goes on from the newest checkpoint, or refuses a folder that holds a run.
    resume: bool = free(True)
    # Whether a run of another config in output_dir may be deleted.
    overwrite: bool = free(False)

    def __post_init__(self):
        check(self.save_steps >= 1, "checkpoint.save_steps", "must be at least 1", self.save_steps)
        if self.save_total_limit is not None:
            check(self.save_total_limit >= 1, "checkpoint.save_total_limit", "must be at least 1",
                  self.save_total_limit)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    logging_steps: int = free(10)
    report_to: tuple[str, ...] = free(("jsonl",))
    run_name: str | None = free(None)

    def __post_init__(self):
        check(self.logging_steps >= 1, "log.logging_steps", "must be at least 1", self.logging_steps)
        for name in self.report_to:
            check(name in ("jsonl", "tensorboard", "wandb"), "log.report_to",
                  "takes jsonl, tensorboard and wandb", name)


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    output_dir: str = free("")
    seed: int = 42
    orpo: OrpoConfig = OrpoConfig()
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        check(bool(self.output_dir), "output_dir", "must name a folder", self.output_dir)
        check(self.train.rows_per_step is None or self.data.packing, "train.rows_per_step", "needs data.packing",
              self.train.rows_per_step)
        splits = 64 if self.mesh.sequence == -1 else self.mesh.sequence
        check(self.data.row_length == "auto" or self.data.row_length % splits == 0, "data.row_length",
              f"must be 'auto' or a multiple of {splits}, since mesh.sequence={self.mesh.sequence} splits rows",
              self.data.row_length)
        check(0 <= self.seed < 2**32, "seed", "must be from 0 to 2**32 - 1", self.seed)


def _walk(cls: type, path: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for field in dataclasses.fields(cls):
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from _walk(typing.cast(type, field.type), name + ".")
        else:
            yield name, field


FIELDS = dict(_walk(Config))


def did_you_mean(name: str) -> str:
    """Returns '; did you mean KEY?' for a mistyped key, section, or last part of keys; else what sections there are."""
    if name in _sections():
        return f"; {name} is a section: name a key of it, such as {next(k for k in FIELDS if k.startswith(name))}"
    last = lambda key: key.rsplit(".", 1)[-1]
    whole = [*_sections(), *FIELDS]
    tries = [(whole, name), (map(last, FIELDS), last(name))] if "." in name else [([*whole, *map(last, FIELDS)], name)]
    for keys, typed in tries:
        for close in difflib.get_close_matches(typed, keys, n=1):
            meant = [close] if close in whole else [key for key in FIELDS if last(key) == close]
            return f"; did you mean {' or '.join(meant)}?"
    return f"; the sections are {', '.join(_sections())}"


def _sections() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _default_value(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def default() -> Any:  # Any: a type checker can't follow a ConfigDict's attributes
    """Returns every setting with its default as a locked ConfigDict, for a config file's `get_config` to edit."""
    return _to_config_dict(Config)


def _to_config_dict(cls: type) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            result[field.name] = _to_config_dict(typing.cast(type, field.type))
        elif field.type in (bool, int, float, str):
            result[field.name] = _default_value(field)
        else:  # a union, Literal, tuple or dict, which ConfigDict can't type: `build` checks it
            reference = config_dict.placeholder(object)
            reference.set(_default_value(field))
            result[field.name] = reference
    return result.lock()


def _matches(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, args[0]) for v in value)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(repr(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_describe(a) for a in args)
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}"
    return "None" if kind is type(None) else kind.__name__


def build(values: Mapping[str, Any], cls: type[T] = Config, path: str = "") -> T:
    """Returns the checked dataclass of a (possibly partial) mapping; ValueError names the dotted key that is wrong."""
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    kwargs = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{path}{name}: no such key{did_you_mean(path + str(name))}")
        kind: Any = fields[name].type
        value: Any = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        if dataclasses.is_dataclass(kind):
            check(isinstance(value, Mapping), path + name, "must be a section", value)
            value = build(value, typing.cast(type, kind), f"{path}{name}.")
        else:
            check(_matches(value, kind), path + name, f"must be {_describe(kind)}", value)
            value = float(value) if kind is float else value
        kwargs[name] = value
    for name, field in fields.items():  # sections without a default of their own still hold the check of a missing path
        if name not in kwargs and dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            kwargs[name] = field.type()
    return cls(**kwargs)


def _parse(text: str, kind: Any, key: str) -> Any:
    """Returns the value that a flag's text stands for, by the type of its field."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for option in sorted(options, key=lambda option: option is str):  # any text is a str: it comes last
        if typing.get_origin(option) is tuple:
            return tuple(part.strip(" '\"") for part in text.strip("()[]").split(",") if part.strip())
        if option is str or (typing.get_origin(option) is Literal and text in typing.get_args(option)):
            if text == "None" and _matches(None, kind):
                return None
            return text
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            continue
        if _matches(value, kind):
            return value
    raise ValueError(f"--config.{key}: must be {_describe(kind)}, got {text!r}")


def load_file(path: str) -> ml_collections.ConfigDict:
    """Returns what `get_config()` of a Python config file returns; ValueError names the file and what is wrong."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"--config: no such file, got {path!r}")
    if file.suffix != ".py":
        raise ValueError(f"--config: must be a Python file (.py) that defines get_config(), got {path!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        result = module.get_config()
        check(isinstance(result, ml_collections.ConfigDict), path, "get_config() must return a ConfigDict", result)
        return result
    except AttributeError as error:
        if unknown := re.match(r"\W*(?:Key \W)?(\w+)\W+(?:does not exist|n?Did you mean|$)", str(error)):
            raise ValueError(f"{path}: no such key {unknown[1]!r}{did_you_mean(unknown[1])}") from error
        if not hasattr(module, "get_config"):
            raise ValueError(f"{path}: must define get_config(), which returns a ConfigDict") from error
        raise ValueError(f"{path}: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # the file is a program: it raises what it likes
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def from_args(args: list[str]) -> Config:
    """Returns the checked config of `--config FILE [--config.section.key=value ...]`, for the commands."""
    args, file, overrides = list(args), None, {}
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if not flag.startswith("--config"):
            raise ValueError(f"{flag}: no such flag; use --config FILE and --config.section.key=value")
        if not equals:
            if not args:
                raise ValueError(f"{flag}: needs a value")
            value = args.pop(0)
        if flag == "--config":
            file = value
        else:
            overrides[flag.removeprefix("--config.")] = value
    if file is None:
        raise ValueError("--config: name a config file, for instance --config configs/demo.py")
    values = load_file(file).to_dict()
    for key, text in overrides.items():
        if key not in FIELDS:
            raise ValueError(f"--config.{key}: no such key{did_you_mean(key)}")
        *sections, leaf = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = _parse(text, FIELDS[key].type, key)
    return build(values)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the resolved config as plain JSON-able values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: Config) -> dict[str, Any]:
    """Returns the same by dotted keys."""
    values = to_dict(config)
    return {key: _lookup(values, key) for key in FIELDS}


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def differences(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Returns a line per setting that a resume needs the same and that differs from a saved run's config."""
    now = to_dict(config)
    # Where a step is a number of rows, which pairs it takes follows from these too.
    rows = {"data.share_prompt", "data.row_length"} if config.train.rows_per_step is not None else set()
    return [f"{key}: the run has {_lookup(saved, key)!r}, this command has {_lookup(now, key)!r}"
            for key, field in FIELDS.items()
            if (key in rows or not field.metadata.get("free")) and _lookup(saved, key) != _lookup(now, key)]


def main_errors(command: Any) -> None:
    """Runs a command's `main(argv)`; a user's mistake becomes one line on stderr and exit code 1."""
    try:
        command(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
