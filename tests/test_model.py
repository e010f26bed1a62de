"""The decoder's parts that have gradients of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from orpo_jax import kernels, packing, weights
from orpo_jax.families import architecture
from orpo_jax.model import normed


def by_autodiff(centred, eps, x, scale):
    """As `normed`, from what JAX has gradients of."""
    axes, x = tuple(range(-scale.ndim, 0)), x.astype(jnp.float32)
    if centred:
        x = x - jnp.mean(x, axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps) * scale


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("scale_shape", [(8,), (3, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_has_the_gradients_of_its_equation(centred, scale_shape, dtype):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(1.0, 2.0, (2, 5, 3, 8)), to) for to in (dtype, "float32"))
    x, scale, eps = x.at[0, 0].set(0), jnp.asarray(rng.normal(size=scale_shape), jnp.float32), 0.1
    (y, back), (expected_y, expected_back) = (
        jax.vjp(lambda x, scale, norm=norm: norm(centred, eps, x, scale), x, scale) for norm in (normed, by_autodiff))
    np.testing.assert_array_equal(y, expected_y)
    for grad, expected in zip(back(dy), expected_back(dy), strict=True):
        assert grad.dtype == expected.dtype
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (grad, expected)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("centred", "means"), [(False, 1), (True, 3)])
def test_a_norms_sums_of_products_are_dot_products(centred, means):
    """Means there are of x's squares and, centred, of x and of the gradient. See `normed`."""
    x, scale = jnp.ones((2, 5, 8)), jnp.ones(8)
    back = jax.vjp(lambda x, scale: normed(centred, 1e-5, x, scale), x, scale)[1]
    text = str(jax.make_jaxpr(back)(x))
    assert (text.count("dot_general["), text.count("reduce_sum[")) == (2, means)


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("remat", ["minimal", "attention"])
def test_of_attention_its_output_is_kept_once(remat, backend):
    """Beside it, by 'minimal', the queries, which are as many numbers."""
    T, layers, heads, size = 128, 3, 4, 64
    arch = architecture(tiny.config_of(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
                                       head_dim=size, hidden_size=48, intermediate_size=80), T)
    graph, rows = weights.make_graph(arch), packing.empty_rows(1, T, 2)

    def residuals(params):
        attend = kernels.row_attention_of(backend, rows, expanded_length=T, interpret=backend != "xla")
        run = lambda params: nnx.merge(graph, params)(rows.ids, rows.positions, attend, remat=remat)[0]
        return jax.vjp(run, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, weights.abstract_params(arch)))
    assert [x.size for x in kept].count(layers * T * heads * size) == {"minimal": 2, "attention": 1}[remat]
