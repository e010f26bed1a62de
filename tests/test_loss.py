import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_jax import loss

# 60-digit arithmetic: chosen logp, rejected logp, log odds ratio, its logsigmoid, dL_OR/dchosen, dL_OR/drejected.
GOLDEN = [
    (-1, -1.5, 0.706192686, -0.401135488, -0.522749431, 0.425348811),
    (-0.7282, -0.9978, 0.468923838, -0.485923258, -0.74411065, 0.609638348),
    (-0.5, -0.5, 0, -0.693147181, -1.27074704, 1.27074704),
    (-1e-4, -2, 11.064876914, -1.56524244e-5, -0.156530845, 1.81021633e-5),
    (-3, -0.05, -5.919558928, -5.922241711, -1.04957613, 20.449232),
    (-12, -11, -1.000010558, -1.313269406, -0.731065146, 0.731072865),
]


@pytest.mark.parametrize(("chosen", "rejected", "ratio", "logsigmoid", "d_chosen", "d_rejected"), GOLDEN)
def test_golden_values(chosen, rejected, ratio, logsigmoid, d_chosen, d_rejected):
    def l_or(w, l):
        return loss.odds_ratio_terms(w, l)[0]

    w, l = jnp.float32(chosen), jnp.float32(rejected)
    np.testing.assert_allclose(loss.odds_ratio_terms(w, l)[1], ratio, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(-l_or(w, l), logsigmoid, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(l_or, (0, 1))(w, l), (d_chosen, d_rejected), rtol=1e-6)


@settings(deadline=None, max_examples=200)
@given(st.floats(-200, 0, width=32), st.floats(-200, 0, width=32))
def test_finite_for_every_logp(chosen, rejected):
    value, grads = jax.value_and_grad(lambda w, l: loss.odds_ratio_terms(w, l)[0], (0, 1))(chosen, rejected)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("chosen", [0.0, -1e-12, -1e-8, -1e-6, -1e-3, -90.0, -200.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-12, -1e-8, -1e-6, -1e-3, -90.0, -200.0])
def test_finite_at_the_ends(chosen, rejected):
    value, grads = jax.value_and_grad(lambda w, l: loss.odds_ratio_terms(w, l)[0], (0, 1))(chosen, rejected)
    assert np.isfinite(value) and np.isfinite(grads).all()


def numpy_orpo(chosen, rejected, nll, beta):
    odds = lambda x: x - np.log1p(-np.exp(x))
    ratio = odds(chosen) - odds(rejected)
    return nll + beta * np.mean(np.log1p(np.exp(-ratio))), ratio


def test_orpo_loss_is_the_paper_s_equation():
    chosen, rejected = np.array([-1.0, -0.4, -2.0]), np.array([-1.5, -0.9, -1.0])
    expected, ratio = numpy_orpo(chosen, rejected, 1.7, 0.25)
    value, metrics = loss.orpo_loss(jnp.array(chosen), jnp.array(rejected), jnp.float32(1.7), beta=0.25)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["log_odds_chosen"], ratio.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.25 * chosen.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.25 * (chosen - rejected).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll_loss"], 1.7, rtol=1e-6)


def test_ties_are_not_wins():
    _, metrics = loss.orpo_loss(jnp.array([-1.0]), jnp.array([-1.0]), jnp.float32(0), beta=0.1)
    assert metrics["rewards/accuracies"] == 0


def test_beta_zero_is_the_nll():
    value, _ = loss.orpo_loss(jnp.array([-1.0]), jnp.array([-3.0]), jnp.float32(0.7), beta=0.0)
    np.testing.assert_allclose(value, 0.7, rtol=1e-7)


def test_a_pair_of_weight_zero_changes_nothing():
    chosen, rejected = jnp.array([-1.0, -0.4]), jnp.array([-1.5, -0.9])
    one = loss.orpo_loss(chosen[:1], rejected[:1], jnp.float32(1.0), beta=0.3)
    two = loss.orpo_loss(chosen, rejected, jnp.float32(1.0), beta=0.3, weights_P=jnp.array([1.0, 0.0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, two)


def one_row(segments, logps):
    """Sums of one row whose first slot holds a pair."""
    segments, logps = jnp.array([segments]), jnp.array([logps], jnp.float32)
    weights = (segments == 1).astype(jnp.float32)
    return lambda logps, pair_weight: loss.orpo_sums(logps, logps * 2, weights, segments,
                                                     jnp.array([[pair_weight]])), logps


def test_sums_are_means_over_response_tokens():
    sums_of, logps = one_row([0, 1, 1, 2, 2, 2, 0], [-9, -1, -2, -3, -4, -8, -9])
    metrics = loss.metrics(sums_of(logps, 1.0), beta=0.1)
    np.testing.assert_allclose(metrics["logps/chosen"], -1.5)
    np.testing.assert_allclose(metrics["logps/rejected"], -5)
    np.testing.assert_allclose(metrics["logits/rejected"], -10)
    np.testing.assert_allclose(metrics["nll_loss"], 1.5)


@pytest.mark.parametrize("segments", [[0, 0, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]])
def test_an_empty_response_is_finite_and_weighs_nothing(segments):
    sums_of, logps = one_row(segments, [-1.0, -2.0, -3.0, -4.0])

    def pair_part(logps):
        return sums_of(logps, 0.0)["odds_ratio_loss"]

    value, grad = jax.value_and_grad(pair_part)(logps)
    assert value == 0
    assert not np.any(grad)


def test_a_nan_is_not_hidden():
    sums_of, logps = one_row([1, 1, 2, 2], [-1.0, np.nan, -3.0, -4.0])
    assert np.isnan(loss.metrics(sums_of(logps, 1.0), beta=0.1)["loss"])


def test_parts_of_a_step_add_up():
    rng = np.random.default_rng(0)
    logps = -rng.uniform(0.1, 4, (6, 20)).astype(np.float32)
    segments = rng.integers(0, 5, (6, 20))
    nll_weights = rng.uniform(0, 1, (6, 20)).astype(np.float32)
    pair_weights = np.ones((6, 2), np.float32)
    parts = lambda rows: loss.orpo_sums(*(jnp.asarray(x[rows]) for x in (
        logps, logps, nll_weights, segments, pair_weights)))
    whole = parts(slice(None))
    added = jax.tree.map(lambda a, b: a + b, parts(slice(0, 2)), parts(slice(2, 6)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, added)
    step = dict(beta=0.3, nll_weight=whole["nll_weight"], pairs=whole["pairs"])
    pieces = sum(loss.step_loss(parts(rows), **step) for rows in (slice(0, 2), slice(2, 6)))
    np.testing.assert_allclose(pieces, loss.metrics(whole, beta=0.3)["loss"], rtol=1e-5)
