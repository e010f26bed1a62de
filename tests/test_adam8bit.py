"""Adam of 8 bits against Adam of float32; stacked layers against a list; one device against eight.

Shape letters: L layers, D model, N query heads, H head size, F mlp, V vocabulary, K blocks along an axis.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from orpo_jax import adam8bit, checkpoint, config, optim, sharding, step
from orpo_jax.adam8bit import block_size, decode, encode

ADAM = (0.9, 0.999, 1e-8)
WIDTHS = [512, 576, 768, 896, 1024, 1536, 2048, 3072, 4096, 4864, 8192, 8960, 11008, 14336, 18944]
HEADS = [32, 64, 80, 96, 128, 256]
MASK = {"embed": False, "layers": {"q": True, "mlp": False, "norm": True}}


def make_optimizer(mask=MASK, **settings):
    settings = dict(name="adamw_8bit", learning_rate=1e-2, weight_decay=0.1, max_grad_norm=None) | settings
    return optim.make_optimizer(config.OptimConfig(**settings), 100, mask)


def random_tree(seed, L=3, D=64, N=4, H=40, F=512, V=96, scale=1.0):
    """Returns weights or gradients: q and mlp of a layer are in blocks, its norm is small, all norms together not."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (V, D), "layers": {"q": (L, D, N, H), "mlp": (L, D, F), "norm": (L, 2048)}}
    # Sizes differ from layer to layer and from element to element, so that a block across layers shows.
    return jax.tree.map(lambda shape: (scale * np.exp(rng.normal(size=shape)) * rng.normal(size=shape)
                                       * np.geomspace(1, 100, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
                                       ).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def separate(tree, L=3):
    """Returns the tree with a tree per layer, and a layer stack that nothing is in."""
    return {"embed": tree["embed"], "layers": {"none": np.zeros(1, np.float32)},
            **{f"layer{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(L)}}


def run(optimizer, params, steps, shardings=None):
    """Returns the weights and the state after all steps, and what was compiled."""
    @jax.jit
    def train_step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if shardings:
        train_step = jax.jit(train_step, in_shardings=(shardings.params, shardings.opt_state, shardings.params),
                             out_shardings=(shardings.params, shardings.opt_state))
    state = jax.jit(optimizer.init, out_shardings=shardings and shardings.opt_state)(params)
    compiled = train_step.lower(params, state, steps[0]).compile()
    for grads in steps:
        if shardings:
            params, grads = (jax.device_put(tree, shardings.params) for tree in (params, grads))
        params, state = train_step(params, state, grads)
    return jax.device_get(params), state, compiled


def gradient_stream(spread, count, shape=(8, 512)):
    """Yields noisy gradients with a mean; elements differ in size, log-normal with deviation `spread`."""
    rng = np.random.default_rng(0)
    sizes, means = np.exp(spread * rng.normal(size=shape)), 0.2 * rng.normal(size=shape)
    for _ in range(count):
        yield (sizes * (means + rng.normal(size=shape))).astype(np.float32)


def errors(spread, count=200):
    """Returns |update - update of float32 Adam| / |update of float32 Adam| of every step."""
    ours, exact = adam8bit.scale_by_adam_8bit(*ADAM), optax.scale_by_adam(*ADAM)
    state, exact_state = (transform.init(np.zeros((8, 512), np.float32)) for transform in (ours, exact))
    update, exact_update, found = jax.jit(ours.update), jax.jit(exact.update), []
    for grads in gradient_stream(spread, count):
        direction, state = update(grads, state)
        expected, exact_state = exact_update(grads, exact_state)
        found.append(np.linalg.norm(direction - expected) / np.linalg.norm(expected))
    return np.array(found)


# Blocks and codes


@pytest.mark.parametrize("n", [*WIDTHS, *HEADS, 1, 16, 131, 2 * 131, 576 * 7])
def test_blocks_divide_an_axis(n):
    assert n % block_size(n) == 0 and (block_size(n) <= adam8bit.MAX_BLOCK or n % 64)
    if n in WIDTHS:
        assert n // 8 % block_size(n) == 0 and block_size(n) >= 64  # none lies on two of 8 devices
    if n in HEADS:
        assert block_size(n) == min(n, 128)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_codes_are_near_over_the_whole_range(dtype):
    x = np.geomspace(1e-4, 1.0, 128, dtype=np.float32) * np.float32(3e-7)
    signed = dtype == jnp.int8
    x = x * np.where(np.arange(128) % 2, -1, 1) if signed else x
    moment = jax.jit(encode, static_argnums=1)(x, dtype)
    error = np.abs(decode(moment) / x - 1)
    assert moment.codes.dtype == dtype and moment.codes.shape == x.shape and moment.scales.shape == (1,)
    # Half a step in the fourth root, which at 1e-4 of the largest is a tenth of the whole range.
    assert error[-1] < 1e-6 and error.max() < (0.18 if signed else 0.09) and error[-32:].max() < 0.03
    zero = encode(jnp.zeros(128), dtype)
    assert not decode(zero).any()


def test_only_zero_blocks_have_a_second_moment_of_zero():
    x = jnp.array([1.0, 1e-30, 0.0] + [0.0] * 125)
    assert (decode(encode(x, jnp.uint8)) >= 9e-7 * 0.9).all()
    assert decode(encode(x, jnp.int8))[2] == 0


# Against float32


@pytest.mark.parametrize(("spread", "mean", "largest"), [(0.5, 0.045, 0.055), (1.5, 0.08, 0.1), (3.0, 0.26, 0.36)])
def test_updates_are_near_those_of_float32(spread, mean, largest):
    found = errors(spread)
    assert found[0] < 1e-6  # the first update comes before any code
    assert found.mean() < mean and found.max() < largest


@pytest.mark.parametrize("moment", [jnp.int8, jnp.uint8])
def test_linear_codes_would_not_be(monkeypatch, moment):
    """Of the first moment they lose what is small; a second one that rounds to zero blows the update up."""
    def linear_encode(x, dtype):
        if dtype != moment:
            return encode(x, dtype)
        largest = 127 if dtype == jnp.int8 else 255
        x = x if dtype == jnp.int8 else x * x
        scales = jnp.abs(x).max(-1, keepdims=True)
        return adam8bit.Moment(jnp.round(largest * x / scales).astype(dtype), scales)

    def linear_decode(code):
        if code.codes.dtype != moment:
            return decode(code)
        x = code.codes * code.scales / (127 if moment == jnp.int8 else 255)
        return x if moment == jnp.int8 else jnp.sqrt(x)

    monkeypatch.setattr(adam8bit, "MIN_SIZE", 1)
    monkeypatch.setattr(adam8bit, "block_size", lambda n: n)
    monkeypatch.setattr(adam8bit, "encode", linear_encode)
    monkeypatch.setattr(adam8bit, "decode", linear_decode)
    assert errors(1.5).mean() > (0.4 if moment == jnp.int8 else 100)


def test_a_regression_ends_where_float32_ends():
    """Inputs of very different sizes, as in the outlier channels of a language model."""
    rng = np.random.default_rng(0)
    sizes = np.exp(1.5 * rng.normal(size=64))
    x = jnp.asarray(rng.normal(size=(256, 64)) * sizes)
    y = x @ jnp.asarray(rng.normal(size=(64, 64)) / sizes[:, None])

    def train(transform):
        optimizer = optax.chain(transform, optax.scale_by_learning_rate(optax.linear_schedule(0.03, 0.0, 300)))
        loss = lambda w, rows: jnp.mean(jnp.square(x[rows] @ w - y[rows]))

        def one(carry, rows):
            w, state = carry
            value, grads = jax.value_and_grad(loss)(w, rows)
            updates, state = optimizer.update(grads, state, w)
            return (w + updates, state), value

        w = jnp.zeros((64, 64))
        batches = jnp.asarray(np.random.default_rng(1).integers(0, 256, size=(300, 32)))
        (w, _), _ = jax.jit(lambda carry: jax.lax.scan(one, carry, batches))((w, optimizer.init(w)))
        return float(loss(w, jnp.arange(256))), float(loss(jnp.zeros((64, 64)), jnp.arange(256)))

    (ours, start), (exact, _) = train(adam8bit.scale_by_adam_8bit(*ADAM)), train(optax.scale_by_adam(*ADAM))
    assert exact < 0.1 * start and abs(ours - exact) < 0.005 * start


def test_small_tensors_are_adamw_s():
    params, steps = random_tree(0), [random_tree(seed, scale=0.1) for seed in range(1, 6)]
    ours, _, _ = run(make_optimizer(), params, steps)
    exact, _, _ = run(make_optimizer(name="adamw"), params, steps)
    np.testing.assert_allclose(ours["layers"]["norm"], exact["layers"]["norm"], rtol=1e-5)
    assert 0 < differ(ours["layers"]["q"], exact["layers"]["q"], params["layers"]["q"]) < 0.1


# Layers, devices, memory


def differ(a, b, start):
    """Returns the distance of two results as a share of the distance that was gone."""
    a, b, start = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b, start))
    return np.linalg.norm(a - b) / np.linalg.norm(a - start)


def test_stacked_layers_are_a_list_of_layers():
    params, steps = random_tree(0), [random_tree(seed, scale=0.1) for seed in range(1, 6)]
    mask = {"embed": False, "layers": False, **{f"layer{i}": MASK["layers"] for i in range(3)}}
    stacked, listed = make_optimizer(), make_optimizer(mask)
    state, listed_state = stacked.init(params), listed.init(separate(params))
    for grads in steps[:2]:  # not compiled, so that no fusion rounds otherwise
        updates, state = stacked.update(grads, state, params)
        listed_updates, listed_state = listed.update(separate(grads), listed_state, separate(params))
        # The same codes, bit for bit; the bias correction, a power, may round otherwise for L counters than for one.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), separate(updates),
                     listed_updates)
        for dtype in (jnp.int8, jnp.uint8):
            counts, listed_counts = (
                np.unique(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree) if leaf.dtype == dtype]),
                          return_counts=True) for tree in (state, listed_state))
            np.testing.assert_array_equal(counts, listed_counts)
    compiled, _, _ = run(stacked, params, steps)
    compiled_listed, _, _ = run(listed, separate(params), [separate(grads) for grads in steps])
    assert differ(separate(compiled), compiled_listed, separate(params)) < 1e-4


SPECS = {"embed": P("tensor", "fsdp"), "layers": {
    "q": P(None, "fsdp", "tensor", None), "mlp": P(None, "fsdp", "tensor"), "norm": P(None, None)}}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (1, 4, 2), (8, 1, 1)], ids=str)
def test_eight_devices_are_one_and_hold_an_eighth_each(sizes):
    params = random_tree(0, N=8, D=512, V=16)
    steps = [random_tree(seed, N=8, D=512, V=16, scale=0.1) for seed in range(1, 4)]
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=False)))
    shapes = jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
                          params, SPECS)
    optimizer = make_optimizer()
    shardings = step.state_shardings(shapes, optimizer, mesh)
    split, state, compiled = run(optimizer, params, steps, shardings)
    one, _, _ = run(optimizer, params, steps)
    # Fusions of other shapes round products otherwise, and a code in a million falls on the other side.
    assert differ(split, one, params) < 1e-4
    text = compiled.as_text()
    assert "ENTRY" in text and not [
        word for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if word in text]
    for leaf in jax.tree.leaves(state):
        if leaf.ndim > 1 and leaf.shape[-1] != 2048:  # codes and their scales, but for counters and norms
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * (sizes[1] * sizes[2]) == leaf.size


@pytest.mark.parametrize("width", [64, 80, 576, 4096, 11008])
def test_a_parameter_takes_about_two_bytes(width):
    state = jax.eval_shape(make_optimizer({"layers": True}).init,
                           {"layers": jax.ShapeDtypeStruct((4, 512, width), jnp.float32)})
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / (4 * 512 * width)
    assert 2 < size < 2.13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_state_keeps_its_types(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(0))
    optimizer = make_optimizer()
    state = jax.eval_shape(optimizer.init, params)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(jax.eval_shape(optimizer.update, random_tree(1), state, params)[1]) == types(state)
    codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype in (jnp.int8, jnp.uint8)]
    assert sorted(leaf.shape for leaf in codes) == sorted(2 * [(96, 64), (3, 64, 4, 40), (3, 64, 512)])


def test_a_checkpoint_holds_it(tmp_path):
    params, grads = random_tree(0), random_tree(1)
    _, state, _ = run(make_optimizer(), params, [grads])
    with checkpoint.Checkpoints(tmp_path, config.CheckpointConfig()) as checkpoints:
        checkpoints.save(1, {"opt_state": state}, {})
        checkpoints.wait()
        restored = checkpoints.restore(1, {"opt_state": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)})["opt_state"]
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
