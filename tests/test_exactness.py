"""The whole step against sequences run one by one: no layout, back end, remat, chunk or micro-batch moves a number."""

import functools
import importlib.util
import itertools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trial import KEEP_GRADIENTS

from orpo_jax import attention, batching, head, kernels, loss, packing, sharding, weights
from orpo_jax import step as step_lib
from orpo_jax.families import architecture, flatten, nest
from orpo_jax.model import REMAT
from orpo_jax.preference import make_pair

# Every batch has these shapes, whatever its pairs and layout: a program is compiled once.
T, ROWS, MICRO_BATCHES, SLOTS, V, BETA = 64, 3, 3, 3, 48, 0.3
LONGEST = T + 1  # tokens of a sequence: its last one is no input
FAMILIES = {
    "llama": tiny.config_of("llama", vocab_size=V),
    "qwen2": tiny.config_of("qwen2", vocab_size=V, tie_word_embeddings=True),
    "mistral": tiny.config_of("mistral", vocab_size=V, sliding_window=5),
}
BACKENDS = ["xla", "cudnn_packed", "cudnn", "cudnn_mask", "splash", pytest.param("tokamax", marks=pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="needs tokamax"))]
# Compiling is nearly all the time that these tests take. Later versions of JAX know no other kind of fusion.
OPTIONS = {"xla_backend_optimization_level": 0} | (
    {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {})


@functools.cache
def model_of(family):
    """Returns an architecture and its weights, among them biases that are not zero and norms that are not one."""
    arch, rng = architecture(FAMILIES[family], LONGEST), np.random.default_rng(0)
    make = lambda path, x: (path.endswith("scale") + 0.15 * rng.normal(size=x.shape)).astype(np.float32)
    return arch, nest({path: make(path, x) for path, x in flatten(weights.abstract_params(arch)).items()})


# Pairs


class Lengths(NamedTuple):
    """A pair: tokens of the common prompt, of each prompt's own end, and of the responses."""

    shared: int
    chosen_own: int
    rejected_own: int
    chosen: int
    rejected: int


class Drawn(NamedTuple):
    """Some pairs, and how they are scored and laid out in micro-batches."""

    pairs: list[Lengths]
    seed: int = 0
    identical: bool = False  # the first pair's responses are the same
    fills: str | None = None  # the first pair takes a whole row: 'shared' or 'unshared'
    nll_scope: str = "sequence"
    nll_reduction: str = "token"
    micro_batches: int = 1


pairs = st.lists(st.builds(Lengths, st.integers(0, 8), st.integers(0, 2), st.integers(0, 2), st.integers(1, 8),
                           st.integers(1, 8)), min_size=1, max_size=SLOTS)
drawn = st.builds(Drawn, pairs, st.integers(0, 99), st.booleans(), st.sampled_from([None, "shared", "unshared"]),
                  st.sampled_from(["sequence", "completion"]), st.sampled_from(["token", "sequence"]),
                  st.sampled_from([1, MICRO_BATCHES]))
HARD = [
    Drawn([Lengths(0, 0, 0, 4, 3), Lengths(3, 0, 0, 1, 1)]),  # an empty prompt, and responses of one token
    Drawn([Lengths(0, 0, 0, 1, 5), Lengths(4, 0, 0, 3, 2)], micro_batches=3),  # nothing predicts the only chosen token
    Drawn([Lengths(5, 1, 2, 3, 4), Lengths(5, 2, 0, 3, 4), Lengths(0, 1, 1, 2, 2)]),  # prompts differ at their end
    Drawn([Lengths(7, 0, 0, 6, 1), Lengths(4, 0, 0, 3, 5)], fills="shared", micro_batches=3),
    Drawn([Lengths(7, 0, 0, 6, 1), Lengths(4, 0, 0, 3, 5)], fills="unshared"),
    Drawn([Lengths(6, 0, 0, 5, 5), Lengths(2, 0, 0, 3, 5)], identical=True),
    Drawn([Lengths(6, 0, 1, 2, 7), Lengths(2, 0, 0, 3, 5)], nll_scope="completion", nll_reduction="sequence"),
]


def make_pairs(drawn):
    rng, made = np.random.default_rng(drawn.seed), []
    for i, length in enumerate(drawn.pairs):
        some = lambda count: rng.integers(0, V, count)
        start = some(length.shared)
        chosen_prompt, rejected_prompt = (np.append(start, some(own)) for own in (length.chosen_own,
                                                                                  length.rejected_own))
        chosen, rejected = some(length.chosen), some(length.rejected)
        if i == 0 and drawn.identical:
            rejected_prompt, rejected = chosen_prompt, chosen
        sides = [np.append(prompt, response).astype(np.int32) for prompt, response in (
            (chosen_prompt, chosen), (rejected_prompt, rejected))]
        pair = make_pair(*sides, len(chosen_prompt), len(rejected_prompt))
        if i == 0 and drawn.fills:
            room = T - length_of(pair, drawn.fills == "shared")
            pair = pair._replace(rejected_ids=np.append(pair.rejected_ids, some(room)).astype(np.int32))
        made.append(pair)
    return made


def length_of(pair, shared):
    return int(packing.pair_length(len(pair.chosen_ids), len(pair.rejected_ids), pair.shared, shared))


# The step


def batch_of(drawn, pairs, packed, shared):
    """Returns the pairs as one step's batch, or None where a pair is longer than a row."""
    sizes = np.array([[length_of(pair, shared), 1] for pair in pairs])
    if sizes[:, 0].max() > T:
        return None
    plan = [row for row in packing.pack(sizes, np.tile((T, SLOTS if packed else 1), (len(pairs), 1))) if row]
    if drawn.micro_batches > 1:  # a row to each
        plan = [row for one in plan for row in (one, *[[]] * (ROWS - 1))]
    rows = packing.build_rows(pairs, plan, num_rows=MICRO_BATCHES * ROWS, row_length=T, max_pairs=SLOTS,
                              share_prompt=shared, nll_scope=drawn.nll_scope, nll_reduction=drawn.nll_reduction)
    counts = head.Counts(*(np.float32(x.sum() or 1) for x in (rows.nll_weights, rows.pair_weights)))
    rows = jax.tree.map(lambda x: x.reshape(MICRO_BATCHES, ROWS, *x.shape[1:]), rows)
    return batching.StepBatch((batching.Group(rows, np.int32(drawn.micro_batches)),), counts)


EMPTY = batch_of(Drawn([]), [make_pair(np.zeros(1, np.int32), np.zeros(1, np.int32), 0, 0)], True, True)
interpreted = functools.partial(mock.patch.object, kernels, "row_attention_of",
                                functools.partial(kernels.row_attention_of, interpret=True))


@functools.cache
def step_of(family, backend="xla", remat="none", chunks=1):
    """Returns the compiled train step as a function from a batch to its metrics and gradients."""
    arch, params = model_of(family)
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    layout = batching.Layout((T,), ROWS, 1, SLOTS, T, 2 * T, ROWS * MICRO_BATCHES, True)
    model = step_lib.Model(weights.make_graph(arch), jnp.dtype("float32"), layout, head.Settings(BETA, chunks),
                           backend, remat=remat)
    with jax.set_mesh(mesh), interpreted():
        abstract = weights.abstract_params(arch, jnp.float32, mesh)
        shardings = step_lib.state_shardings(abstract, KEEP_GRADIENTS, mesh)
        step = step_lib.make_train_step(model, KEEP_GRADIENTS, lambda _: 0.0, shardings)
        compiled = step.lower(step_lib.abstract_state(abstract, KEEP_GRADIENTS, shardings), EMPTY).compile(
            compiler_options=OPTIONS)

    def call(batch):
        state = step_lib.TrainState(np.int32(0), jax.tree.map(np.copy, params), jax.tree.map(np.zeros_like, params))
        state, sums, norm, _ = compiled(jax.device_put(state, shardings), batch)
        return loss.metrics(jax.device_get(sums), beta=BETA) | {"grad_norm": norm}, flatten(
            jax.device_get(state.opt_state))

    return call


# The reference


def plain_attention(positions_1T, window):
    """Returns causal attention of whole sequences, all scores at once."""
    mask_1TT = positions_1T[:, :, None] >= positions_1T[:, None]
    if window is not None:
        mask_1TT &= positions_1T[:, :, None] - positions_1T[:, None] < window
    return lambda q, k, v, _, cache: (attention.attend(q, k, v, mask_1TT), cache)


@functools.cache
def one_by_one(family):
    """Returns the jitted function from parameters and sequences, chosen ones first, to loss, metrics and gradients.

    N sequences are padded to the same length: what comes after a sequence is out of its sight.
    """
    arch, _ = model_of(family)
    graph, positions_1T = weights.make_graph(arch), jnp.arange(T)[None]
    attend = plain_attention(positions_1T, arch.spec.windows[0])

    def run(params, ids_NL, prompts_N, lengths_N, completion, by_sequence):
        module = nnx.merge(graph, params)
        hidden_NTD, _, _ = module(ids_NL[:, :-1], jnp.broadcast_to(positions_1T, ids_NL[:, 1:].shape), attend)
        logits_NTV = jnp.einsum("ntd,vd->ntv", hidden_NTD, module.unembedding()[0])
        logps_NT = jnp.take_along_axis(jax.nn.log_softmax(logits_NTV), ids_NL[:, 1:, None], 2)[..., 0]
        targets_1T = 1 + positions_1T
        real_NT = targets_1T < lengths_N[:, None]
        response_NT = real_NT & (targets_1T >= prompts_N[:, None])
        count_N = response_NT.sum(1)
        mean_N = jnp.sum(jnp.where(response_NT, logps_NT, 0), 1) / jnp.maximum(count_N, 1)
        P = len(ids_NL) // 2
        counts_P = ((count_N[:P] > 0) & (count_N[P:] > 0)).astype(jnp.float32)
        scored_PT = jnp.where(completion, response_NT, real_NT)[:P].astype(jnp.float32)
        scored_PT /= jnp.where(by_sequence, jnp.maximum(scored_PT.sum(1, keepdims=True), 1), 1)
        nll = -jnp.sum(scored_PT * logps_NT[:P]) / jnp.where(scored_PT.sum() > 0, scored_PT.sum(), 1)
        of_batch, metrics = loss.orpo_loss(*jnp.where(count_N > 0, mean_N, -1).reshape(2, P), nll, beta=BETA,
                                           weights_P=counts_P)
        for side, at in (("chosen", slice(0, P)), ("rejected", slice(P, None))):
            weight_PT = counts_P[:, None] * response_NT[at]
            metrics[f"logits/{side}"] = jnp.sum(weight_PT * logits_NTV[at].mean(-1)) / jnp.maximum(weight_PT.sum(), 1)
        return of_batch, (metrics, jnp.sum(counts_P * (jnp.abs(mean_N[:P] - mean_N[P:]) < 1e-5)))

    return jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=OPTIONS)


def expected_of(family, drawn, pairs):
    """Returns metrics, gradients, and the share of pairs of which rounding says which response is the likelier."""
    ids = np.zeros((2 * SLOTS, LONGEST), np.int32)
    prompts, lengths = np.zeros((2, 2 * SLOTS), np.int32)
    for i, pair in enumerate(pairs):
        for at, sequence, prompt in ((i, pair.chosen_ids, pair.chosen_prompt),
                                     (i + SLOTS, pair.rejected_ids, pair.rejected_prompt)):
            ids[at, :len(sequence)], prompts[at], lengths[at] = sequence, prompt, len(sequence)
    _, params = model_of(family)
    (value, (metrics, level)), grads = one_by_one(family)(
        params, ids, prompts, lengths, drawn.nll_scope == "completion", drawn.nll_reduction == "sequence")
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    # Pairs of which a response has no target are no part of the share.
    count = sum(min(len(p.chosen_ids) - max(p.chosen_prompt, 1), len(p.rejected_ids) - max(p.rejected_prompt, 1)) > 0
                for p in pairs)
    return metrics | {"grad_norm": optax.global_norm(grads)}, flatten(jax.device_get(grads)), float(
        level) / max(count, 1)


def assert_same(got, expected, level):
    """Everything within 1e-5; of a difference, of what it is the difference of.

    The gradients of scores cancel: those of a query that sees one key are zero, but for the rounding of what cancels.
    Where little else is left of the gradients of q and k, that counts: a few roundings (6e-8) of the whole gradient.
    """
    (metrics, grads), (expected_metrics, expected_grads) = got, expected
    logp = max(abs(float(expected_metrics[f"logps/{side}"])) for side in ("chosen", "rejected"))
    within = {"log_odds_chosen": 1e-5 * logp, "rewards/margins": 1e-5 * BETA * logp, "rewards/accuracies": level}
    for name, value in expected_metrics.items():
        allowed = max(within.get(name, 0.0), 1e-5 * max(abs(value), 1e-1))
        assert abs(metrics[name] - value) <= allowed, f"{name}: {metrics[name]}, not {value}"
    norm = np.float64(optax.global_norm(expected_grads))
    assert set(grads) == set(expected_grads)
    for name, value in expected_grads.items():
        if np.linalg.norm(value) > 1e-6 * norm:
            rounding = 3e-7 * norm if name.startswith(("layers/attn/q", "layers/attn/k")) else 0.0
            error = np.linalg.norm(grads[name] - value)
            assert error <= 1e-5 * np.linalg.norm(value) + rounding, (name, error, np.linalg.norm(value), norm)


def check(step, family, drawn):
    """Compares every layout with the reference."""
    pairs = make_pairs(drawn)
    *expected, level = expected_of(family, drawn, pairs)
    batches = [batch_of(drawn, pairs, *layout) for layout in itertools.product((False, True), repeat=2)]
    for batch in batches:
        if batch is not None:
            assert_same(step(batch), expected, level)


def hard_ones(test):
    for drawn in HARD:
        test = example(drawn)(test)
    return test


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(drawn=drawn)
@hard_ones
def test_every_back_end_gives_the_numbers_of_single_sequences(family, backend, drawn):
    check(step_of(family, backend), family, drawn)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("remat", REMAT)
@settings(max_examples=4, deadline=None)
@given(drawn=drawn)
@hard_ones
def test_no_remat_and_no_chunk_moves_a_number(remat, chunks, drawn):
    check(step_of("llama", "xla", remat, chunks), "llama", drawn)


# Influence


@functools.cache
def influence_of(family, backend):
    """Returns the compiled function from rows to the gradient of their input embeddings [B, T, D].

    It is that of the mean log-probability of one response in each row: of branch r in row r.
    """
    arch, params = model_of(family)
    graph, module = weights.make_graph(arch), nnx.merge(weights.make_graph(arch), params)

    def run(inputs_BTD, rows):
        # A word to each position: the table's gradient is the positions'.
        own = nnx.merge(graph, {**params, "embed": inputs_BTD.reshape(-1, inputs_BTD.shape[-1])})
        attend = kernels.row_attention_of(backend, rows, interpret=True)
        hidden_BTD, _, _ = own(jnp.arange(rows.ids.size).reshape(rows.ids.shape), rows.positions, attend)
        logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, module.unembedding()[0])
        logps_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), rows.targets[..., None], 2)[..., 0]
        asked_BT = rows.segments == 1 + jnp.arange(len(rows.ids))[:, None]
        return jnp.sum(jnp.where(asked_BT, logps_BT, 0) / jnp.maximum(asked_BT.sum(1, keepdims=True), 1))

    table = jnp.asarray(params["embed"])
    step = jax.jit(lambda rows: jax.grad(run)(table[rows.ids], rows), compiler_options=OPTIONS)
    return lambda rows: np.asarray(step(rows))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=4, deadline=None)
@given(drawn=drawn)
@hard_ones
def test_no_token_of_another_pair_or_branch_has_any_influence(backend, shared, drawn):
    """The gradient of a response's log-probability is exactly zero at every input but its own sequence's."""
    pairs = make_pairs(drawn._replace(fills=None))[:2]
    plan = [range(len(pairs))] * 4  # the same pairs in each row, and row r asks about response r
    rows = packing.build_rows(pairs, plan, num_rows=4, row_length=80, max_pairs=2, share_prompt=shared,
                              nll_scope="sequence", nll_reduction="token")
    gradient_BTD = influence_of("llama", backend)(rows)
    assert np.isfinite(gradient_BTD).all()
    for row, (pair, side) in enumerate(itertools.product(range(len(pairs)), (0, 1))):
        trunk, *branches = rows.bounds[row, pair]
        at = np.flatnonzero(rows.segments[row] == row + 1)
        own = np.r_[trunk:branches[0], branches[side]:at[-1] + 1] if at.size else np.array([], int)
        felt = np.flatnonzero(np.abs(gradient_BTD[row]).sum(-1))
        np.testing.assert_array_equal(felt, own)
