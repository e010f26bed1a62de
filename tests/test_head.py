"""The fused head against autodiff of dense logits: loss, sums, and gradients of hidden states, weight and bias."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from orpo_jax import head, loss, packing, sharding
from orpo_jax.preference import make_pair

B, T, D, V, BETA = 8, 32, 16, 48, 0.3
FIRST = ("hidden", "weight", "bias")


def make_rows(nll_scope="sequence"):
    """Rows of packed pairs, one of them empty."""
    rng, pairs = np.random.default_rng(0), []
    for _ in range(2 * (B - 1)):
        prompt, chosen, rejected = (rng.integers(0, V, rng.integers(1, 6)) for _ in range(3))
        ids = [np.append(prompt, answer).astype(np.int32) for answer in (chosen, rejected)]
        pairs.append(make_pair(*ids, len(prompt), len(prompt)))
    plan = [[2 * i, 2 * i + 1] for i in range(B - 1)]
    return packing.build_rows(pairs, plan, num_rows=B, row_length=T, max_pairs=3, share_prompt=True,
                              nll_scope=nll_scope, nll_reduction="token")


def arrays(scale=1.0, vocab=V):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, D), (vocab, D), (vocab,))
    return tuple(scale * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def counts(rows):
    return head.Counts(jnp.float32(rows.nll_weights.sum()), jnp.float32(rows.pair_weights.sum()))


def dense(settings, hidden, weight, bias, rows):
    logits = head.logits(hidden, weight, bias, settings.softcap)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], -1)[..., 0]
    sums = loss.orpo_sums(logps, logits.mean(-1), rows.nll_weights, rows.segments, rows.pair_weights)
    return loss.step_loss(sums, beta=BETA, nll_weight=counts(rows).nll_weight, pairs=counts(rows).pairs), sums


def fused(settings, hidden, weight, bias, rows):
    return head.orpo(settings, hidden, weight, bias, rows, counts(rows))


def both(function, settings, args, rows, wanted=(0, 1, 2)):
    return jax.jit(jax.value_and_grad(functools.partial(function, settings), wanted, has_aux=True))(*args, rows)


def assert_same(got, expected, within=1e-5):
    (got_loss, got_sums), got_grads = got
    (expected_loss, expected_sums), expected_grads = expected
    assert abs(got_loss - expected_loss) <= within * abs(expected_loss)
    for name, value in expected_sums.items():
        assert abs(got_sums[name] - value) <= within * max(abs(value), 0.1), name
    for name, a, b in zip(FIRST, got_grads, expected_grads, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.linalg.norm(a - b) <= within * np.linalg.norm(b), name


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunks", [1, 4, 32])
def test_it_equals_autodiff_of_dense_logits(chunks, softcap):
    settings, rows = head.Settings(BETA, chunks, softcap), make_rows()
    assert_same(both(fused, settings, arrays(), rows), both(dense, settings, arrays(), rows))


@pytest.mark.parametrize("chunks", [1, 2])
def test_prompts_that_no_loss_reads_skip_it(chunks):
    rows = make_rows("completion")
    most = int(((rows.segments > 0) | (rows.nll_weights > 0)).sum(-1).max())
    assert most < T
    for scored in (most, most + most % 2, T):
        settings = head.Settings(BETA, chunks if scored % chunks == 0 else 1, scored=scored)
        assert_same(both(fused, settings, arrays(), rows), both(dense, settings, arrays(), rows))
    compiled = [jax.jit(functools.partial(both, fused, head.Settings(BETA, 1, scored=scored))).lower(
        arrays(), rows).compile().cost_analysis()["flops"] for scored in (most, T)]
    assert compiled[0] < (most + 2) / T * compiled[1]


def test_without_a_bias_there_is_no_gradient_of_one():
    settings, rows, (hidden, weight, _) = head.Settings(BETA), make_rows(), arrays()
    got = both(fused, settings, (hidden, weight, None), rows, (0, 1))
    assert_same(got, both(dense, settings, (hidden, weight, None), rows, (0, 1)))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("chunks", [1, 4])
def test_every_mesh_gives_the_same_and_splits_the_gradient_as_the_weight(mesh, chunks):
    settings, rows, args = head.Settings(BETA, chunks, 3.0), make_rows(), arrays()
    expected = both(fused, settings, args, rows)
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh, strict=False)))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(
            args, (P(sharding.BATCH_AXES), P("tensor", "fsdp"), P("tensor")), strict=True)]
        got = both(fused, settings, placed, rows)
        assert got[1][1].sharding.is_equivalent_to(placed[1].sharding, 2)
        assert_same(jax.device_get(got), expected)


def test_a_vocabulary_that_the_mesh_does_not_divide_is_whole_on_every_device():
    rows, args = make_rows(), arrays(vocab=V + 1)
    expected = both(fused, head.Settings(BETA), args, rows)
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        assert_same(jax.device_get(both(fused, head.Settings(BETA), args, rows)), expected)


def matmuls(function, *args):
    """Returns how many products give a matrix; a sum over a row's words may be a product with a vector."""
    return len(re.findall(r":\w+\[\d+(?:,\d+)+\] = dot_general", str(jax.make_jaxpr(function)(*args))))


def test_a_pass_over_a_row_takes_three_matmuls_a_frozen_head_two_and_an_evaluation_one():
    rows, args = make_rows(), arrays()
    run = lambda settings, wanted: matmuls(
        jax.grad(lambda *args: fused(settings, *args, rows)[0], wanted), *args)
    assert run(head.Settings(BETA), (0, 1, 2)) == 3
    assert run(head.Settings(BETA), 0) == 2
    assert run(head.Settings(BETA, 4), (0, 1)) == 4
    assert matmuls(lambda *args: fused(head.Settings(BETA), *args, rows)[0], *args) == 1


def test_on_cpus_exps_are_made_once():
    rows, args = make_rows(), arrays()
    text = jax.jit(jax.grad(lambda *args: fused(head.Settings(BETA), *args, rows)[0], (0, 1, 2))).lower(
        *args).compile().as_text()
    assert re.findall(r"(\S+\[[^]]*\])\S* exponential\(", text).count(f"f32[{T},{V}]") == 1


def test_a_frozen_head_changes_no_other_gradient():
    rows, args = make_rows(), arrays()
    both_wanted = both(fused, head.Settings(BETA), args, rows)
    frozen = both(fused, head.Settings(BETA), args, rows, (0,))
    assert_same((frozen[0], frozen[1]), (both_wanted[0], both_wanted[1][:1]), within=0)


def test_cotangents_of_the_sums_are_ignored_and_that_of_the_loss_is_not():
    rows, args = make_rows(), arrays()
    grad = jax.grad(lambda *args: fused(head.Settings(BETA), *args, rows)[0], (0, 1))(*args)
    other = jax.grad(lambda *args: 3 * fused(head.Settings(BETA), *args, rows)[0]
                     + fused(head.Settings(BETA), *args, rows)[1]["nll"], (0, 1))(*args)
    for a, b in zip(other, grad, strict=True):
        np.testing.assert_allclose(a, 3 * b, rtol=1e-6)


def test_bfloat16_adds_the_weights_gradient_up_in_float32():
    """A row's part is rounded to bfloat16, by at most 2**-9, and the sum over rows is not."""
    rows, (hidden, weight, _) = make_rows(), arrays()
    args = (hidden.astype(jnp.bfloat16), weight, None)
    got = both(fused, head.Settings(BETA), args, rows, (0, 1))
    assert got[1][0].dtype == jnp.bfloat16 and got[1][1].dtype == jnp.float32
    exact = both(dense, head.Settings(BETA), (args[0].astype(jnp.float32), weight.astype(jnp.bfloat16).astype(
        jnp.float32), None), rows, (0, 1))
    assert np.linalg.norm(got[1][1] - exact[1][1]) <= 2**-8 * np.linalg.norm(exact[1][1])
    assert abs(got[0][0] - exact[0][0]) <= 1e-5 * abs(exact[0][0])


def temporary_bytes(num_rows, T, D, V, chunks):
    shapes = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    rows = jax.tree.map(lambda x: shapes(num_rows, *x.shape[1:], dtype=x.dtype), packing.empty_rows(1, T, 2))
    step = lambda hidden, weight, rows: jax.grad(
        lambda hidden, weight: head.orpo(head.Settings(BETA, chunks), hidden, weight, None, rows,
                                         head.Counts(1.0, 1.0))[0], (0, 1))(hidden, weight)
    compiled = jax.jit(step).lower(shapes(num_rows, T, D), shapes(V, D), rows).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("vocab", [32_000, 152_064, 256_000])
@pytest.mark.parametrize("chunks", [1, 4])
def test_twice_the_rows_take_the_same_memory(chunks, vocab):
    """But for what is of the size of the hidden states, which the head is given and gives back."""
    few, many = (temporary_bytes(rows, 2048, 64, vocab, chunks) for rows in (4, 8))
    logits, weight = 2048 // chunks * vocab * 4, vocab * 64 * 4
    print(f"V {vocab}, {chunks} chunks: {few / 1e6:.0f} MB for 4 rows, {many / 1e6:.0f} MB for 8; logits of a chunk "
          f"{logits / 1e6:.0f} MB")
    assert many <= 1.05 * few
    # The logits of one chunk and the weight's gradient, and next to nothing else.
    assert logits <= few <= 1.05 * (logits + weight)


def test_the_budget_decides_on_chunks():
    assert head.num_chunks(2048, 152_064) == 1
    assert head.num_chunks(2048, 262_144) == 2
    assert head.num_chunks(2049, 262_144) == 3
    assert head.num_chunks(97, 10**9) == 97
    rows, (hidden, weight, _) = make_rows(), arrays()
    assert matmuls(jax.grad(lambda *args: fused(head.Settings(BETA), *args, rows)[0]), hidden, weight, None) == 2
