"""The model families: of each a spec, a weight table (tables.py), and the fields of config.json that the two use.

All that the project knows of a family's name is here.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import CONFIG_MAPPING

from orpo_jax import tables
from orpo_jax.model import ACTIVATIONS, Decoder, Spec
from orpo_jax.rope import Rope, make_rope
from orpo_jax.t5 import EncoderDecoder, EncoderDecoderSpec
from orpo_jax.tables import Config

# Specs


def check_activation(name: str, field: str = "hidden_act") -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: {field} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def spec_of(config: Config, max_length: int, *, partial: bool = False, **changes: Any) -> Spec:
    """Returns the spec of the fields that most families have, under any of their names, with the family's changes.

    max_length: the longest sequence of the run (see rope.py). partial: whether heads may be rotated in part.
    """
    def field(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    d_model, heads, num_layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim, kv_heads = config.get("head_dim") or d_model // heads, config.get("num_key_value_heads") or heads
    activation = field("hidden_activation", "hidden_act", "activation_function")
    check_activation(activation)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads, "
                         f"got {kv_heads}")
    ropes = changes.pop("ropes", None) or layer_ropes(config, head_dim, max_length, partial)
    reach = max((rope.reach or 0 for rope in ropes if rope is not None), default=0)
    values = dict(
        vocab_size=config["vocab_size"], d_model=d_model, num_layers=num_layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, d_mlp=field("intermediate_size", "ffn_dim", "n_inner") or 4 * d_model,
        norm_eps=field("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), activation=activation,
        max_positions=max(config["max_position_embeddings"], reach), windows=layer_windows(config), ropes=ropes)
    return Spec(**{**values, **changes})


def layer_windows(config: Config) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer; ValueError for a kind of layer that has none of the two."""
    window, num_layers = config.get("sliding_window"), config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * num_layers
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(kinds) - set(windows)):
        raise ValueError(f"config.json: layer_types must be of {', '.join(windows)}, got {', '.join(unknown)}")
    return tuple(windows[kind] for kind in kinds)


def layer_ropes(config: Config, head_dim: int, max_length: int, partial: bool) -> tuple[Rope | None, ...]:
    """Returns the rope of each layer: one for all, or one for each kind of layer."""
    settings, num_layers = config.get("rope_parameters"), config["num_hidden_layers"]
    if settings is None:
        return (None,) * num_layers
    make = lambda some: make_rope(some, head_dim, config["max_position_embeddings"], max_length, partial=partial)
    if "rope_theta" in settings:
        return (make(settings),) * num_layers
    by_kind = {kind: make(some) for kind, some in settings.items() if kind in config["layer_types"]}
    return tuple(by_kind[kind] for kind in config["layer_types"])


def gemma_spec(config: Config, max_length: int) -> Spec:
    scalar = config.get("query_pre_attn_scalar")
    return spec_of(config, max_length, norm="unit_rms", embed_scale=config["hidden_size"]**0.5,
                   attn_scale=scalar and scalar**-0.5, attn_softcap=config.get("attn_logit_softcapping"),
                   logit_softcap=config.get("final_logit_softcapping"))


def smollm3_spec(config: Config, max_length: int) -> Spec:
    spec = spec_of(config, max_length)
    turned = zip(spec.ropes, config["no_rope_layers"], strict=True)
    return dataclasses.replace(spec, ropes=tuple(rope if has_rope else None for rope, has_rope in turned))


def granite_spec(config: Config, max_length: int) -> Spec:
    return spec_of(config, max_length, embed_scale=config["embedding_multiplier"],
                   attn_scale=config["attention_multiplier"], residual_scale=config["residual_multiplier"],
                   logit_scale=1 / config["logits_scaling"])


def cohere_spec(config: Config, max_length: int) -> Spec:
    return spec_of(config, max_length, norm="layer", parallel=True, rope_interleaved=True,
                   logit_scale=config["logit_scale"])


def parallel_spec(config: Config, max_length: int) -> Spec:
    return spec_of(config, max_length, norm="layer", partial=True, parallel=config["use_parallel_residual"])


def opt_spec(config: Config, max_length: int) -> Spec:
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        raise ValueError(f"config.json: word_embed_proj_dim must be hidden_size ({config['hidden_size']}), got "
                         f"{config['word_embed_proj_dim']}; embeddings of another size are not supported")
    return spec_of(config, max_length, norm="layer", norm_eps=1e-5, position_offset=2)


def gptj_spec(config: Config, max_length: int) -> Spec:
    rope = make_rope({"rope_theta": 10000.0}, config["rotary_dim"] or config["hidden_size"], 0, max_length)
    return spec_of(config, max_length, norm="layer", parallel=True, rope_interleaved=True,
                   ropes=(rope,) * config["num_hidden_layers"])


def moe_spec(config: Config, max_length: int, **changes: Any) -> Spec:
    counts = [config[name] for name in ("num_local_experts", "num_experts") if config.get(name) is not None]
    if len(set(counts)) != 1:
        raise ValueError(f"config.json: num_experts and num_local_experts must be one number, got {counts}")
    # As TRL has it: a config that does not ask for the routers' logits has no loss of them.
    coef = config["router_aux_loss_coef"] if config["output_router_logits"] else 0.0
    return spec_of(config, max_length, num_experts=counts[0], experts_per_token=config["num_experts_per_tok"],
                   d_expert=config.get("moe_intermediate_size") or config["intermediate_size"],
                   d_mlp=config.get("shared_expert_intermediate_size") or config["intermediate_size"],
                   router_aux_loss_coef=coef, **changes)


def qwen_moe_spec(config: Config, max_length: int) -> Spec:
    return moe_spec(config, max_length, renormalise_experts=config["norm_topk_prob"])


# Positions of a model that has no table of them: no sequence is too long.
NO_LIMIT = 2**31 - 1


def t5_spec(config: Config, max_length: int) -> Spec:
    if not config["is_encoder_decoder"]:
        raise ValueError("config.json: is_encoder_decoder must be true for t5, got False")
    check_activation(config["dense_act_fn"], "the last part of feed_forward_proj")
    num_buckets, max_distance = config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
    if num_buckets < 4 or num_buckets % 2:
        raise ValueError("config.json: relative_attention_num_buckets must be even and at least 4, got "
                         f"{num_buckets}")
    if max_distance <= num_buckets // 2:
        raise ValueError("config.json: relative_attention_max_distance must be above half of "
                         f"relative_attention_num_buckets ({num_buckets}), got {max_distance}")
    num_layers, heads = config["num_layers"], config["num_heads"]
    return EncoderDecoderSpec(
        vocab_size=config["vocab_size"], d_model=config["d_model"], num_layers=num_layers, num_heads=heads,
        num_kv_heads=heads, head_dim=config["d_kv"], d_mlp=config["d_ff"], norm_eps=config["layer_norm_epsilon"],
        activation=config["dense_act_fn"], max_positions=NO_LIMIT, windows=(None,) * num_layers,
        ropes=(None,) * num_layers, num_decoder_layers=config["num_decoder_layers"], num_buckets=num_buckets,
        max_distance=max_distance, logit_scale=config["d_model"]**-0.5 if config["scale_decoder_outputs"] else 1.0)


@dataclasses.dataclass(frozen=True)
class Family:
    spec: Callable[..., Spec]  # of the config and the longest sequence
    table: tables.TableOf
    fields: frozenset[str]  # of config.json that the two use, beside COMMON_FIELDS
    module: Callable[..., Any] = Decoder  # of (param, spec); see model.py


def family(table: tables.TableOf, fields: str = "", spec: Callable[..., Spec] = spec_of,
           **changes: Any) -> Family:
    return Family(partial(spec, **changes), table, frozenset(fields.split()))


# Fields of config.json that spec_of and the tables read, under HF's common names or a family's own.
ROPE_FIELDS = {"rope_parameters", "rope_theta", "rope_scaling"}
COMMON_FIELDS = frozenset({
    "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim", "n_inner", "hidden_act", "hidden_activation",
    "activation_function", "max_position_embeddings", "n_positions", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "norm_epsilon", "tie_word_embeddings", *ROPE_FIELDS,
})
WINDOW_FIELDS = "use_sliding_window sliding_window max_window_layers layer_types"
MOE_FIELDS = "head_dim num_experts_per_tok output_router_logits router_aux_loss_coef"
# T5's published files have n_positions, which no number of theirs depends on.
T5_FIELDS = ("d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets "
             "relative_attention_max_distance feed_forward_proj dense_act_fn is_gated_act scale_decoder_outputs "
             "decoder_start_token_id n_positions")
GEMMA2_FIELDS = "query_pre_attn_scalar sliding_window layer_types final_logit_softcapping"

FAMILIES = {
    "llama": family(tables.llama_with_biases(mlp_bias="mlp_bias"),
                    "attention_bias mlp_bias"),
    "mistral": family(tables.llama_like(), "sliding_window"),
    "qwen2": family(tables.llama_like(qkv_bias=True), f"head_dim {WINDOW_FIELDS}"),
    "qwen3": family(tables.llama_with_biases(extra=tables.QK_NORMS),
                    f"attention_bias {WINDOW_FIELDS}"),
    "gemma": family(tables.llama_with_biases(), "attention_bias", gemma_spec),
    "gemma2": family(tables.llama_with_biases(block=tables.BOTH),
                     f"attention_bias attn_logit_softcapping {GEMMA2_FIELDS}", gemma_spec),
    "gemma3_text": family(tables.llama_with_biases(block=tables.BOTH, extra=tables.QK_NORMS),
                          f"attention_bias {GEMMA2_FIELDS}", gemma_spec),
    "phi": family(tables.phi_table, "head_dim", norm="layer", parallel=True, partial=True),
    "phi3": family(tables.phi3_table, "head_dim sliding_window original_max_position_embeddings", partial=True),
    "opt": family(tables.opt_table, "enable_bias word_embed_proj_dim", opt_spec),
    "gpt2": family(tables.gpt2_table, norm="layer"),
    "gptj": family(tables.gptj_table, "rotary_dim", gptj_spec),
    "gpt_neox": family(tables.gpt_neox_table, "use_parallel_residual attention_bias", parallel_spec),
    "olmo2": family(tables.llama_with_biases(block=tables.POST, extra=tables.WIDE_QK_NORMS),
                    "head_dim attention_bias"),
    "olmo3": family(tables.llama_with_biases(block=tables.POST, extra=tables.WIDE_QK_NORMS),
                    "head_dim attention_bias sliding_window layer_types"),
    "smollm3": family(tables.llama_with_biases(mlp_bias="mlp_bias"),
                      "head_dim attention_bias mlp_bias no_rope_layers no_rope_layer_interval "
                      f"{WINDOW_FIELDS}", smollm3_spec),
    "granite": family(tables.llama_with_biases(mlp_bias="mlp_bias"),
                      "head_dim attention_bias mlp_bias embedding_multiplier logits_scaling residual_multiplier "
                      "attention_multiplier", granite_spec),
    "starcoder2": family(tables.starcoder2_table, "head_dim sliding_window use_bias", norm="layer"),
    "stablelm": family(tables.stablelm_table, "use_parallel_residual use_qkv_bias", parallel_spec),
    "cohere": family(tables.llama_with_biases(block=tables.ONE),
                     "head_dim attention_bias logit_scale", cohere_spec),
    "mixtral": family(tables.mixtral_table, f"{MOE_FIELDS} sliding_window num_local_experts", moe_spec,
                      renormalise_experts=True),
    "qwen2_moe": family(tables.qwen_moe_table, f"{MOE_FIELDS} {WINDOW_FIELDS} num_experts moe_intermediate_size "
                        "qkv_bias shared_expert_intermediate_size norm_topk_prob", qwen_moe_spec),
    "qwen3_moe": family(tables.qwen_moe_table, f"{MOE_FIELDS} {WINDOW_FIELDS} num_experts num_local_experts "
                        "attention_bias moe_intermediate_size norm_topk_prob", qwen_moe_spec),
    "glm": family(tables.llama_like(qkv_bias="attention_bias", mlp=tables.FUSED_GATED_MLP), "attention_bias",
                  partial=True, rope_interleaved=True),
    "glm4": family(tables.llama_like(qkv_bias="attention_bias", mlp=tables.FUSED_GATED_MLP, block=tables.GLM4),
                   "attention_bias", partial=True, rope_interleaved=True),
    "t5": Family(t5_spec, tables.t5_table, frozenset(T5_FIELDS.split()), EncoderDecoder),
}

# The fields that give the axes of weights their sizes, by letter, under all of their names.
SIZE_FIELDS = {
    "d": ("hidden_size", "n_embd", "d_model"), "n": ("num_attention_heads", "n_head", "num_heads"),
    "f": ("intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    "e": ("moe_intermediate_size", "intermediate_size"), "x": ("num_experts", "num_local_experts"),
}

# Fields that change no number of training: names, token ids, and settings of generation, of initialisation, of dropout
# (which is off, as in TRL), of other heads, and of how PyTorch lays the work out.
INERT_FIELDS = frozenset({
    "_attn_implementation", "_commit_hash", "_name_or_path", "_sliding_window_pattern", "architectures",
    "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "dropout", "dropout_rate", "dtype", "embd_pdrop", "embedding_dropout", "eos_token_id", "gradient_checkpointing",
    "hidden_dropout", "id2label", "init_std", "initializer_factor", "initializer_range", "is_encoder_decoder",
    "is_llama_config", "label2id", "max_length", "model_type", "output_attentions", "output_hidden_states",
    "output_past", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "residual_dropout", "return_dict",
    "rope_interleaved", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "use_cache", "use_return_dict",
})


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model as its config.json describes it: how to run it, its weights, and the file's own fields for export."""

    spec: Spec
    table: tables.Table
    config: Mapping[str, Any]
    # Embedding rows that the model's files lack, for tokens added to its tokenizer.
    added_rows: int = 0
    module: Callable[..., Any] = Decoder

    @property
    def encodes(self) -> bool:
        """Whether prompts go through an encoder of their own."""
        return self.module is EncoderDecoder

    def field_of(self, letter: str) -> str:
        """Returns the field of config.json that gives an axis its size, for errors that name it."""
        names = SIZE_FIELDS.get(letter, ())
        size = self.spec.sizes[letter]
        return next((name for name in names if self.config.get(name) == size), names[0] if names else "a size")

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
    for field in sorted(set(full) - family.fields - (COMMON_FIELDS & {*defaults, *ROPE_FIELDS}) - INERT_FIELDS):
        private = field.startswith("_") and field not in defaults  # transformers' own notes
        if not private and (field not in defaults or full[field] != defaults[field]):
            raise ValueError(f"config.json: the field {field!r} is not supported for {model_type}, "
                             f"got {full[field]!r}; take it out if it changes no number of the model")
    added_rows = max(0, min_rows - full["vocab_size"])
    full["vocab_size"] += added_rows
    # Some families have names of their own for what others call hidden_size, and so on.
    full |= {name: full[own] for name, own in CONFIG_MAPPING[model_type].attribute_map.items() if own in full}
    return Architecture(family.spec(full, max_length), family.table(full), {**config, "vocab_size": full["vocab_size"]},
                        added_rows, family.module)


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
