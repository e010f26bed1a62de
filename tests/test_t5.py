"""The encoder-decoder: its pairs, its rows, and that no layout, mesh or neighbour changes a number of a step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file
from trial import PAIRS, Trial, assert_same

import orpo_jax
from orpo_jax import (
    batching,
    families,
    flops,
    head,
    optim,
    packing,
    preference,
    pretrained,
    step,
    t5,
    train,
    weights,
)
from orpo_jax import config as config_lib
from orpo_jax.config import DataConfig

START, EOS = 2, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_t5(tmp_path_factory.mktemp("models") / "t5", scale=0.15)


@pytest.fixture(scope="module")
def trial(folder):
    return Trial(folder)


@pytest.fixture(scope="module")
def expected(trial):
    return trial.step(rows_per_device=PAIRS)


# Pairs


def encode(texts, **config):
    tokenizer = tiny.make_tokenizer(bos=None, closes=True)
    encoder = preference.Encoder(tokenizer, (EOS,), DataConfig(**{"max_length": 64, **config}), START)
    prompt, chosen, rejected = texts
    made = preference.Texts(prompt + chosen, prompt + rejected, len(prompt), False, False, False)
    (pair,), lost = encoder([made])
    return pair, int(lost[0]), lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


TEXTS = ("the sky is blue and very clear", " good rivers and mountains", " bad cats")


def test_prompt_and_responses_are_tokenised_apart():
    pair, lost, ids = encode(TEXTS)
    prompt, chosen, rejected = map(ids, TEXTS)
    assert pair.encoder_ids.tolist() == [*prompt, EOS]
    assert pair.chosen_ids.tolist() == [START, *chosen, EOS]
    assert pair.rejected_ids.tolist() == [START, *rejected, EOS]
    assert (pair.chosen_prompt, pair.rejected_prompt, pair.shared, lost) == (1, 1, 1, 0)


def test_eos_comes_once_and_survives_every_cut():
    pair, lost, ids = encode(("the sky is<eos>", " good<eos>", ""), max_completion_length=3, max_prompt_length=3)
    assert pair.encoder_ids.tolist() == [*ids("the sky is")[-2:], EOS]
    assert pair.chosen_ids.tolist() == [START, *ids(" good")[:2], EOS]
    assert pair.rejected_ids.tolist() == [START, EOS]
    assert lost == len(ids("the sky is")) - 2 + max(len(ids(" good")) - 2, 0)


def test_cuts():
    prompt, chosen, _ = map(encode(TEXTS)[2], TEXTS)
    kept = encode(TEXTS, max_prompt_length=4, truncation_mode="keep_start")[0].encoder_ids
    assert kept.tolist() == [*prompt[:3], EOS]
    kept = encode(TEXTS, max_prompt_length=4, truncation_mode="keep_end")[0].encoder_ids
    assert kept.tolist() == [*prompt[-3:], EOS]
    pair = encode(TEXTS, max_length=5)[0]
    assert len(pair.encoder_ids) == 5 and pair.chosen_ids.tolist() == [START, *chosen[:4], EOS]
    long = (TEXTS[0], " good" * 200, " bad")
    assert len(encode(long, max_length=512)[0].chosen_ids) == 1 + 128  # TRL's default
    assert len(encode(long, max_length=512, max_completion_length=150)[0].chosen_ids) == 1 + 150


# Rows


def test_a_row_is_two_branches_of_its_own_encoded_prompt():
    pairs = [packing.Pair(np.array([START, 11, 12, EOS]), np.array([START, 21, EOS]), 1, 1, 1, np.array([5, 6, EOS]))]
    rows = packing.build_rows(pairs, [[0]], num_rows=2, row_length=8, max_pairs=1, share_prompt=True,
                              nll_scope="sequence", nll_reduction="token", encoder_length=4)
    assert rows.ids[0].tolist() == [START, 11, 12, START, 21, 0, 0, 0]
    assert rows.targets[0].tolist() == [11, 12, EOS, 21, EOS, 0, 0, 0]
    assert rows.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert rows.segments[0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert rows.nll_weights[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert rows.q_end[0, :5].tolist() == [3, 3, 3, 5, 5]
    assert rows.encoder_ids.tolist() == [[5, 6, EOS, 0], [0] * 4]
    assert rows.encoder_lengths.tolist() == [3, 0]


def test_no_scope_changes_the_nll(folder, expected):
    """The sequence is the response: 'completion' scores the same tokens, through the gather of scored positions."""
    assert_same(Trial(folder, nll_scope="completion").step(), expected)


# Steps


def test_the_loss_is_that_of_sequences_one_by_one(folder, trial, expected):
    """From LoadedModel's logits, without rows, padding or branches."""
    model, pairs, nlls, odds = orpo_jax.load_model(folder), list(trial.pairs), [], []

    def padded(all_ids):
        return np.array([np.pad(ids, (0, 64 - len(ids))) for ids in all_ids])

    prompts = [pair.encoder_ids for pair in pairs]
    lengths = np.array([len(ids) for ids in prompts])
    logps = [jax.nn.log_softmax(model.logits(padded(prompts), padded(ids), input_lengths=lengths)) for ids in (
        [pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs])]
    for i, pair in enumerate(pairs):
        chosen, rejected = (np.asarray(logps[side][i])[np.arange(len(ids) - 1), ids[1:]]
                            for side, ids in enumerate((pair.chosen_ids, pair.rejected_ids)))
        nlls.append(-chosen)
        odds.append(np.diff([x.mean() - np.log(1 - np.exp(x.mean())) for x in (rejected, chosen)])[0])
    nll, odds_loss = np.concatenate(nlls).mean(), np.log1p(np.exp(-np.array(odds))).mean()
    np.testing.assert_allclose(expected[0]["nll_loss"], nll, rtol=1e-5)
    np.testing.assert_allclose(expected[0]["log_odds_ratio"], -odds_loss, rtol=1e-4)
    np.testing.assert_allclose(expected[0]["loss"], nll + 0.3 * odds_loss, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 8])
def test_micro_batches_are_one_batch(trial, expected, rows):
    got = trial.step(rows_per_device=rows)
    assert expected[3] == 1 and got[3] == PAIRS // rows
    assert_same(got, expected)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 4)], ids=str)
def test_every_mesh_is_one_device(trial, expected, mesh):
    assert_same(trial.step(mesh), expected)


@pytest.mark.parametrize("changes", [dict(remat="minimal"), dict(remat="attention"), dict(remat="full"),
                                     dict(chunks=4), dict(row_length=192), dict(share_prompt=False)], ids=str)
def test_what_a_run_may_change_changes_no_number(trial, expected, changes):
    assert_same(trial.step(**changes), expected)


def test_bfloat16_is_near(trial, expected):
    got = trial.step(dtype=jnp.bfloat16)
    assert abs(got[0]["loss"] - expected[0]["loss"]) < 0.02 * expected[0]["loss"]
    assert got[0]["loss"] != expected[0]["loss"]
    layout = batching.make_layout(trial.pairs, trial.data_config, 1, 1, 1, "cpu")
    model = step.make_model(trial.arch, layout, jnp.dtype("bfloat16"), 0.3)
    hidden, _, _ = model.hidden(orpo_jax.load_model(trial.folder).params, one_row(trial))
    assert hidden.dtype == jnp.bfloat16


def test_prompts_have_their_share_of_a_micro_batch(trial, monkeypatch):
    monkeypatch.setitem(batching.COSTS, "cpu", batching.COSTS["cpu"]._replace(micro_tokens=256))
    layout = batching.make_layout(trial.pairs, trial.data_config, PAIRS, "auto", 1, "cpu")
    assert (layout.row_lengths[-1], layout.encoder_length, layout.rows_per_device) == (64, 64, 2)
    assert not layout.packing and layout.slots([3]) == 3 * 2 * 128


def test_every_weight_has_a_gradient(expected):
    norm = optax.global_norm(expected[1])
    for name, grad in expected[1].items():
        assert np.linalg.norm(grad) > 1e-4 * norm, name


def test_padding_and_the_other_response_are_not_seen(folder, trial):
    """Gradients of a row's loss by its embeddings are zero where nothing may look."""
    module = t5_module(folder)
    rows = one_row(trial)
    end, length = int(rows.bounds[0, 0, 2]), int(rows.encoder_lengths[0])

    def chosen(encoder_ids, ids):
        hidden = module(encoder_ids, rows.encoder_lengths, ids, rows.positions, rows.q_end)
        return hidden[0, :end]

    base = chosen(rows.encoder_ids, rows.ids)
    assert 0 < length < rows.encoder_ids.shape[1] and 0 < end < rows.ids.shape[1]
    np.testing.assert_array_equal(base, chosen(rows.encoder_ids.at[:, length:].set(7), rows.ids.at[:, end:].set(7)))
    assert np.abs(base - chosen(rows.encoder_ids.at[:, length - 1].set(7), rows.ids)).max() > 1e-3
    moved = np.abs(base - chosen(rows.encoder_ids, rows.ids.at[:, 1].set(7))).max(axis=-1)
    assert moved[0] == 0 and (moved[1:] > 0).all()


def t5_module(folder):
    model = orpo_jax.load_model(folder)
    return nnx.merge(model.graph, model.params)


def one_row(trial):
    layout = batching.make_layout(trial.pairs, trial.data_config, 1, 1, 1, "cpu")
    batch, _ = batching.Batches(trial.pairs, layout, 1, trial.orpo, None).batch(0)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch.groups[-1].rows)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets(both_ways):
    """Exact near by, ever coarser, one from the farthest distance on; mirrored, and apart, for keys that come later."""
    got = np.asarray(t5.bucket(jnp.arange(-300, 301), 32, 128, both_ways))
    exact, last = (8, 15) if both_ways else (16, 31)
    before = got[300::-1]  # by distance of keys that come first
    assert before[:exact].tolist() == list(range(exact)) and (np.diff(before) >= 0).all()
    assert (before[128:] == last).all() and before[60] < last
    assert got[301:].tolist() == ([16 + x for x in before[1:].tolist()] if both_ways else [0] * 300)


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_layers_of_each_stack_are_optimised_apart(name):
    """An encoder of 2 layers and a decoder of 3 are five trees to an optimiser with statistics of whole tensors."""
    config = config_lib.OptimConfig(name=name, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=None)
    shapes = {"encoder_layers": (2, 64, 80), "decoder_layers": (3, 64, 80), "embed": (90, 64)}
    params = {key: {"weight": jnp.cos(jnp.arange(np.prod(shape)).reshape(shape))} for key, shape in shapes.items()}
    grads = jax.tree.map(lambda x: 3 * x * x - x, params)

    def update(grads, params):
        optimizer = optim.make_optimizer(config, 4, jax.tree.map(lambda x: True, params))
        return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)

    got = update(grads, params)
    for stack in ("encoder_layers", "decoder_layers"):
        for layer in range(shapes[stack][0]):
            cut = lambda tree, stack=stack, layer=layer: tree[stack]["weight"][layer]
            expected = update({"it": {"weight": cut(grads)}}, {"it": {"weight": cut(params)}})
            np.testing.assert_allclose(cut(got), expected["it"]["weight"], rtol=1e-4, atol=1e-7)


def test_useful_work_is_what_the_compiler_counts():
    """But for the half of the decoder's scores that nobody sees, and what no matmul does."""
    arch = families.architecture({**tiny.T5, **tiny.T5_GATED, "vocab_size": 4096, "d_model": 256, "d_ff": 512,
                                  "d_kv": 64}, 1)
    S, T = 96, 64

    def run(params):
        module = nnx.merge(weights.make_graph(arch), params)
        ids_1T = jnp.zeros((1, T), int)
        hidden = module(jnp.zeros((1, S), int), jnp.full(1, S), ids_1T, ids_1T, jnp.full_like(ids_1T, T), unroll=True)
        return jax.nn.logsumexp(head.logits(hidden, *module.unembedding()), axis=-1).sum()

    counted = jax.jit(jax.grad(run)).lower(weights.random_params(arch, 0)).compile().cost_analysis()["flops"]
    got = flops.step_flops(arch, np.array([[0, T - 10, 10]]), np.array([S]))
    assert 0.9 * counted < got < counted


# Runs


def config_of(folder, output, **sections):
    values = {"output_dir": str(output), "model": {"path": str(folder)}, "data": {"max_length": 64},
              "train": {"batch_size": 4, "max_steps": 4}, "mesh": {"fsdp": 1, "data": 1},
              "optim": {"learning_rate": 1e-3}, "log": {"logging_steps": 1}}
    for name, some in sections.items():
        values[name] = {**values.get(name, {}), **some}
    return config_lib.build(values)


def test_a_run_evaluates_generates_resumes_and_converts(tmp_path, one_device, monkeypatch):
    said = []
    monkeypatch.setattr(train.log, "info", lambda text, *args: said.append(text % args))
    folder = tiny.write_t5(tmp_path / "model", **tiny.T5_GATED)
    rows, held_out = tiny.make_rows(12, "conversational"), tiny.make_rows(5, "standard", seed=1)
    more = dict(eval={"eval_strategy": "steps", "eval_steps": 2, "generate": {"num_samples": 1, "max_new_tokens": 4}},
                checkpoint={"save_steps": 2})
    run = lambda name, **args: train.run(config_of(folder, tmp_path / name, **more), train_rows=rows,
                                         eval_rows=held_out, **args)
    whole = run("whole")
    assert ["a row holds one pair" in line for line in said].count(True) == 1
    assert any("reply:" in line for line in said)
    run("parts", on_step=lambda step, _: step == 2)
    assert run("parts")["loss"] == whole["loss"] and "eval_loss" in whole
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert all(a[name].tobytes() == b[name].tobytes() for name in a) and "lm_head.weight" in a
    loaded = [orpo_jax.load_model(tmp_path / "whole"), orpo_jax.load_model(tmp_path / "whole" / "hf")]
    ids, decoder_ids = np.arange(20).reshape(2, 10), np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(*(model.logits(ids, decoder_ids) for model in loaded))
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["padding_fraction"] < 1


@pytest.mark.parametrize(("sections", "words"), [
    (dict(model={"attention": "cudnn"}), "model.attention: must be 'auto' or 'xla' for an encoder-decoder"),
    (dict(train={"rows_per_step": 2}), "train.rows_per_step: must be None for an encoder-decoder"),
    (dict(data={"overlong": "error", "max_length": 3}), "longer than data.max_length"),
], ids=["attention", "rows_per_step", "overlong"])
def test_what_is_refused(folder, tmp_path, one_device, sections, words):
    with pytest.raises(ValueError) as error:
        train.run(config_of(folder, tmp_path / "run", **sections), train_rows=tiny.make_rows(4, "standard"))
    assert words in str(error.value)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(is_encoder_decoder=False), "is_encoder_decoder"),
    (dict(feed_forward_proj="gated-tanhshrink"), "feed_forward_proj"),
    (dict(relative_attention_num_buckets=7), "relative_attention_num_buckets"),
    (dict(relative_attention_max_distance=4), "relative_attention_max_distance"), (dict(is_decoder=True), "is_decoder"),
    (dict(sliding_window=3), "sliding_window")], ids=str)
def test_configs_that_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        families.architecture({**tiny.T5, **changes}, 64)


def test_published_configs_are_read():
    published = dict(n_positions=512, output_past=True, task_specific_params={"summarization": {"num_beams": 4}},
                     dense_act_fn="gelu_new", is_gated_act=True, tokenizer_class="T5Tokenizer", dropout_rate=0.1)
    arch = families.architecture({**tiny.T5, **tiny.T5_GATED, **published}, 64)
    assert arch.encodes and arch.spec.logit_scale == 1
    assert not families.architecture(tiny.config_of(), 64).encodes


def test_a_start_is_needed(tmp_path):
    folder = tiny.write_t5(tmp_path, decoder_start_token_id=None)
    with pytest.raises(ValueError, match="needs decoder_start_token_id"):
        orpo_jax.load_model(folder).generate("the sky is")
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 2}))
    assert pretrained.open_pretrained(str(folder)).decoder_start == 2


def test_what_logits_takes(folder, model_folder):
    model, ids = orpo_jax.load_model(folder), np.zeros((2, 3), int)
    for args, words in (((ids,), "decoder_input_ids: must be given"), ((ids, ids[:1]), "must have 2 rows"),
                        ((ids, ids + 408), "must be below 408")):
        with pytest.raises(ValueError, match=words):
            model.logits(*args)
    with pytest.raises(ValueError, match="encoder-decoder's"):
        orpo_jax.load_model(model_folder).logits(ids, ids)


def test_a_batch_of_prompts_generates_what_each_does(folder):
    model = orpo_jax.load_model(folder)
    prompts = ["the sky is", "please tell me what you think about cats and dogs and rivers and mountains"]
    assert model.generate(prompts, max_new_tokens=8) == [model.generate(p, max_new_tokens=8)[0] for p in prompts]
    draws = {tuple(model.generate(prompts, max_new_tokens=8, temperature=1.0, seed=seed)) for seed in (0, 0, 1)}
    assert len(draws) == 2
