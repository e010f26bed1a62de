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

BLOCK, ROW_LENGTH = 8, 61  # many blocks, several widths, and a last block that is no whole one


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", BLOCK)
        yield


def cut(layout):
    """Returns the pairs of a layout that a row has room for."""
    ends = np.cumsum([sum(pair) for pair in layout])
    return [pair for pair, end in zip(layout, ends, strict=True) if end <= ROW_LENGTH]


def rows_of(*layouts):
    return make_rows([cut(layout) for layout in layouts], ROW_LENGTH, slots=ROW_LENGTH)


def random_of(rows, heads=(4, 2), head_dim=8):
    make = lambda seed, heads: jax.random.normal(jax.random.key(seed), (*rows.ids.shape, heads, head_dim))
    return (make(0, heads[0]), make(1, heads[1]), make(2, heads[1])), make(3, heads[0])


@functools.cache
def pull(kind, window=None, softcap=None):
    """Returns the compiled function of q, k, v, the gradient of their output and the rows: output and gradients."""
    def attend(qkv, positions, q_end):
        if kind == "dense":
            tokens = jnp.arange(ROW_LENGTH)
            mask = attention.visible(tokens, tokens, q_end)
            if window is not None:
                mask &= attention.within_window(positions, positions, window)
            return attention.attend(*qkv, mask, softcap)
        return attention.row_attention(positions, q_end, softcap, unroll=kind == "unrolled")(*qkv, window, None)[0]

    def call(qkv, cotangent, positions, q_end):
        out, back = jax.vjp(lambda qkv: attend(qkv, positions, q_end), qkv)
        return out, *back(cotangent)[0]

    return compile_fast(call)


def run(kind, rows, **options):
    qkv, cotangent = random_of(rows)
    real = real_tokens(rows)
    out, *gradients = pull(kind, **options)(qkv, jnp.where(real, cotangent, 0), rows.positions, rows.q_end)
    return [np.asarray(x) for x in (jnp.where(real, out, 0), *gradients)]


def assert_equal(got, expected):
    for name, a, b in zip(("out", "q", "k", "v"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("kind", ["loops", "unrolled"])
def test_blocks_give_what_dense_attention_gives(kind, options):
    for rows in map(rows_of, LAYOUTS):
        assert_equal(run(kind, rows, **options), run("dense", rows, **options))


@pytest.mark.parametrize("kind", ["loops", "unrolled"])
def test_rows_of_one_micro_batch_differ(kind):
    rows = rows_of(*LAYOUTS)
    assert_equal(run(kind, rows), run("dense", rows))


lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)).filter(any), min_size=1)


@settings(max_examples=60, deadline=None)
@given(lengths)
def test_any_row_gives_what_dense_attention_gives(layout):
    rows = rows_of(layout)
    assert_equal(run("loops", rows), run("dense", rows))


def test_keys_that_nobody_of_a_block_sees_are_not_read():
    """The second pair starts with a block of its own: nothing in the first can spoil even a product with 0."""
    rows = rows_of([(8, 4, 4), (10, 9, 13)])
    (q, k, v), cotangent = random_of(rows)
    spoilt = tuple(x.at[:, :16].set(jnp.nan) for x in (k, v))
    second = slice(16, 48)
    cotangent = jnp.zeros_like(cotangent).at[:, second].set(1)
    clean, loops, unrolled = (
        [np.asarray(x)[:, second] for x in pull(kind)((q, *kv), cotangent, rows.positions, rows.q_end)]
        for kind, kv in (("loops", (k, v)), ("loops", spoilt), ("unrolled", spoilt)))
    for a, b in zip(clean, loops, strict=True):
        assert np.array_equal(a, b)
    assert np.isnan(unrolled[0]).all()
