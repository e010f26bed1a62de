"""XLA's attention in blocks equals dense attention, forward and backward, and reads only what some query sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import LAYOUTS, compile_fast, make_rows, real_tokens

from orpo_jax import attention

MOST, BLOCK, ROW_LENGTH = 10, 9, 61  # seven blocks, of 9 queries rather than 10, the last not whole; several widths


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", MOST)
        patch.setattr(attention, "BLOCK_UNIT", 1)
        assert attention.block_size(ROW_LENGTH) == BLOCK
        yield


def shortened(layout):
    """Returns the layout with its last pair cut, or left out, where a row has no room for it."""
    left, pairs = ROW_LENGTH, []
    for trunk, chosen, rejected in layout:
        pair = trunk, min(chosen, left - trunk), min(rejected, max(left - trunk - chosen, 0))
        if trunk > left or not any(pair):
            break
        pairs.append(pair)
        left -= sum(pair)
    return pairs


def rows_of(*layouts):
    return make_rows(list(map(shortened, layouts)), ROW_LENGTH, slots=ROW_LENGTH)


def random_of(rows, heads=(4, 2), head_dim=8):
    make = lambda seed, heads: jax.random.normal(jax.random.key(seed), (*rows.ids.shape, heads, head_dim))
    return (make(0, heads[0]), make(1, heads[1]), make(2, heads[1])), make(3, heads[0])


@functools.cache
def pull(kind, softcap=None):
    """Returns the compiled function of q, k, v, the gradient of their output, the rows and a window, which is traced as
    in a decoder whose layers differ: output and gradients."""
    def attend(qkv, positions, q_end, window):
        if kind == "dense":
            tokens = jnp.arange(ROW_LENGTH)
            mask = attention.visible(tokens, tokens, q_end)
            if window is not None:
                mask &= attention.within_window(positions, positions, window)
            return attention.attend(*qkv, mask, softcap)
        return attention.row_attention(positions, q_end, softcap, unroll=kind == "unrolled")(*qkv, window, None)[0]

    def call(qkv, cotangent, positions, q_end, window):
        out, back = jax.vjp(lambda qkv: attend(qkv, positions, q_end, window), qkv)
        return out, *back(cotangent)[0]

    return compile_fast(call)


def run(kind, rows, window=None, softcap=None, dtype=jnp.float32):
    qkv, cotangent = random_of(rows)
    real = real_tokens(rows)
    args = jax.tree.map(lambda x: x.astype(dtype), (qkv, jnp.where(real, cotangent, 0)))
    out, *gradients = pull(kind, softcap)(*args, rows.positions, rows.q_end, window)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(dtype)}
    return [np.asarray(x, np.float32) for x in (jnp.where(real, out, 0), *gradients)]


def assert_equal(got, expected):
    for name, a, b in zip(("out", "q", "k", "v"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}, {"window": 5, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("kind", ["loops", "unrolled"])
def test_blocks_give_what_dense_attention_gives(kind, options):
    for rows in map(rows_of, LAYOUTS):
        assert_equal(run(kind, rows, **options), run("dense", rows, **options))


@pytest.mark.parametrize("kind", ["loops", "unrolled"])
def test_bfloat16_gives_what_float32_gives_within_its_rounding(kind):
    rows = rows_of(*LAYOUTS)
    for a, b in zip(run(kind, rows, dtype=jnp.bfloat16), run("dense", rows), strict=True):
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["loops", "unrolled"])
def test_each_row_of_a_micro_batch_gets_its_own_keys(kind):
    rows = rows_of(*LAYOUTS)
    assert_equal(run(kind, rows), run("dense", rows))


lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)).filter(any), min_size=1)


@settings(max_examples=60, deadline=None)
@given(lengths, st.none() | st.integers(1, 30) | st.just(np.iinfo(np.int32).max))
def test_any_row_gives_what_dense_attention_gives(layout, window):
    rows = rows_of(layout)
    assert_equal(run("loops", rows, window), run("dense", rows, window))


@pytest.mark.parametrize("T", [1, 64, 127, 128, 129, 192, 320, 896, 2000])
def test_blocks_are_of_one_size_that_pads_little(T, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 128)
    monkeypatch.setattr(attention, "BLOCK_UNIT", 8)
    size, count = attention.block_size(T), -(-T // 128)
    assert size <= 128 and size % 8 == 0 and 0 <= size * count - T < 8 * count


@pytest.mark.parametrize("layout, window, spoil, second", [
    ([(9, 5, 4), (10, 9, 13)], None, 18, slice(18, 50)),  # the second pair starts with a block of its own
    ([(61, 0, 0)], BLOCK + 1, 27, slice(36, 61)),  # a block sees the block before it, and itself
], ids=["pairs", "window"])
def test_keys_that_nobody_of_a_block_sees_are_not_read(layout, window, spoil, second):
    """Nothing in them can spoil even a product with 0."""
    rows = rows_of(layout)
    (q, k, v), cotangent = random_of(rows)
    spoilt = tuple(x.at[:, :spoil].set(jnp.nan) for x in (k, v))
    cotangent = jnp.zeros_like(cotangent).at[:, second].set(1)
    clean, loops, unrolled = (
        [np.asarray(x)[:, second] for x in pull(kind)((q, *kv), cotangent, rows.positions, rows.q_end, window)]
        for kind, kv in (("loops", (k, v)), ("loops", spoilt), ("unrolled", spoilt)))
    for a, b in zip(clean, loops, strict=True):
        assert np.array_equal(a, b)
    assert np.isnan(unrolled[0]).all()
