"""Every family against PyTorch: logits, gradients of the loss, export, and each field of its config.json."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import orpo_jax
from orpo_jax import families, head, packing, step, weights
from orpo_jax.batching import Layout
from orpo_jax.model import Decoder

torch = pytest.importorskip("torch", reason="torch is the reference: a CPU build is at hand on Python 3.11 only")
transformers = pytest.importorskip("transformers")

LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 4.5], "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5}
TWO_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
             "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# At least one case of every family, with its odd settings on.
CASES = {
    "llama": dict(model_type="llama", head_dim=12, attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", head_dim=12, sliding_window=7),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1,
                  tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=12, attention_bias=True, use_sliding_window=True, sliding_window=9,
                  max_window_layers=1, tie_word_embeddings=True),
    "gemma": dict(model_type="gemma", head_dim=12, num_key_value_heads=1),
    "gemma, untied": dict(model_type="gemma", head_dim=12, tie_word_embeddings=False, attention_bias=True),
    "gemma2": dict(model_type="gemma2", head_dim=12, num_hidden_layers=4, query_pre_attn_scalar=20, sliding_window=8,
                   attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2, no caps": dict(model_type="gemma2", attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": dict(model_type="gemma3_text", head_dim=12, num_hidden_layers=4, query_pre_attn_scalar=20,
                   sliding_window=8, layer_types=MIXED, rope_parameters=TWO_ROPES),
    "phi-2": dict(model_type="phi", num_key_value_heads=2, rope_parameters={
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    "phi-3": dict(model_type="phi3", sliding_window=9),
    "phi-4": dict(model_type="phi3", original_max_position_embeddings=32, rope_parameters=LONGROPE,
                  tie_word_embeddings=True),
    "opt": dict(model_type="opt", ffn_dim=48, word_embed_proj_dim=32),
    "opt, no biases": dict(model_type="opt", ffn_dim=40, word_embed_proj_dim=32, enable_bias=False,
                           tie_word_embeddings=False, activation_function="gelu"),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2, narrow mlp": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40,
                             layer_norm_epsilon=1e-3),
    "gptj": dict(model_type="gptj", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "pythia": dict(model_type="gpt_neox", rope_parameters={
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    "neox, one after the other": dict(model_type="gpt_neox", use_parallel_residual=False, attention_bias=False,
                                      tie_word_embeddings=True),
    "olmo2": dict(model_type="olmo2", attention_bias=True),
    "olmo3": dict(model_type="olmo3", num_hidden_layers=4, sliding_window=7, layer_types=MIXED,
                  rope_parameters=TWO_ROPES),
    "smollm3": dict(model_type="smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1], attention_bias=True,
                    mlp_bias=True),
    "smollm3, windows": dict(model_type="smollm3", num_hidden_layers=4, no_rope_layer_interval=2,
                             use_sliding_window=True, sliding_window=5),
    "granite": dict(model_type="granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7,
                    attention_multiplier=0.2, attention_bias=True, tie_word_embeddings=True),
    "starcoder2": dict(model_type="starcoder2", sliding_window=11),
    "starcoder2, no biases": dict(model_type="starcoder2", use_bias=False, tie_word_embeddings=False),
    "stablelm": dict(model_type="stablelm", use_qkv_bias=True),
    "stablelm, parallel": dict(model_type="stablelm", use_parallel_residual=True, rope_parameters={
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    "cohere": dict(model_type="cohere", logit_scale=0.3, attention_bias=True),
    "mixtral": dict(model_type="mixtral", head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "qwen2_moe": dict(model_type="qwen2_moe", num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
                      shared_expert_intermediate_size=28, norm_topk_prob=False),
    "qwen2_moe, renormalised": dict(model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, qkv_bias=False,
                                    moe_intermediate_size=20, shared_expert_intermediate_size=28, norm_topk_prob=True,
                                    use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=12, num_experts=6, num_experts_per_tok=3,
                      moe_intermediate_size=20, norm_topk_prob=True, attention_bias=True),
    "glm": dict(model_type="glm", head_dim=12, attention_bias=True),
    "glm4": dict(model_type="glm4", head_dim=12, attention_bias=True, tie_word_embeddings=True),
}
# test_encoder_decoder.py has the others.
DECODERS = [name for name, family in families.FAMILIES.items() if family.module is Decoder]
FIRST = {case["model_type"]: name for name, case in reversed(CASES.items())}

def make_model(folder, *, noise=0.1, **changes):
    """A random PyTorch model with norms and biases away from their initial values, as its folder."""
    config = transformers.CONFIG_MAPPING[changes["model_type"]].from_dict(tiny.family_config(**changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return model.eval()


def test_every_family_has_a_case():
    assert set(FIRST) == set(DECODERS)


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    model = make_model(tmp_path, noise=0.2, **CASES[case])
    ids = np.random.default_rng(0).integers(0, 408, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    got = orpo_jax.load_model(tmp_path, max_length=40).logits(ids)
    assert 0.3 < expected.std() < 10
    np.testing.assert_allclose(got, expected, atol=1e-4)


def reference_gradients(model, pairs, beta, folder):
    """Returns torch's gradients of ORPO's loss, by the names of files: each sequence by itself, no packing."""
    def mean_logp(ids, prompt):
        logps = torch.log_softmax(model(torch.tensor(ids)[None]).logits[0, :-1], -1)
        return logps.gather(1, torch.tensor(ids)[1:, None])[:, 0], prompt - 1

    nlls, odds = [], []
    for chosen, rejected, prompt in pairs:
        (c, at), (r, _) = mean_logp(chosen, prompt), mean_logp(rejected, prompt)
        nlls.append(-c)
        log_odds = [x[at:].mean() - torch.log1p(-torch.exp(x[at:].mean())) for x in (c, r)]
        odds.append(torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1]))
    (torch.cat(nlls).mean() - beta * torch.stack(odds).mean()).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", FIRST.values())
def test_gradients(tmp_path, case):
    """Packed and shared, through the fused head, against torch's autograd of sequences one by one."""
    model = make_model(tmp_path, **CASES[case])
    rng = np.random.default_rng(1)
    pairs = []
    for prompt, chosen, rejected in ((6, 5, 9), (11, 7, 3)):
        ids = rng.integers(3, 408, prompt)
        pairs.append((np.concatenate([ids, rng.integers(3, 408, chosen)]),
                      np.concatenate([ids, rng.integers(3, 408, rejected)]), prompt))
    expected = reference_gradients(model, pairs, 0.3, tmp_path / "gradients")
    loaded = orpo_jax.load_model(tmp_path, max_length=64)
    table = [packing.Pair(chosen, rejected, prompt, prompt, prompt) for chosen, rejected, prompt in pairs]
    rows = jax.tree.map(jnp.asarray, packing.build_rows(table, [[0, 1]], num_rows=1, row_length=64, max_pairs=2,
                                                       share_prompt=True, nll_scope="sequence", nll_reduction="token"))
    layout = Layout((64,), 1, 1, 2, 64, 128, 2, True)
    counts = head.Counts(jnp.float32(sum(len(chosen) - 1 for chosen, _, _ in pairs)), jnp.float32(len(pairs)))
    one = step.make_model(loaded.arch, layout, jnp.dtype("float32"), beta=0.3)
    grads = jax.grad(lambda params: one.loss(params, rows, counts)[0])(loaded.params)
    got = dict(weights.hf_tensors(grads, loaded.arch))
    assert got.keys() == expected.keys()
    norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in expected.values()))
    for name, grad in expected.items():
        error = np.linalg.norm(got[name] - grad)
        assert error <= 1e-3 * np.linalg.norm(grad) or np.linalg.norm(grad) < 1e-6 * norm, (name, error)


@pytest.mark.parametrize("case", FIRST.values())
def test_round_trip_is_byte_equal_and_loads(tmp_path, case):
    model = make_model(tmp_path / "hf", **CASES[case])
    loaded = orpo_jax.load_model(tmp_path / "hf")
    loaded.save(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    kept, written = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("hf", "ours"))
    assert abs(kept - written) < 100


def test_a_file_without_the_head_s_prefix_loads(tmp_path):
    """GPT-2's own files name a tensor `h.0.ln_1.weight`, and keep masks as buffers."""
    make_model(tmp_path, **CASES["gpt2"])
    ids = np.arange(24).reshape(2, 12)
    expected = orpo_jax.load_model(tmp_path).logits(ids)
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    assert "h.0.ln_1.weight" in tensors
    save_file({**tensors, "h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    np.testing.assert_array_equal(orpo_jax.load_model(tmp_path).logits(ids), expected)


# What a field is changed to where its type does not tell.
OTHER = {"layer_types": None, "no_rope_layers": None, "rope_parameters": None, "hidden_act": "gelu",
         "hidden_activation": "relu", "activation_function": "relu"}
# Sizes that must fit together, and token ids: the cases above vary them.
SKIPPED = {"vocab_size", "hidden_size", "num_attention_heads", "n_embd", "n_head", "word_embed_proj_dim",
           "max_position_embeddings", "n_positions", "attribute_map", "is_decoder", "add_cross_attention"}


def other_value(name, value):
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value > 8 else max(value * 2, 2)
    if isinstance(value, float):
        return value * 3 + 0.1
    return {"sliding_window": 5, "n_inner": 40, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0,
            "num_key_value_heads": 2, "head_dim": 12, "use_bidirectional_attention": True}.get(name)


@pytest.mark.parametrize("model_type", DECODERS)
def test_each_field_is_used_or_refused(tmp_path, model_type):
    """One field after the other away from its default: the logits follow PyTorch's, or an error names the field."""
    defaults = transformers.CONFIG_MAPPING[model_type]().to_dict()
    base = tiny.family_config(**CASES[FIRST[model_type]])
    ids = np.random.default_rng(0).integers(3, 400, (1, 24))
    checked = 0
    for name in sorted({*defaults, "head_dim", "sliding_window"} - families.INERT_FIELDS - SKIPPED):
        value = other_value(name, base.get(name, defaults.get(name)))
        if value is None or name.startswith("_"):
            continue
        folder = tmp_path / name
        config = {**base, name: value}
        try:
            model = make_model(folder, **config)
            with torch.no_grad():
                expected = model(torch.tensor(ids)).logits.numpy()
        except Exception:  # not a model for PyTorch either
            continue
        # As the user's file has it: what transformers writes may leave the field out.
        (folder / "config.json").write_text(json.dumps(config))
        checked += 1
        try:
            got = orpo_jax.load_model(folder, max_length=24).logits(ids)
        except ValueError as error:
            assert name in str(error), (name, str(error))
            continue
        np.testing.assert_allclose(got, expected, atol=2e-4, err_msg=name)
    assert checked > 5
