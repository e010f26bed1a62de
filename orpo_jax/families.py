"""One spec and one weight table per model family: all that the project knows of a family's name.

A table row says where a weight lives here, its name in HF's files and, as an einops pattern from HF's layout to ours,
its axes. Import, export, shapes, initialisation, sharding and the weight-decay mask all follow from the rows.
Axis letters: v vocabulary, d model, n query heads, k key/value heads, h head size, f mlp, l layers.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from orpo_jax.model import ACTIVATIONS, Spec
from orpo_jax.rope import make_rope


@dataclasses.dataclass(frozen=True)
class Weight:
    path: str  # ours; weights under layers/ have a leading axis l
    hf: str  # HF's name, with {l} for the layer
    layout: str  # einops pattern, HF's layout -> ours

    @property
    def axes(self) -> tuple[str, ...]:
        return (("l",) if "{l}" in self.hf else ()) + tuple(self.layout.split(" -> ")[1].split())

    @property
    def decays(self) -> bool:
        """Weight decay leaves out norms and biases, as HF's Trainer does."""
        return not self.path.endswith(("scale", "bias"))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] for axis in self.axes)


Table = tuple[Weight, ...]


def projection(path: str, hf: str, layout: str, bias: str | None = None) -> Table:
    """Returns the rows of a linear map and, where `bias` gives its layout, of its bias."""
    hf = f"model.layers.{{l}}.{hf}"
    weight = Weight(f"layers/{path}/weight", f"{hf}.weight", layout)
    return (weight, Weight(f"layers/{path}/bias", f"{hf}.bias", bias)) if bias else (weight,)


def llama_table(tied: bool, qkv_bias: bool, o_bias: bool, mlp_bias: bool) -> Table:
    """Returns the table of Llama and the families that share its names (transformers' modeling_llama.py)."""
    return (
        Weight("embed", "model.embed_tokens.weight", "v d -> v d"),
        Weight("layers/attn_norm/scale", "model.layers.{l}.input_layernorm.weight", "d -> d"),
        *projection("attn/q", "self_attn.q_proj", "(n h) d -> d n h", "(n h) -> n h" if qkv_bias else None),
        *projection("attn/k", "self_attn.k_proj", "(k h) d -> d k h", "(k h) -> k h" if qkv_bias else None),
        *projection("attn/v", "self_attn.v_proj", "(k h) d -> d k h", "(k h) -> k h" if qkv_bias else None),
        *projection("attn/o", "self_attn.o_proj", "d (n h) -> n h d", "d -> d" if o_bias else None),
        Weight("layers/mlp_norm/scale", "model.layers.{l}.post_attention_layernorm.weight", "d -> d"),
        *projection("mlp/gate", "mlp.gate_proj", "f d -> d f", "f -> f" if mlp_bias else None),
        *projection("mlp/up", "mlp.up_proj", "f d -> d f", "f -> f" if mlp_bias else None),
        *projection("mlp/down", "mlp.down_proj", "d f -> d f", "d -> d" if mlp_bias else None),
        Weight("final_norm/scale", "model.norm.weight", "d -> d"),
        *(() if tied else (Weight("unembed", "lm_head.weight", "v d -> v d"),)),
    )


# The fields of config.json that `llama_spec` and the tables use.
LLAMA_FIELDS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "rope_theta", "rope_scaling", "tie_word_embeddings",
})


def llama_spec(config: Mapping[str, Any], max_length: int, windows: tuple[int | None, ...] | None = None) -> Spec:
    """Returns the spec of Llama's fields. max_length: the longest sequence of the run (see rope.py)."""
    heads, positions = config["num_attention_heads"], config["max_position_embeddings"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}, "
                         f"got {config['hidden_act']!r}")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads, "
                         f"got {kv_heads}")
    rope = make_rope(config["rope_parameters"], head_dim, positions, max_length)
    return Spec(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        d_mlp=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        activation=config["hidden_act"],
        rope=rope,
        max_positions=max(positions, rope.reach or 0),
        windows=windows or (None,) * config["num_hidden_layers"],
    )


def mistral_spec(config: Mapping[str, Any], max_length: int) -> Spec:
    return llama_spec(config, max_length, (config["sliding_window"],) * config["num_hidden_layers"])


def qwen2_spec(config: Mapping[str, Any], max_length: int) -> Spec:
    windows = {"full_attention": None, "sliding_attention": config["sliding_window"]}
    return llama_spec(config, max_length, tuple(windows[kind] for kind in config["layer_types"]))


@dataclasses.dataclass(frozen=True)
class Family:
    spec: Callable[[Mapping[str, Any], int], Spec]
    table: Callable[[Mapping[str, Any]], Table]
    fields: frozenset[str]


FAMILIES = {
    "llama": Family(
        llama_spec,
        lambda c: llama_table(c["tie_word_embeddings"], c["attention_bias"], c["attention_bias"], c["mlp_bias"]),
        LLAMA_FIELDS | {"attention_bias", "mlp_bias"}),
    "mistral": Family(
        mistral_spec,
        lambda c: llama_table(c["tie_word_embeddings"], False, False, False),
        LLAMA_FIELDS | {"sliding_window"}),
    "qwen2": Family(
        qwen2_spec,
        lambda c: llama_table(c["tie_word_embeddings"], True, False, False),
        LLAMA_FIELDS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
}

# Fields that change no number of training: names, token ids, and settings of generation, of initialisation and of
# dropout (which is off, as in TRL) and of how PyTorch lays the work out.
INERT_FIELDS = frozenset({
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_length",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "return_dict", "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "use_return_dict",
    "transformers.js_config", "is_llama_config", "rope_interleaved",
})


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model as its config.json describes it: how to run it, its weights, and the file's own fields for export."""

    spec: Spec
    table: Table
    config: Mapping[str, Any]
    # Embedding rows that the model's files lack, for tokens added to its tokenizer.
    added_rows: int = 0

    def decay_mask(self) -> dict[str, Any]:
        """Returns which weights decay, in the shape of the parameters."""
        return nest({weight.path: weight.decays for weight in self.table})


def architecture(config: Mapping[str, Any], max_length: int, min_rows: int = 0) -> Architecture:
    """Returns the architecture of config.json's fields; ValueError names a field that is neither used nor harmless.

    max_length: the longest sequence of the run. min_rows: embedding rows that the tokenizer needs.
    """
    full = complete(config)
    model_type = full["model_type"]
    family, defaults = FAMILIES[model_type], CONFIG_MAPPING[model_type]().to_dict()
    for field in sorted(set(full) - family.fields - INERT_FIELDS):
        if not field.startswith("_") and (field not in defaults or full[field] != defaults[field]):
            raise ValueError(f"config.json: the field {field!r} is not supported for {model_type}, "
                             f"got {full[field]!r}; take it out if it changes no number of the model")
    added_rows = max(0, min_rows - full["vocab_size"])
    full["vocab_size"] += added_rows
    return Architecture(family.spec(full, max_length), family.table(full), {**config, "vocab_size": full["vocab_size"]},
                        added_rows)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json's fields and the family's defaults of those it leaves out; ValueError for a wrong one."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    try:
        # transformers' own class fills in the defaults, and reads both spellings of the rope settings.
        return CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except Exception as error:  # what the class raises is not documented; its text names the field
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json: not a valid {model_type} config: {reason}") from error


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of a model folder's config.json; ValueError names the file that is missing or broken."""
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; model.path must name a model in Hugging Face format") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: must be JSON, got {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: must hold a JSON object, got a {type(fields).__name__}")
    return fields


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {'a': {'b': x}} for {'a/b': x}."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        branch = result
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'a/b': x} for {'a': {'b': x}}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
