"""Schedules and optimisers against torch and transformers, and stacked layers against a list of layers.

Shape letters: L layers, D model, N query heads, H head size, F mlp, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orpo_jax.config import OptimConfig
from orpo_jax.optim import learning_rate_schedule, make_optimizer

NAMES = ["adamw", "adamw_8bit", "adafactor", "lion", "sgd"]
# Decay by ndim or by name would get it wrong: a matrix without, a vector with decay.
MASK = {"embed": False, "layers": {"q": True, "mlp": False, "norm": True}}


def shapes(L=3, D=48, N=2, H=33, F=64, V=40):
    return {"embed": (V, D), "layers": {"q": (L, D, N, H), "mlp": (L, D, F), "norm": (L, D)}}


def normal(tree, seed, scale=1.0):
    """Returns float32 numpy arrays of the tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(scale=scale, size=shape).astype(np.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def separate(tree, L, pick=lambda x, i: x[i]):
    """Returns the tree with a dict per layer in the place of the stacked one."""
    layers = {f"layer{i:02d}": jax.tree.map(lambda x, i=i: pick(x, i), tree["layers"]) for i in range(L)}
    return {"embed": tree["embed"], **layers}


def gradients(tree, step):
    """Returns a step's gradients: every other step's are small, so that a limit of 1 clips half."""
    return normal(tree, seed=100 + step, scale=1e-3 if step % 2 else 1.0)


def jitted_step(optimizer, **options):
    """Returns the jitted `(params, state, grads) -> (params, state)`."""
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **options)


def run(config, params, mask, steps, total_steps=20):
    """Returns the parameters after each step, numpy arrays."""
    optimizer = make_optimizer(config, total_steps, mask)
    train_step = jitted_step(optimizer)
    state, history = jax.jit(optimizer.init)(params), []
    for grads in steps:
        params, state = train_step(params, state, grads)
        history.append(jax.device_get(params))
    return history


def one_update(config, params, grads):
    """Returns the first step's updates."""
    optimizer = make_optimizer(config, 10, MASK)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_restarts", {"num_cycles": 5}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.5, "lr_end": 1e-5}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 3}),
    ],
)
def test_schedule_is_transformers(name, kwargs, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    peak, total = 3e-4, 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(total + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()

    config = OptimConfig(
        learning_rate=peak, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup
    )
    rates = jax.jit(jax.vmap(learning_rate_schedule(config, total)))(jnp.arange(total + 1))
    # A few float32 roundings of the share, which has no relative precision where a cosine ends at 0.
    np.testing.assert_allclose(rates / peak, np.array(expected) / peak, rtol=5e-7, atol=2e-7)


def test_warmup_ratio_rounds_up_and_warmup_steps_wins():
    def warmup(**settings):
        schedule = learning_rate_schedule(OptimConfig(learning_rate=1.0, **settings), 21)
        return int(jnp.argmax(jax.vmap(schedule)(jnp.arange(21))))

    assert warmup(warmup_ratio=0.1) == 3
    assert warmup(warmup_ratio=0.1, warmup_steps=7) == 7


def test_restarts_come_on_time():
    # 1 / 49 * 49 < 1 in floating point, where the second cycle would start at 0 instead of at the peak.
    config = OptimConfig(
        learning_rate=1.0, lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 49}
    )
    schedule = jax.jit(jax.vmap(learning_rate_schedule(config, 98)))
    np.testing.assert_allclose(schedule(jnp.arange(98)), [1.0, 0.5] * 49, rtol=1e-6)


def test_polynomial_refuses_an_end_above_the_peak():
    config = OptimConfig(
        learning_rate=1e-6, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1e-5}
    )
    with pytest.raises(ValueError, match="lr_end must be below"):
        learning_rate_schedule(config, 10)


def run_torch(make, params, mask, steps, L, max_grad_norm=None, weight_decay=0.0, total_steps=20):
    """Returns what `run` returns, from a torch optimiser over separate layers under the linear schedule."""
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    def unstacked(tree):
        return [torch.tensor(x) for x in jax.tree.leaves(separate(tree, L))]

    weights = [w.requires_grad_() for w in unstacked(params)]
    decays = jax.tree.leaves(separate(mask, L, pick=lambda x, i: x))
    groups = [
        {"params": [w for w, d in zip(weights, decays, strict=True) if d == decay], "weight_decay": wd}
        for decay, wd in ((True, weight_decay), (False, 0.0))
    ]
    optimizer = make(groups)
    scheduler = get_scheduler("linear", optimizer, 0, total_steps)
    history = []
    for grads in steps:
        for w, grad in zip(weights, unstacked(grads), strict=True):
            w.grad = grad
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
        optimizer.step()
        scheduler.step()
        history.append([w.detach().numpy().copy() for w in weights])
    return history


def assert_same_weights(ours, expected, L, one_step, all_steps):
    for params, reference, rtol in ((ours[0], expected[0], one_step), (ours[-1], expected[-1], all_steps)):
        for a, b in zip(jax.tree.leaves(separate(params, L)), reference, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_adamw_and_sgd_are_torch(name, max_grad_norm):
    torch = pytest.importorskip("torch")
    L, betas, eps = 2, (0.8, 0.95), 1e-4
    tree = shapes(L)
    params, steps = normal(tree, seed=0, scale=0.02), [gradients(tree, step) for step in range(10)]
    config = OptimConfig(
        name=name,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=eps,
        max_grad_norm=max_grad_norm,
    )
    make = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=eps),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
    }[name]
    expected = run_torch(make, params, MASK, steps, L, max_grad_norm, weight_decay=0.1)
    assert_same_weights(run(config, params, MASK, steps), expected, L, one_step=1e-5, all_steps=5e-5)


def test_adafactor_is_transformers():
    pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    L = 3
    # Without q: HF factors its last two axes, N and H, where ours factors the two largest, D and H.
    tree = {"embed": (40, 48), "layers": {"mlp": (L, 64, 48), "wide": (L, 48, 64), "norm": (L, 48)}}
    mask = {"embed": False, "layers": {"mlp": True, "wide": False, "norm": True}}
    params, steps = normal(tree, seed=0, scale=0.02), [gradients(tree, step) for step in range(10)]
    expected = run_torch(
        lambda groups: Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False),
        params,
        mask,
        steps,
        L,
        weight_decay=0.1,
    )
    config = OptimConfig(name="adafactor", learning_rate=1e-3, weight_decay=0.1, max_grad_norm=None)
    assert_same_weights(run(config, params, mask, steps), expected, L, one_step=1e-5, all_steps=5e-5)


def test_lion_is_the_papers():
    tree, lr, decay, b1, b2 = shapes(L=2), 1e-3, 0.1, 0.9, 0.99
    params, steps = normal(tree, seed=0, scale=0.02), [gradients(tree, step) for step in range(10)]
    config = OptimConfig(
        name="lion",
        learning_rate=lr,
        lr_scheduler_type="constant",
        weight_decay=decay,
        adam_beta1=b1,
        adam_beta2=b2,
        max_grad_norm=None,
    )
    ours = jax.tree.leaves(run(config, params, MASK, steps)[-1])

    flat_steps = [jax.tree.leaves(grads) for grads in steps]
    for i, (w, wd) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(MASK), strict=True)):
        w, momentum = np.asarray(w, np.float64), 0.0
        for grads in flat_steps:
            grad = np.asarray(grads[i], np.float64)
            w = w - lr * (np.sign(b1 * momentum + (1 - b1) * grad) + wd * decay * w)
            momentum = b2 * momentum + (1 - b2) * grad
        np.testing.assert_allclose(ours[i], w, rtol=1e-5, atol=1e-8)


# With 35 layers, L is the largest axis of q, and one that adafactor would factor.
@pytest.mark.parametrize("L", [2, 35])
@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_are_a_list_of_layers(name, L):
    tree = shapes(L, D=34, N=2, H=32, F=33)
    params, steps = normal(tree, seed=0, scale=0.02), [gradients(tree, step) for step in range(5)]
    for grads in steps:
        for grads_of_layers in grads["layers"].values():
            # Each layer's gradients have another size, so that statistics that mix layers show.
            grads_of_layers.T[:] *= np.geomspace(1e-3, 1e3, L)
    config = OptimConfig(name=name, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=None)
    stacked = run(config, params, MASK, steps)[-1]

    def listed(tree):
        return {**separate(tree, L), "layers": {"unused": np.zeros(1, np.float32)}}

    mask = {**separate(MASK, L, pick=lambda x, i: x), "layers": False}
    expected = run(config, listed(params), mask, [listed(grads) for grads in steps])[-1]
    for a, b in zip(jax.tree.leaves(listed(stacked)), jax.tree.leaves(expected), strict=True):
        # Five updates of up to 4 * learning_rate, each right to the rounding of a mean over D, about 3e-7.
        np.testing.assert_allclose(a, b, rtol=3e-7, atol=6e-9)


@pytest.mark.parametrize("name", NAMES)
def test_only_masked_in_weights_decay(name):
    params = normal(shapes(), seed=0)
    config = OptimConfig(name=name, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1)
    updates = one_update(config, params, jax.tree.map(np.zeros_like, params))
    expected = jax.tree.map(lambda w, decays: -1e-2 * 0.1 * w if decays else 0 * w, params, MASK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), updates, expected)


def test_clipping_makes_no_array():
    """XLA for CPUs laid a quotient of every gradient down: as many bytes again as the weights have."""
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes(L=30),
                          is_leaf=lambda x: isinstance(x, tuple))
    optimizer = make_optimizer(OptimConfig(max_grad_norm=1.0), 20, MASK)
    # Donated as a train step's: else what is returned would be room for it.
    compiled = jitted_step(optimizer, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(optimizer.init, params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * sum(4 * leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
def test_clips_to_the_limit_or_not_at_all(max_grad_norm):
    tree = shapes()
    params, grads = normal(tree, seed=0), normal(tree, seed=1, scale=1e3)
    config = OptimConfig(
        name="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=max_grad_norm
    )
    updates = one_update(config, params, grads)
    scale = 1.0 if max_grad_norm is None else max_grad_norm / optax.tree.norm(grads)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * scale * g, rtol=1e-6), updates, grads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_state_keeps_its_types_and_has_the_parameters_shapes(name, dtype):
    L, tree = 3, shapes()
    params = jax.tree.map(lambda x: x.astype(dtype), normal(tree, seed=0))
    optimizer = make_optimizer(OptimConfig(name=name), 10, MASK)
    state = jax.eval_shape(optimizer.init, params)
    new_state = jax.eval_shape(optimizer.update, normal(tree, seed=1), state, params)[1]

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert types(new_state) == types(state)
    for moment in {"adamw": ["mu", "nu"], "lion": ["mu"]}.get(name, []):
        assert types(optax.tree_utils.tree_get(state, moment)) == types(params)
    if name == "adafactor":
        factors = [x for path, x in jax.tree.leaves_with_path(state) if "'q'" in jax.tree_util.keystr(path)]
        assert all(x.shape[0] == L for x in factors)
        assert sum(x.size for x in factors) < params["layers"]["q"].size / 10


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mu_dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_first_moment_has_the_type_asked_for(name, mu_dtype, param_dtype):
    params = jax.tree.map(lambda x: x.astype(param_dtype), normal(shapes(), seed=0))
    optimizer = make_optimizer(OptimConfig(name=name, mu_dtype=mu_dtype), 10, MASK)
    state = jax.jit(optimizer.init)(params)
    for step in range(3):
        _, state = jax.jit(optimizer.update)(normal(shapes(), seed=step), state, params)
        mu = optax.tree_utils.tree_get(state, "mu")
        assert {leaf.dtype for leaf in jax.tree.leaves(mu)} == {
            jnp.dtype(param_dtype if mu_dtype == "auto" else mu_dtype)}
        if name == "adamw":
            nu = optax.tree_utils.tree_get(state, "nu")
            assert {leaf.dtype for leaf in jax.tree.leaves(nu)} == {jnp.dtype(param_dtype)}


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_first_moment_of_bfloat16_changes_updates_by_a_rounding(name):
    params = normal(shapes(), seed=0, scale=0.02)
    steps = [normal(shapes(), seed=100 + step) for step in range(20)]
    settings = dict(name=name, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=None)
    wide, narrow = (run(OptimConfig(**settings, mu_dtype=mu_dtype), params, MASK, steps)[-1]
                    for mu_dtype in ("float32", "bfloat16"))
    flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    moved, error = flat(wide) - flat(params), flat(narrow) - flat(wide)
    # bfloat16 rounds by up to 2**-9 a step, adamw's weights moved by 0.7% otherwise; lion's signs flip near 0.
    assert 0 < np.linalg.norm(error) < (0.01 if name == "adamw" else 0.1) * np.linalg.norm(moved)
