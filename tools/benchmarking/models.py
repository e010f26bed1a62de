"""The named model shapes, written as random weights in Hugging Face format, and the work that training one needs."""

import json
import pathlib
from typing import Any

from orpo_jax import weights
from orpo_jax.families import architecture


def _llama(vocab: int, d: int, layers: int, heads: int, kv: int, head: int, mlp: int, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": d,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head,
            "intermediate_size": mlp, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, **more}


def _qwen2(vocab: int, d: int, layers: int, heads: int, kv: int, mlp: int, **more: Any) -> dict[str, Any]:
    llama = _llama(vocab, d, layers, heads, kv, d // heads, mlp, **{"rope_theta": 1e6, "rms_norm_eps": 1e-6, **more})
    del llama["head_dim"]
    return llama | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _mixtral(*sizes: int, experts: int) -> dict[str, Any]:
    return _llama(*sizes) | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
                             "num_local_experts": experts, "num_experts_per_tok": 2}


SHAPES = {
    "tiny": _llama(512, 32, 2, 4, 2, 8, 48, tie_word_embeddings=False),
    "small": _llama(8192, 256, 4, 4, 2, 64, 704, tie_word_embeddings=False),
    "qwen2-0.5b": _qwen2(151936, 896, 24, 14, 2, 4864),
    "moe-1b": _mixtral(32000, 1024, 8, 16, 8, 64, 3584, experts=8),
    "llama-1b": _llama(128256, 2048, 16, 32, 8, 64, 8192),
    "qwen2-1.5b": _qwen2(151936, 1536, 28, 12, 2, 8960),
    "llama-3b": _llama(128256, 3072, 28, 24, 8, 128, 8192),
    "llama-8b": _llama(128256, 4096, 32, 32, 8, 128, 14336, tie_word_embeddings=False),
    "qwen2.5-32b": _qwen2(152064, 5120, 64, 40, 8, 27648, tie_word_embeddings=False),
    "llama-70b": _llama(128256, 8192, 80, 64, 8, 128, 28672, tie_word_embeddings=False),
}


def write_model(name: str, folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes the named shape with random weights into the folder, and returns it.

    Weights of standard deviation 1 / sqrt(width) make logits that spread by about 1, so that a wrong mask or layout
    shows in the loss. In bfloat16, which halves the file; all systems read the same rounded weights into float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[name]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    arch = architecture(config, 1)
    names = {hf: "bfloat16" for weight in arch.table for hf in weights.hf_names(weight, arch.spec.sizes)}
    weights.save_params(weights.random_params(arch, seed, config["hidden_size"]**-0.5), arch, folder, names)
    return folder
