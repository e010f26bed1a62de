"""Tiny models, tokenizers and rows, made on the spot: no test needs a network or a file of another project."""

import json
import pathlib
import random
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from orpo_jax import weights
from orpo_jax.families import architecture

TEXT = """the sky is blue green and very clear today we walk over a small hill to find red flowers near our old house
please tell me what you think about cats dogs rivers mountains with some good reasons thank you kindly sure here goes
nothing ask again later maybe it depends on many things"""
WORDS = TEXT.split()

# Ends in exactly one EOS, so that it is templated alike by trainers that append one where there is none.
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1,
    "torch_dtype": "float32",
}


def make_tokenizer(*, bos: str | None = "<bos>", eos: str | None = "<eos>", pad: str | None = "<pad>",
                   template: str | None = TEMPLATE, closes: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens whose merges stay within words; closes: it adds EOS, as T5's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[a-zA-Z]+| ?[^\sa-zA-Z]|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if closes:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast


def config_of(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    if model_type == "gemma2":
        return family_config(model_type, **changes)
    config = {**LLAMA, "vocab_size": 408, "model_type": model_type}
    if model_type != "llama":
        config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
        config["architectures"] = [{"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                                    "mixtral": "MixtralForCausalLM"}[model_type]]
    if model_type == "qwen2":
        del config["head_dim"]
    return {**config, **changes}


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Returns a small config of any family; a size that its config does not know is left out."""
    sizes = dict(vocab_size=408, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    known = CONFIG_MAPPING[model_type]().to_dict()
    return {"model_type": model_type, **{name: size for name, size in sizes.items() if name in known}, **changes}


T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 408, "d_model": 32, "d_kv": 6,
    "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 2,
    "pad_token_id": 2, "eos_token_id": 1,
}
# As in v1.1 and Flan-T5.
T5_GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def write_t5(folder: pathlib.Path, *, seed: int = 0, scale: float = 0.2, tokenizer: Any = None,
             **changes: Any) -> pathlib.Path:
    """Writes a random encoder-decoder, with norms and biases of distances away from their initial values."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or make_tokenizer(bos=None, closes=True)).save_pretrained(folder)
    config = {**T5, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    arch, rng = architecture(config, 1), np.random.default_rng(seed)
    noisy = lambda path, x: x + scale * rng.normal(size=x.shape) if path[-1].key != "weight" else x
    params = jax.tree_util.tree_map_with_path(noisy, weights.random_params(arch, seed, scale))
    names = {name: "float32" for weight in arch.table for name in weights.hf_names(weight, arch.spec.sizes)}
    weights.save_params(params, arch, folder, names)
    return folder


# A mixture of experts whose router prefers some: with weights as small as the others', all would be used alike.
EXPERTS = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
               router_aux_loss_coef=0.02)


def skew_routers(folder: pathlib.Path, factor: float = 8.0) -> pathlib.Path:
    """Multiplies the routers' weights, so that loads differ and probabilities are far from alike."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x * factor if name.endswith("block_sparse_moe.gate.weight") else x for name, x in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_model(folder: pathlib.Path, *, tokenizer: Any = None, seed: int = 0, scale: float = 0.3,
                dtype: str = "float32", max_shard_bytes: int = 10**9, **changes: Any) -> pathlib.Path:
    """Writes a random model in Hugging Face format, with weights that make its logits spread by about 1."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = config_of(**changes)
    (folder / "config.json").write_text(json.dumps(config))
    arch = architecture(config, 1)
    names = {name: dtype for weight in arch.table for name in weights.hf_names(weight, arch.spec.sizes)}
    weights.save_params(weights.random_params(arch, seed, scale), arch, folder, names, max_shard_bytes=max_shard_bytes)
    return folder


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_rows(count: int, kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """Returns rows of one kind: standard, implicit, conversational or conversational_implicit."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        prompt, chosen, rejected = sentence(rng, 2, 9), sentence(rng, 1, 12), sentence(rng, 1, 12)
        chosen, rejected = f"good {chosen}", f"bad {rejected}"  # they differ from the first word on
        user = [{"role": "user", "content": prompt}]
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        rows.append({
            "standard": {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected},
            "implicit": {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"},
            "conversational": {"prompt": user, "chosen": answers[0], "rejected": answers[1]},
            "conversational_implicit": {"chosen": user + answers[0], "rejected": user + answers[1]},
        }[kind])
    return rows


def write_rows(file: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
