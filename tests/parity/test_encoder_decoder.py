"""The encoder-decoder against PyTorch: logits, gradients, generation, export, each field; and TRL's own trainer."""

import json

import numpy as np
import pytest
import test_trl
import tiny
from safetensors.numpy import load_file, save_file

import orpo_jax
from orpo_jax import families

torch = pytest.importorskip("torch", reason="torch is the reference: a CPU build is at hand on Python 3.11 only")
transformers = pytest.importorskip("transformers")

CASES = {
    "relu, tied": {},
    "gated gelu, untied": tiny.T5_GATED,
    "gated silu, tied": dict(feed_forward_proj="gated-silu"),
    "more encoder layers": dict(num_layers=4, num_decoder_layers=1, d_kv=12, relative_attention_num_buckets=10,
                                relative_attention_max_distance=13, layer_norm_epsilon=0.1),
    "as newer files have it": dict(tie_word_embeddings=True, scale_decoder_outputs=False),
}


def reference(folder):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def expected_logits(model, ids, decoder_ids, mask=None):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(decoder_ids),
                     attention_mask=None if mask is None else torch.tensor(mask)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    """Longer than the farthest distance; whole prompts and padded ones."""
    folder, rng = tiny.write_t5(tmp_path, **CASES[case]), np.random.default_rng(0)
    ids, decoder_ids = rng.integers(0, 408, (2, 50)), rng.integers(0, 408, (2, 40))
    model, ours = reference(folder), orpo_jax.load_model(folder)
    expected = expected_logits(model, ids, decoder_ids)
    assert 0.1 < expected.std() < 30
    np.testing.assert_allclose(ours.logits(ids, decoder_ids), expected, atol=1e-4)
    lengths = np.array([50, 17])
    padded = expected_logits(model, ids, decoder_ids, (np.arange(50) < lengths[:, None]).astype(int))
    assert np.abs(padded - expected)[1].max() > 0.01
    np.testing.assert_allclose(ours.logits(ids, decoder_ids, input_lengths=lengths), padded, atol=1e-4)


@pytest.mark.parametrize("case", ["relu, tied", "gated gelu, untied"])
def test_round_trip_is_byte_equal_and_loads(tmp_path, case):
    folder = tiny.write_t5(tmp_path / "hf", **CASES[case])
    orpo_jax.load_model(folder).save(tmp_path / "ours")
    before, after = (load_file(some / "model.safetensors") for some in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys() and ("lm_head.weight" in after) == ("untied" in case)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    again, expected = reference(tmp_path / "ours"), reference(folder).state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_what_pytorch_writes_loads(tmp_path):
    """Older files hold the embedding three times, and a table of biases that no layer reads."""
    folder = tiny.write_t5(tmp_path / "hf")
    reference(folder).save_pretrained(tmp_path / "torch")
    tiny.make_tokenizer(bos=None, closes=True).save_pretrained(tmp_path / "torch")
    ids, decoder_ids = np.arange(24).reshape(2, 12), np.arange(20).reshape(2, 10)
    expected = orpo_jax.load_model(folder).logits(ids, decoder_ids)
    np.testing.assert_array_equal(orpo_jax.load_model(tmp_path / "torch").logits(ids, decoder_ids), expected)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    copies = {f"{side}.embed_tokens.weight": tensors["shared.weight"].copy() for side in ("encoder", "decoder")}
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 4), np.float32)}
    save_file({**tensors, **copies, **unread}, file, metadata={"format": "pt"})
    np.testing.assert_array_equal(orpo_jax.load_model(folder).logits(ids, decoder_ids), expected)
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight: must be shared.weight once more, and differs"):
        orpo_jax.load_model(folder)


def test_generation_is_greedy_pytorch_s(tmp_path):
    folder = tiny.write_t5(tmp_path, scale=0.3)
    model, theirs = orpo_jax.load_model(folder), reference(folder)
    tokenizer, seen = model.pretrained.tokenizer, set()
    prompts = ["the sky is", "please tell me what you think about cats and dogs", ""]
    for prompt, got in zip(prompts, model.generate(prompts, max_new_tokens=12), strict=True):
        out = theirs.generate(tokenizer(prompt, return_tensors="pt")["input_ids"].long(), max_new_tokens=12,
                              # The cache of transformers 5.24 has as many layers as the encoder.
                              use_cache=False, do_sample=False, pad_token_id=2, eos_token_id=1,
                              decoder_start_token_id=2)
        assert got == tokenizer.decode(out[0, 1:], skip_special_tokens=True)
        seen.add(got)
    assert len(seen) > 1


# Sizes that the weights must have, names, and what newer files say in place of tie_word_embeddings.
SKIPPED = {"vocab_size", "num_heads", "id2label", "label2id", "is_encoder_decoder", "head_dim"}
OTHER = {"feed_forward_proj": "gated-relu", "dense_act_fn": "silu", "num_decoder_layers": 1,
         "layer_norm_epsilon": 0.1}


def test_each_field_is_used_or_refused(tmp_path):
    """One field after the other away from its default: the logits follow PyTorch's, or an error names the field."""
    defaults = transformers.CONFIG_MAPPING["t5"]().to_dict()
    ids, decoder_ids = np.random.default_rng(0).integers(3, 400, (2, 2, 30))
    base = np.asarray(orpo_jax.load_model(tiny.write_t5(tmp_path / "base")).logits(ids, decoder_ids))
    used, refused = [], []
    for name in sorted(set(defaults) - families.INERT_FIELDS - SKIPPED):
        value = {**defaults, **tiny.T5}[name]
        other = OTHER.get(name, not value if isinstance(value, bool) else value * 2)
        try:
            folder = tiny.write_t5(tmp_path / name, **{name: other})
            got = orpo_jax.load_model(folder).logits(ids, decoder_ids)
        except ValueError as error:
            assert name in str(error), (name, str(error))
            refused.append(name)
            continue
        np.testing.assert_allclose(got, expected_logits(reference(folder), ids, decoder_ids), atol=1e-4, err_msg=name)
        assert np.abs(got - base).max() > 1e-3, f"{name} changes nothing"
        used.append(name)
    assert refused == ["is_decoder"]
    assert len(used) > 10, used


@pytest.mark.parametrize(("kind", "changes", "longest"), [
    ("standard", {}, None), ("conversational", tiny.T5_GATED, None), ("implicit", {}, 6)],
    ids=["standard", "conversational, v1.1", "implicit, cut"])
def test_twelve_steps_of_trl(tmp_path, one_device, kind, changes, longest):
    pytest.importorskip("trl", reason="TRL is the reference: it needs torch")
    # TRL turns dropout off in modules of that name, and transformers 5.24 drops attention without one.
    # A template that writes EOS would have TRL end responses in two.
    tokenizer = tiny.make_tokenizer(bos=None, closes=True, template=tiny.TEMPLATE.replace("{{ '<eos>' }}", ""))
    folder = tiny.write_t5(tmp_path / "model", scale=0.1, tokenizer=tokenizer, dropout_rate=0.0, **changes)
    rows = tiny.make_rows(test_trl.STEPS * test_trl.PAIRS, kind)
    theirs = test_trl.run_trl(folder, rows, tmp_path / "trl", "AutoModelForSeq2SeqLM", max_completion_length=longest)
    ours = test_trl.run_ours(folder, rows, tmp_path / "ours", data__max_completion_length=longest)
    test_trl.assert_same_run(folder, theirs, ours)
    assert (ours[0][-1]["truncated_fraction"] > 0) == (longest is not None)
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours" / "hf")
    assert json.loads((tmp_path / "ours" / "hf" / "config.json").read_text())["model_type"] == "t5"
