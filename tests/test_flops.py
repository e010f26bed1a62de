"""Work, counted by the compiler: free of noise, so that a test can hold what the layout saves.

The compiler counts a loop's body once, so layers and blocks of attention are laid out one by one here, and the head is
dense.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from benchmarking import flop_count, jax_side
from benchmarking.systems import Settings
from orpo_jax import attention, batching, flops, head, loss, packing, step, weights
from orpo_jax.families import architecture
from orpo_jax.preference import make_pair
from orpo_jax.standin import lengths

PAIRS, SCALE = 64, 0.35
SHAPE = dict(vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, intermediate_size=704, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def arch():
    return architecture(tiny.config_of(**SHAPE), 1024)


@pytest.fixture(scope="module")
def pairs():
    sequence = lambda n: np.zeros(n, np.int32)
    return [make_pair(sequence(p + c), sequence(p + r), p, p)
            for p, c, r in lengths("ultrafeedback", PAIRS, SCALE).tolist()]


def compiled_flops(arch, loss_of_hidden, ids, positions, attend):
    """Returns the compiler's count for a forward and a backward pass."""
    def run(params):
        module = nnx.merge(weights.make_graph(arch), params)
        hidden_BTD, _, _ = module(ids, positions, attend, unroll=True)
        return loss_of_hidden(head.logits(hidden_BTD, *module.unembedding()))

    return jax.jit(jax.grad(run)).lower(weights.abstract_params(arch)).compile().cost_analysis()["flops"]


def logps_of(logits_BTV, targets_BT):
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)[..., 0]


def shared_flops(arch, pairs):
    """Our step: packed rows that share prompts."""
    row_length = 64 * -(-max(len(p.chosen_ids) + len(p.rejected_ids) - 1 - p.shared for p in pairs) // 64)
    sizes = np.array([[len(p.chosen_ids) + len(p.rejected_ids) - 1 - p.shared, 1] for p in pairs])
    plan = [row for row in packing.pack(sizes, np.tile((row_length, 16), (len(pairs), 1))) if row]
    rows = packing.build_rows(pairs, plan, num_rows=len(plan), row_length=row_length, max_pairs=16, share_prompt=True,
                              nll_scope="sequence", nll_reduction="token")

    def loss_of(logits_BTV):
        sums = loss.orpo_sums(logps_of(logits_BTV, rows.targets), jnp.zeros(rows.targets.shape), rows.nll_weights,
                              rows.segments, rows.pair_weights)
        return loss.step_loss(sums, beta=0.1, nll_weight=1.0, pairs=1.0)

    attend = attention.row_attention(jnp.asarray(rows.positions), jnp.asarray(rows.q_end), unroll=True)
    return compiled_flops(arch, loss_of, rows.ids, rows.positions, attend)


def concatenated_flops(arch, pairs):
    """TRL's step: chosen and rejected sequences of a batch, padded to its longest."""
    longest = max(max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    ids = np.zeros((2 * len(pairs), longest), np.int32)
    positions = jnp.broadcast_to(jnp.arange(longest), ids.shape)

    def loss_of(logits_BTV):
        chosen, rejected = jnp.split(logps_of(logits_BTV, ids).mean(-1), 2)
        return loss.orpo_loss(chosen, rejected, -chosen.mean(), beta=0.1)[0]

    return compiled_flops(arch, loss_of, ids, positions, attention.causal_attention(positions))


def test_packed_shared_rows_take_less_than_half_of_the_concatenated_step(arch, pairs):
    ours = shared_flops(arch, pairs)
    concatenated = sum(concatenated_flops(arch, pairs[start:start + 8]) for start in range(0, PAIRS, 8))
    print(f"packed and shared {ours / 1e9:.0f} GFLOP, concatenated {concatenated / 1e9:.0f}: {ours / concatenated:.3f}")
    assert ours <= 0.47 * concatenated


def test_useful_work_is_what_the_compiler_counts(arch):
    """Without a mask every query attends to every key, and a row without padding wastes nothing."""
    B, T = 4, 256
    ids = np.zeros((B, T), np.int32)
    everything = jnp.ones((B, T, T), bool)
    attend = lambda q, k, v, window, cache: (attention.attend(q, k, v, everything), cache)
    counted = compiled_flops(arch, lambda logits: logps_of(logits, ids).mean(), ids,
                             jnp.broadcast_to(jnp.arange(T), ids.shape), attend)
    spec = arch.spec
    formula = flops.flops_of(spec, flops.matmul_weights(arch), B * T, [B * T * T] * spec.num_layers)
    print(f"formula {formula / 1e9:.2f} GFLOP, compiler {counted / 1e9:.2f}: {formula / counted:.3f}")
    assert formula == pytest.approx(counted, rel=0.02)


def make_model(arch, row_length, **changes):
    layout = batching.Layout((row_length,), 1, 1, 16, row_length, 2 * row_length, 1, True)
    return dataclasses.replace(step.make_model(arch, layout, jnp.dtype("float32"), 0.1), **changes)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_two_depths_tell_of_all(arch, monkeypatch, remat):
    model = make_model(arch, 128, remat=remat)
    told = flop_count.row_flops(model, arch, 128)
    monkeypatch.setattr(flop_count, "at_full_depth", lambda count, arch: count(arch))
    assert told == pytest.approx(flop_count.row_flops(model, arch, 128), rel=1e-3)


def test_two_depths_tell_of_all_in_trls_layout(arch):
    settings = Settings("", "", "cpu", "float32")
    micro = np.zeros((4, 128), np.int32), np.full(4, 128), np.full(4, 64)
    count = lambda arch: flop_count.counted(jax.value_and_grad(jax_side.trl_layout_loss(
        arch, settings, unroll=True)), weights.abstract_params(arch), micro)
    assert flop_count.at_full_depth(count, arch) == pytest.approx(count(arch), rel=1e-3)


def test_the_head_of_one_row_is_counted_whole():
    T, V, D = 1024, 2048, 256  # such that passes over logits and weights are little beside products
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, D), (V, D))]

    def fused(hidden_BTD, weight_VD, rows, counts):
        return head.orpo(head.Settings(0.1), hidden_BTD, weight_VD, None, rows, counts)

    def dense(hidden_BTD, weight_VD, rows, counts):
        logits_BTV = head.logits(hidden_BTD, weight_VD)
        sums = loss.orpo_sums(logps_of(logits_BTV, rows.targets), logits_BTV.mean(-1), rows.nll_weights, rows.segments,
                              rows.pair_weights)
        return loss.step_loss(sums, beta=0.1, nll_weight=counts.nll_weight, pairs=counts.pairs), sums

    got, expected = (flop_count.counted(jax.grad(of, (0, 1), has_aux=True), *shapes, packing.empty_rows(1, T, 8),
                                        head.Counts(1.0, 1.0)) for of in (fused, dense))
    assert got == pytest.approx(expected, rel=1e-3)


def test_work_done_again_is_counted_again(arch):
    """Layers under remat do their forward pass twice, less its last product; chunks of the head do their logits so."""
    T, spec = 128, arch.spec
    once = flop_count.row_flops(make_model(arch, T), arch, T)
    again = flop_count.row_flops(make_model(arch, T, remat="full"), arch, T)
    matrices = flops.matmul_weights(arch) - (spec.vocab_size + spec.num_layers * spec.d_mlp) * spec.d_model
    attention = 2 * T * T * spec.num_heads * spec.head_dim * spec.num_layers
    assert again - once == pytest.approx(2 * (T * matrices + attention), rel=0.02)
    chunked = flop_count.row_flops(make_model(arch, T, head_settings=head.Settings(0.1, chunks=2)), arch, T)
    assert chunked - once == pytest.approx(2 * T * spec.vocab_size * spec.d_model, rel=0.01)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attended_pairs_are_counted_one_by_one(window):
    lengths = np.array([0, 1, 4, 5, 6, 30])
    by_hand = [sum(1 for q in range(n) for k in range(q + 1) if window is None or q - k < window) for n in lengths]
    assert flops.attended(lengths, window).tolist() == by_hand


def test_a_shared_trunk_is_work_once(arch):
    one = functools.partial(flops.step_flops, arch)
    trunk, chosen, rejected = 20, 50, 70
    together = one(np.array([[trunk, chosen, rejected]]))
    apart = one(np.array([[0, chosen, 0]])) + one(np.array([[0, rejected, 0]])) - one(np.array([[0, trunk, 0]]))
    assert together == apart > 6 * flops.matmul_weights(arch) * (chosen + rejected - trunk)


def test_peaks_are_found_by_the_names_of_devices():
    for kind, peak in {"TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
                       "TPU v4": 275e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
                       "cpu": None}.items():
        assert flops.peak_flops(kind) == peak
