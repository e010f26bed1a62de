"""Mixtures of experts: the products, their work, and the balance of a step under any layout and mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from trial import Trial, assert_same

from orpo_jax import experts, sharding

SIZES = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8, intermediate_size=64)


def make_case(num_experts, num_used, tokens, *, seed=0, favourites=None, D=8, E=12):
    """Returns x [1, T, D], the weights and indices of experts used, and the experts' weights."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    chosen = np.stack([rng.permutation(favourites or num_experts)[:num_used] for _ in range(tokens)])
    return (normal(1, tokens, D), jnp.abs(normal(1, tokens, num_used)), jnp.asarray(chosen[None]),
            (normal(num_experts, D, E), normal(num_experts, D, E), normal(num_experts, D, E)))


def every_expert(x_BTD, weights_BTC, chosen_BTC, weights):
    """The same, by running every expert on every token."""
    gate, up, down = weights
    h_BTXE = jax.nn.silu(jnp.einsum("btd,xde->btxe", x_BTD, gate)) * jnp.einsum("btd,xde->btxe", x_BTD, up)
    y_BTXD = jnp.einsum("btxe,xde->btxd", h_BTXE, down)
    share_BTX = jnp.einsum("btc,btcx->btx", weights_BTC, jax.nn.one_hot(chosen_BTC, gate.shape[0]))
    return jnp.einsum("btxd,btx->btd", y_BTXD, share_BTX)


def ragged(x_BTD, weights_BTC, chosen_BTC, weights):
    """What accelerators run, on this CPU."""
    order_S = jnp.argsort(chosen_BTC.reshape(-1), stable=True)
    sizes_X = jnp.bincount(chosen_BTC.reshape(-1), length=weights[0].shape[0])
    y_SD = experts._ragged(jax.nn.silu, x_BTD[0], order_S, sizes_X, weights)
    return jnp.sum(y_SD.reshape(*chosen_BTC.shape, -1) * weights_BTC[..., None], axis=2)


@pytest.mark.parametrize("way", [partial(experts.mix, jax.nn.silu), ragged], ids=["blocks", "ragged"])
@pytest.mark.parametrize("case", [(4, 2, 50), (7, 3, 33), (4, 1, 1), (5, 5, 40), (16, 2, 20)], ids=str)
def test_value_and_gradients(way, case):
    x, share, chosen, weights = make_case(*case)
    loss = lambda way: lambda x, share, weights: jnp.sum(jnp.square(way(x, share, chosen, weights)))
    expected = jax.value_and_grad(loss(every_expert), (0, 1, 2))(x, share, weights)
    got = jax.value_and_grad(loss(way), (0, 1, 2))(x, share, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


MIX = jax.jit(partial(experts.mix, jax.nn.silu))


@settings(max_examples=20, deadline=None)
@given(favourites=st.integers(2, 6), tokens=st.sampled_from([1, 65]), seed=st.integers(0, 99))
def test_experts_that_nobody_uses(favourites, tokens, seed):
    case = make_case(6, 2, tokens, seed=seed, favourites=favourites)
    np.testing.assert_allclose(MIX(*case), every_expert(*case), rtol=1e-4, atol=1e-4)


def test_work_follows_the_experts_a_token_uses():
    def flops(num_experts, num_used):
        x, share, chosen, weights = make_case(num_experts, num_used, 512, D=32, E=64)
        loss = lambda x, weights: jnp.sum(jnp.square(experts.mix(jax.nn.silu, x, share, chosen, weights, unroll=True)))
        return jax.jit(jax.grad(loss, (0, 1))).lower(x, weights).compile().cost_analysis()["flops"]

    base, of_many = flops(4, 2), flops(16, 2)
    print(f"two experts used of 4 and of 16: {base / 1e6:.0f} and {of_many / 1e6:.0f} MFLOP")
    assert of_many < 1.4 * base  # with all experts it would be four times as much


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tiny.write_model(tmp_path_factory.mktemp("experts"), scale=0.1, **SIZES, **tiny.EXPERTS)
    return Trial(tiny.skew_routers(folder), coef=1.0)


@pytest.fixture(scope="module")
def expected(trial):
    return trial.step(packing=False, share_prompt=False, row_length=128, rows_per_device=24)


@pytest.mark.parametrize("layout", [
    dict(packing=False, row_length=128, rows_per_device=24), dict(packing=False, row_length=128, rows_per_device=8),
    dict(packing=True), dict(packing=True, share_prompt=False, row_length=128), dict(remat="full"),
], ids=["shared", "shared, three micro-batches", "packed", "packed, not shared", "packed, remat"])
def test_every_layout_gives_the_same_balance(trial, expected, layout):
    got = trial.step(**layout)
    assert expected[3] == 1 and got[0]["aux_loss"] > 2.2  # balanced experts would make it 2
    assert_same(got, expected)


@pytest.mark.parametrize(("mesh", "micro_batches"), [
    ((1, 2, 1, 4), 1), ((1, 2, 1, 4), 3), ((2, 1, 1, 4), 1), ((1, 1, 2, 4), 1), ((1, 2, 2, 2), 3)], ids=str)
def test_experts_on_several_devices(trial, expected, mesh, micro_batches):
    shards = mesh[0] * mesh[1] * mesh[3]
    got = trial.step(mesh, packing=False, row_length=128, rows_per_device=24 // shards // micro_batches)
    assert got[3] == micro_batches
    assert_same(got, expected)


@pytest.mark.parametrize("sizes", [dict(fsdp=4, expert=2), dict(tensor=4, sequence=2)], ids=str)
def test_rows_that_a_mesh_does_not_divide(sizes):
    """Samples are a few rows, a token at a time."""
    case = make_case(4, 2, 5, D=8, E=12)
    with jax.set_mesh(sharding.make_mesh(sizes)):
        got = jax.device_get(MIX(*case))
    np.testing.assert_allclose(got, every_expert(*case), rtol=1e-4, atol=1e-4)


def test_the_balance_loss_has_a_gradient(trial):
    without = Trial(trial.folder, coef=0.0).step()
    with_it = trial.step()
    router = "layers/mlp/router"
    assert np.linalg.norm(with_it[1][router] - without[1][router]) > 0.1 * np.linalg.norm(without[1][router])
    assert "aux_loss" not in without[0]
