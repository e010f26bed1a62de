"""Logits, export and import against PyTorch."""

import json

import jax
import numpy as np
import pytest
import tiny

import orpo_jax
from orpo_jax import families, weights

torch = pytest.importorskip("torch", reason="torch is the reference: a CPU build is at hand on Python 3.11 only")
transformers = pytest.importorskip("transformers")

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_tuned": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
                   "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False},
    "yarn_factor": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                    "attention_factor": 1.3},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
}
CASES = {
    **{f"llama, rope {name}": dict(model_type="llama", head_dim=16, rope_scaling=dict(rope), max_position_embeddings=32,
                                   rope_theta=500.0) for name, rope in ROPES.items()},
    "llama, biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama, tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama, one kv head": dict(model_type="llama", num_key_value_heads=1),
    "llama, as many kv heads": dict(model_type="llama", num_key_value_heads=4),
    "llama, wide heads": dict(model_type="llama", head_dim=24),
    "llama, gelu": dict(model_type="llama", hidden_act="gelu"),
    "llama, gelu tanh": dict(model_type="llama", hidden_act="gelu_pytorch_tanh"),
    "mistral, window 7": dict(model_type="mistral", sliding_window=7),
    "mistral, no window": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2, window in some layers": dict(model_type="qwen2", use_sliding_window=True, sliding_window=6,
                                         max_window_layers=1),
}


def reference_model(folder, **changes):
    """A random PyTorch model, with norms and biases away from their initial values."""
    config = tiny.config_of(**changes)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config), attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("length", [20, 60], ids=["below the original length", "above it"])
@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case, length):
    model = reference_model(tmp_path, **CASES[case])
    ids = np.random.default_rng(0).integers(0, 408, (2, length))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    got = orpo_jax.load_model(tmp_path, max_length=length).logits(ids)
    assert 0.3 < expected.std() < 10
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_round_trip_is_byte_equal(tmp_path, dtype, shards, family):
    model = reference_model(tmp_path / "torch", model_type=family).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(tmp_path / "hf", max_shard_size="1GB" if shards == 1 else "40KB")
    tiny.make_tokenizer().save_pretrained(tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shards > 1)
    orpo_jax.load_model(tmp_path / "hf").save(tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_the_export_in_several_files_loads(tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    model = orpo_jax.load_model(folder)
    (tmp_path / "parts").mkdir()
    weights.save_params(model.params, model.arch, tmp_path / "parts", model.dtypes, max_shard_bytes=20_000)
    (tmp_path / "parts" / "config.json").write_text((folder / "config.json").read_text())
    assert len(json.loads((tmp_path / "parts" / weights.INDEX).read_text())["weight_map"]) == len(model.dtypes)
    ids = np.arange(24).reshape(2, 12)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts").eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.tensor(ids)).logits.numpy(), model.logits(ids), atol=1e-4)


def test_generation_is_greedy_pytorch_s(tmp_path):
    reference = reference_model(tmp_path, model_type="mistral", sliding_window=9)
    model = orpo_jax.load_model(tmp_path)
    prompts = ["the sky is", "please tell me what you think about cats and dogs"]
    for prompt, got in zip(prompts, model.generate(prompts, max_new_tokens=12), strict=True):
        ids = model.pretrained.tokenizer("<bos>" + prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=1)
        assert got == model.pretrained.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


def test_the_gradient_of_the_position_below_does_not_reach_up(model_folder):
    """Causality: the logits at a position do not move with later embeddings."""
    model = orpo_jax.load_model(model_folder)
    assert isinstance(model.arch, families.Architecture)
    ids = np.arange(10, 20)[None]
    changed = ids.copy()
    changed[0, 6] = 200
    a, b = jax.device_get((model.logits(ids), model.logits(changed)))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert not np.allclose(a[:, 6], b[:, 6])
