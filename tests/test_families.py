"""The families' table: what the page says of it, what is refused, and how fused tensors are cut."""

import json
import pathlib
import re

import einops
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import orpo_jax
from orpo_jax import config as config_lib
from orpo_jax import families, sharding, train, weights

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "families.md"
GPT2 = dict(model_type="gpt2", n_embd=32, n_head=4, n_layer=2)


def test_the_page_lists_every_family():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")][1:]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(families.FAMILIES)


@pytest.mark.parametrize(("model_type", "changes", "words"), [
    ("opt", dict(do_layer_norm_before=False), ["do_layer_norm_before", "opt"]),
    ("opt", dict(word_embed_proj_dim=16), ["word_embed_proj_dim", "hidden_size (32)"]),
    ("opt", dict(_remove_final_layer_norm=True), ["_remove_final_layer_norm"]),
    ("phi", dict(qk_layernorm=True), ["qk_layernorm"]),
    ("cohere", dict(use_qk_norm=True), ["use_qk_norm"]),
    ("qwen2_moe", dict(mlp_only_layers=[0]), ["mlp_only_layers"]),
    ("qwen3_moe", dict(decoder_sparse_step=2), ["decoder_sparse_step"]),
    ("gemma2", dict(use_bidirectional_attention=True), ["use_bidirectional_attention"]),
    ("llama", dict(rope_scaling=dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)),
     ["partial_rotary_factor"]),
    ("qwen3", dict(layer_types=["full_attention", "chunked_attention"]), ["layer_types", "chunked_attention"]),
    ("gpt_bigcode", {}, ["model_type", "gpt_bigcode"]),
])
def test_what_is_refused(model_type, changes, words):
    if model_type == "opt":
        changes = {"word_embed_proj_dim": 32, **changes}
    with pytest.raises(ValueError) as error:
        families.architecture(tiny.family_config(model_type, **changes), 64)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("model_type", "mesh"), [
    ("phi3", (1, 2, 2)), ("gpt2", (2, 2, 2)), ("gpt_neox", (1, 2, 4)), ("mixtral", (1, 2, 2, 2))], ids=str)
def test_a_sharded_import_is_the_whole_one_cut(tmp_path, model_type, mesh):
    """Parts of fused tensors, and experts, are read by each device from the files' own slices."""
    changes = GPT2 if model_type == "gpt2" else {"model_type": model_type}
    arch = families.architecture(tiny.family_config(**changes), 64)
    params = weights.random_params(arch, 0)
    weights.save_params(params, arch, tmp_path, {})
    devices = jax.devices()[:int(np.prod(mesh))]
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh, strict=False)), devices)
    got, whole = (families.flatten(weights.load_params(tmp_path, arch, mesh=some)) for some in (mesh, None))
    for name, value in families.flatten(params).items():
        np.testing.assert_array_equal(whole[name], value)
        np.testing.assert_array_equal(got[name], value)
    assert any(not x.is_fully_replicated for x in got.values())


def test_fused_tensors_lie_as_hf_has_them(tmp_path):
    """GPT-NeoX's file has q, k and v of a head side by side; Phi-3's has all of q, then k, then v."""
    for model_type, hf, pattern in (
            ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", "(n s h) d -> s d n h"),
            ("phi3", "model.layers.1.self_attn.qkv_proj.weight", "(s n h) d -> s d n h")):
        kv_heads = {"num_key_value_heads": 4} if model_type == "phi3" else {}
        arch = families.architecture(tiny.family_config(model_type, **kv_heads), 64)
        params = weights.random_params(arch, 0)
        folder = tmp_path / model_type
        folder.mkdir()
        weights.save_params(params, arch, folder, {})
        qkv = einops.rearrange(load_file(folder / "model.safetensors")[hf], pattern, s=3, n=4)
        for part, name in zip(qkv, "qkv", strict=True):
            np.testing.assert_array_equal(part, params["layers"]["attn"][name]["weight"][1])


def test_positions_past_the_table_are_an_error(tmp_path):
    config = tiny.family_config(**GPT2, n_positions=16)
    arch = families.architecture(config, 16)
    weights.save_params(weights.random_params(arch, 0), arch, tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny.make_tokenizer().save_pretrained(tmp_path)
    model = orpo_jax.load_model(tmp_path)
    assert model.logits(np.zeros((1, 16), int)).shape == (1, 16, 408)
    with pytest.raises(ValueError, match="at most the model's 16 positions, got 17"):
        model.logits(np.zeros((1, 17), int))
    with pytest.raises(ValueError, match="at most the model's 16 positions"):
        model.generate("the sky is", max_new_tokens=16)


def test_a_coefficient_without_experts_is_an_error(tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    config = config_lib.build({"output_dir": str(tmp_path / "run"), "model": {"path": str(folder)},
                               "orpo": {"router_aux_loss_coef": 0.1}, "train": {"batch_size": 2, "max_steps": 1}})
    with pytest.raises(ValueError, match="router_aux_loss_coef: must be 0 or unset"):
        train.run(config, train_rows=tiny.make_rows(4, "standard"))


@pytest.mark.parametrize(("model_type", "head"), [("llama", "lm_head"), ("gpt_neox", "embed_out")])
def test_a_tied_head_may_lie_in_the_files_too(tmp_path, model_type, head):
    """Older files have it; one that differs from the embedding is no tied head."""
    config = tiny.family_config(model_type, tie_word_embeddings=True)
    arch = families.architecture(config, 16)
    params = weights.random_params(arch, 0)
    weights.save_params(params, arch, tmp_path, {})
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embed = next(weight.hf for weight in arch.table if weight.path == "embed")
    save_file({**tensors, f"{head}.weight": tensors[embed].copy()}, file)
    np.testing.assert_array_equal(weights.load_params(tmp_path, arch)["embed"], params["embed"])
    save_file({**tensors, f"{head}.weight": tensors[embed] + 1}, file)
    with pytest.raises(ValueError, match=rf"{head}\.weight: must be {embed} once more, and differs"):
        weights.load_params(tmp_path, arch)
