"""Every back end of attention gives what the reference gives, forward and backward, for every kind of row."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_jax import kernels, packing, sharding
from orpo_jax.model import REMAT

# Pairs as (trunk, chosen branch, rejected branch) of rows of 64 tokens with 5 slots.
ROW_LENGTH, SLOTS, BRANCH_LENGTH, EXPANDED_LENGTH = 64, 5, 52, 120
LAYOUTS = [
    [(5, 7, 3), (9, 2, 20)],  # some padding
    [(0, 4, 4), (3, 1, 1), (0, 1, 9)],  # no trunk, single tokens
    [(20, 22, 22)],  # one pair that fills its row
    [(1, 1, 1)] * 5,  # every slot used
    [(0, 20, 30)],  # unshared
    [(30, 3, 4), (20, 1, 6)],  # several pairs that fill their row
    [(8, 0, 5)],  # a branch of nothing but its trunk
    [],
]
EXPANDING = ["cudnn_packed", "cudnn", "splash"]
BACKENDS = ["cudnn_packed", "cudnn", "cudnn_mask", "splash", "tokamax"]
PACKED = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="wrong in JAX before 0.11")


def make_pair(trunk, chosen, rejected):
    ids = lambda length: np.arange(length + 1, dtype=np.int32)
    return packing.Pair(ids(trunk + chosen), ids(trunk + rejected), trunk + 1, trunk + 1, trunk + 1)


def make_rows(layouts=LAYOUTS, row_length=ROW_LENGTH, slots=SLOTS):
    pairs = [make_pair(*pair) for layout in layouts for pair in layout]
    starts = np.cumsum([0, *map(len, layouts)])
    plan = [range(start, start + len(layout)) for start, layout in zip(starts, layouts, strict=False)]
    return packing.build_rows(pairs, plan, num_rows=len(layouts), row_length=row_length, max_pairs=slots,
                              share_prompt=True, nll_scope="sequence", nll_reduction="token")


def real_tokens(rows):
    """Returns which tokens are no padding, as [B, T, 1, 1]."""
    return (np.arange(rows.ids.shape[1]) < rows.bounds[:, :, 3].max(axis=1)[:, None])[..., None, None]


def available(backend):
    if backend == "tokamax":
        pytest.importorskip("tokamax")


# Compiling is all the time that these tests take.
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case:
    """Random queries, keys and values of some rows, and a gradient that reaches no padding."""

    def __init__(self, rows=None, heads=(4, 2), head_dim=16, dtype=jnp.float32, scale=1.0, **options):
        self.rows = make_rows() if rows is None else rows
        self.options = dict(branch_length=BRANCH_LENGTH, expanded_length=EXPANDED_LENGTH, interpret=True, **options)
        make = lambda seed, heads: (scale * jax.random.normal(
            jax.random.key(seed), (*self.rows.ids.shape, heads, head_dim))).astype(dtype)
        self.qkv = make(0, heads[0]), make(1, heads[1]), make(2, heads[1])
        self.real = real_tokens(self.rows)
        self.cotangent = jnp.where(self.real, make(3, heads[0]), 0)

    def pull(self, backend, window=None):
        """Returns the function of q, k, v and the rows that gives the output and the gradients."""
        def call(qkv, rows):
            def loss(qkv):
                out, cache = kernels.row_attention_of(backend, rows, **self.options)(*qkv, window, "cache")
                assert cache == "cache"
                return jnp.sum((out * self.cotangent).astype(jnp.float32)), out

            gradients, out = jax.grad(loss, has_aux=True)(qkv)
            return jnp.where(self.real, out, 0), *gradients

        return call

    def run(self, backend, window=None):
        rows = jax.tree.map(jnp.asarray, self.rows)
        return [np.asarray(x, np.float32) for x in compile_fast(self.pull(backend, window))(self.qkv, rows)]


def assert_near(got, expected, within=1e-5):
    for name, a, b in zip(("out", "q", "k", "v"), got, expected, strict=True):
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= within * np.abs(b).max(), name


# The expansion


lengths = st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 6)).filter(lambda pair: sum(pair) > 0)


@functools.partial(jax.jit, static_argnames="line")
def there_and_back(x_BT, bounds_BS4, line):
    T = x_BT.shape[1]
    lengths_BR = kernels.branch_lengths(bounds_BS4)
    E = 2 * T if line else 15 * lengths_BR.shape[1]
    starts_BR = jnp.cumsum(lengths_BR, axis=1) - lengths_BR if line else jnp.broadcast_to(
        15 * jnp.arange(lengths_BR.shape[1]), lengths_BR.shape)
    expansion = kernels.make_expansion(bounds_BS4, starts_BR, T, E)
    branches_BE, back = jax.vjp(lambda x: kernels.expand(x, expansion), x_BT)
    rows_BT, back_again = jax.vjp(lambda x: kernels.collapse(x, expansion), branches_BE)
    return starts_BR, branches_BE, back(jnp.ones_like(branches_BE))[0], rows_BT, back_again(jnp.ones_like(x_BT))[0]


@pytest.mark.parametrize("line", [True, False])
@settings(max_examples=60, deadline=None)
@given(layouts=st.lists(st.lists(lengths, max_size=3), min_size=2, max_size=2))
def test_branches_hold_their_tokens(layouts, line):
    rows = make_rows(layouts, row_length=63, slots=3)
    x_BT = 1 + np.arange(2 * 63, dtype=np.float32).reshape(2, 63)
    starts, branches, grad, back, grad_back = map(
        np.asarray, there_and_back(x_BT, rows.bounds, line))
    expected, expected_grad, expected_back = np.zeros_like(branches), np.zeros_like(x_BT), np.zeros_like(branches)
    for b, layout in enumerate(layouts):
        for s in range(len(layout)):
            trunk, chosen, rejected, end = rows.bounds[b, s]
            for branch, tokens in enumerate([np.r_[trunk:rejected], np.r_[trunk:chosen, rejected:end]]):
                start = starts[b, 2 * s + branch]
                expected[b, start:start + len(tokens)] = x_BT[b, tokens]
                expected_grad[b, tokens] += 1
                own = branch * (chosen - trunk)
                expected_back[b, start + own:start + len(tokens)] = 1
    np.testing.assert_array_equal(branches, expected)
    np.testing.assert_array_equal(grad, expected_grad)
    np.testing.assert_array_equal(back, np.where(real_tokens(rows)[..., 0, 0], x_BT, 0))
    np.testing.assert_array_equal(grad_back, expected_back)


@pytest.mark.parametrize("backend", EXPANDING)
def test_there_is_no_scatter(backend):
    case = Case()
    text = jax.jit(case.pull(backend)).lower(case.qkv, jax.tree.map(jnp.asarray, case.rows)).as_text()
    assert "gather" in text and "scatter" not in text


# Against the reference


@pytest.mark.parametrize(("backend", "heads", "window", "head_dim"), [
    ("cudnn_packed", (4, 4), None, 16), ("cudnn_packed", (4, 1), 2, 16), ("cudnn_packed", (4, 2), 5, 80),
    ("cudnn", (4, 4), None, 16), ("cudnn", (4, 1), 2, 16), ("cudnn", (4, 2), 5, 80), ("cudnn", (2, 1), None, 256),
    ("cudnn_mask", (4, 2), None, 64), ("cudnn_mask", (4, 2), 5, 96),
    ("splash", (2, 2), None, 64), ("splash", (4, 1), 5, 80), ("splash", (4, 2), 2, 16),
    ("tokamax", (2, 2), None, 64), ("tokamax", (4, 1), 5, 80),
], ids=str)
def test_every_back_end_agrees_with_the_reference(backend, heads, window, head_dim):
    available(backend)
    case = Case(heads=heads, head_dim=head_dim)
    assert_near(case.run(backend, window), case.run("xla", window))


def test_a_window_or_its_lack_shows():
    case = Case()
    with_window, without = case.run("xla", 5), case.run("xla")
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(with_window, without, strict=True))


@pytest.mark.parametrize("backend", ["cudnn_mask", "tokamax"])
def test_a_traced_window_is_a_window(backend):
    available(backend)
    case = Case()
    rows = jax.tree.map(jnp.asarray, case.rows)
    got = compile_fast(lambda window: case.pull(backend, window)(case.qkv, rows))(jnp.int32(5))
    assert_near(got, case.run("xla", 5))


@pytest.mark.parametrize("backend", ["splash", "tokamax"])
def test_the_soft_cap_is_exact(backend):
    available(backend)
    case, without = Case(softcap=2.0, scale=2.0), Case(scale=2.0)
    expected = case.run("xla")
    assert_near(case.run(backend), expected)
    assert np.abs(expected[0] - without.run("xla")[0]).max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_near_float32(backend):
    available(backend)
    expected = Case(head_dim=128).run("xla")
    got = Case(head_dim=128, dtype=jnp.bfloat16).run(backend)
    assert_near(got, expected, within=0.03)
    assert not np.array_equal(got[0], expected[0])


@pytest.mark.parametrize("backend", ["xla", *BACKENDS])
def test_no_token_of_another_pair_or_branch_has_any_influence(backend):
    """The gradient of one region's outputs is exactly zero at all tokens that it must not see."""
    available(backend)
    rows = make_rows([[(5, 7, 3), (9, 2, 20)]] * 6)
    bounds = rows.bounds[0, :2]
    regions = [slice(*bounds[s, i:i + 2]) for s in range(2) for i in range(3)]
    seen = [[0], [0, 1], [0, 2], [3], [3, 4], [3, 5]]  # the regions that each one sees
    case = Case(rows)
    # Row r asks about region r.
    here = jnp.stack([jnp.zeros(ROW_LENGTH).at[at].set(1) for at in regions])
    case.cotangent *= here[..., None, None]
    _, *gradients = case.run(backend)
    for name, gradient in zip("qkv", gradients, strict=True):
        for r, regions_seen in enumerate(seen):
            sums = [np.abs(gradient[r, at]).sum() for at in regions]
            for other in range(6):
                assert (sums[other] > 0) == (other in (regions_seen if name != "q" else [r])), (name, r, other)


@jax.custom_vjp
def spoil_gradient(x, unused):
    """Returns x, whose gradient is not a number at the unused places."""
    return x


spoil_gradient.defvjp(lambda x, unused: (x, unused), lambda unused, g: (jnp.where(unused, jnp.nan, g), None))


@pytest.mark.parametrize("backend", ["cudnn_packed", "cudnn"])
def test_what_a_kernel_makes_of_unused_places_is_never_seen(backend, monkeypatch):
    """cuDNN promises nothing for what lies past a sequence's length, or in none."""
    attend, in_line = jax.nn.dot_product_attention, kernels._interpreted_line

    def spoilt(run, qkv, unused):
        return jnp.where(unused, jnp.nan, run(*(spoil_gradient(x, unused) for x in qkv)))

    def padded(*qkv, query_seq_lengths, **kwargs):
        unused = (jnp.arange(qkv[0].shape[1]) >= query_seq_lengths[:, None])[..., None, None]
        return spoilt(lambda *qkv: attend(*qkv, query_seq_lengths=query_seq_lengths, **kwargs), qkv, unused)

    def packed(q, k, v, lengths, starts, window):
        stops, places = starts[:, :-1] + lengths, jnp.arange(q.shape[1])[:, None]
        used = ((starts[:, None, :-1] <= places) & (places < stops[:, None]) & (lengths > 0)[:, None]).any(-1)
        return spoilt(lambda *qkv: in_line(*qkv, lengths, starts, window), (q, k, v), ~used[..., None, None])

    case = Case()
    expected = case.run("xla")
    if backend == "cudnn":
        monkeypatch.setattr(jax.nn, "dot_product_attention", padded)
    else:
        monkeypatch.setattr(kernels, "_interpreted_line", packed)
    assert_near(case.run(backend), expected)


def test_sequences_in_line_are_told_as_jax_wants_them():
    """Lengths and starts, -1 for none, and one more start than sequences."""
    told = []
    rows = jax.tree.map(jnp.asarray, make_rows([[(5, 7, 3), (8, 0, 5)], []]))
    attend = kernels._cudnn_packed(rows, 64, lambda q, k, v, *tables: told.extend(tables) or q)
    attend(*[jnp.zeros((2, ROW_LENGTH, 1, 8))] * 3, 7, None)
    lengths, starts, window = told
    none = [-1] * 6
    assert lengths.tolist() == [[12, 8, 8, 13, *none], [-1] * 10]
    assert starts.tolist() == [[0, 12, 20, 28, *none, -1], [-1] * 11] and window == 7


@pytest.fixture
def cudnn_library(monkeypatch):
    """JAX believes that cuDNN is there, so that its calls can be traced, and lowered for CUDA."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)


# On a mesh


@pytest.mark.parametrize(("backend", "heads", "mesh_sizes"), [
    ("cudnn_packed", (4, 2), (2, 2, 2)),
    ("cudnn", (4, 2), (2, 2, 2)), ("cudnn", (4, 2), (1, 2, 4)), ("cudnn_mask", (4, 1), (2, 2, 2)),
    ("splash", (4, 1), (2, 2, 2)), ("tokamax", (4, 2), (2, 2, 2)),
], ids=str)
def test_a_mesh_changes_nothing(backend, heads, mesh_sizes):
    available(backend)
    case = Case(heads=heads)
    expected = case.run("xla")
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh_sizes, strict=False)))
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES)))
        qkv, rows = jax.tree.map(put, (case.qkv, case.rows))
        step = compile_fast(case.pull(backend)).lower(qkv, rows).compile()
        got = step(qkv, rows)
    assert_near([np.asarray(x) for x in got], expected)
    # Each device has its part of the rows, and of the query heads.
    assert got[0].sharding.shard_shape(got[0].shape)[0] == len(LAYOUTS) // (mesh_sizes[0] * mesh_sizes[1])
    text = step.as_text()
    assert "ENTRY" in text and "all-to-all" not in text and "collective-permute" not in text


@pytest.mark.parametrize(("backend", "operands"), [  # of 2 of 8 rows with 10 branches, and 2 of 4 heads
    ("cudnn", "tensor<20x52x2x16xbf16>, tensor<20x52x1x16xbf16>, tensor<20x52x1x16xbf16>, tensor<20xi32>"),
    pytest.param("cudnn_packed", "tensor<2x120x2x16xbf16>, tensor<2x120x1x16xbf16>, tensor<2x120x1x16xbf16>, "
                 "tensor<2x10xi32>, tensor<2x10xi32>, tensor<2x11xi32>, tensor<2x11xi32>", marks=PACKED),
])
def test_on_cuda_each_device_calls_cudnn_on_its_own_rows_and_heads(backend, operands, cudnn_library):
    case = Case(dtype=jnp.bfloat16)
    case.options["interpret"] = False
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES)))
        traced = jax.jit(case.pull(backend)).trace(*jax.tree.map(put, (case.qkv, case.rows)))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
    assert "fmhaSoftmax(" in forward and "fmhaSoftmaxBackward(" in backward
    # JAX makes cuDNN's tables of the packed sequences with some.
    scattered = re.findall(r'"stablehlo.scatter".*?-> (tensor<[^>]*>)\n', text, re.DOTALL)
    assert all(kind.endswith("xi32>") for kind in scattered) and bool(scattered) == (backend == "cudnn_packed")
    assert operands in forward


# Under jax.checkpoint


def calls(jaxpr, primitives):
    """Returns how often a program calls one of some primitives; compilers drop what has no result."""
    total = 0
    for equation in jaxpr.eqns:
        if not equation.outvars and not equation.effects:
            continue
        total += equation.primitive.name in primitives
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += calls(inner, primitives) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(("backend", "meshed", "forward", "backward"), [
    ("splash", False, "pallas_call", 2), ("splash", True, "pallas_call", 2), ("tokamax", False, "pallas_call", 1),
    pytest.param("cudnn_packed", True, "dot_product_attention_fwd_wrapper", 0, marks=PACKED),
    ("cudnn", False, "dot_product_attention_fwd_wrapper", 0), ("cudnn", True, "dot_product_attention_fwd_wrapper", 0),
    ("cudnn_mask", False, "dot_product_attention_fwd_wrapper", 0),
], ids=str)
def test_no_kernel_runs_forward_twice(backend, meshed, forward, backward, cudnn_library):
    available(backend)
    case = Case(dtype=jnp.bfloat16, heads=(2, 2))
    case.options["interpret"] = False  # nothing runs
    rows = jax.tree.map(jnp.asarray, case.rows)

    def loss(q, policy):
        attend = kernels.row_attention_of(backend, rows, **case.options)

        def layer(x, _):
            # The second sine: what follows attention asks for its output, as a weight's gradient does.
            return x + jnp.sin(attend(jnp.sin(x), x, x, None, None)[0]), None

        step = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        return jnp.sum(jax.lax.scan(step, q, None, length=2)[0].astype(jnp.float32))

    def count(policy):
        return calls(jax.make_jaxpr(jax.grad(functools.partial(loss, policy=policy)))(case.qkv[0]).jaxpr, {forward})

    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2)) if meshed else jax.sharding.get_mesh()
    with jax.set_mesh(mesh):
        assert count(kernels.saves_residuals) == 1 + backward
        assert count(jax.checkpoint_policies.nothing_saveable) == 2 + backward


def test_what_devices_trade_back_is_traded_once():
    """Of 11 exchanges, 4 are the forward pass's, 4 their gradients', and 3 give the kernel q, k and v again."""
    case = Case()
    rows = jax.tree.map(jnp.asarray, case.rows)

    def loss(q):
        layer = lambda x: jnp.sin(kernels.row_attention_of("splash", rows, **case.options)(x, x, x, None, None)[0])
        return jnp.sum(jax.checkpoint(layer, policy=REMAT["attention"])(q))

    with jax.set_mesh(sharding.make_mesh(dict(data=4, sequence=2))):
        assert calls(jax.make_jaxpr(jax.grad(loss))(case.qkv[0]).jaxpr, {"all_to_all"}) == 11


# The choice


def choose(name, platform, **changes):
    return kernels.choose(name, platform, **{**dict(head_dim=128, dtype="bfloat16", windows=[None] * 2, row_length=64),
                                             **changes})


@pytest.mark.parametrize(("name", "platform", "changes", "backend", "reason"), [
    ("auto", "cpu", {}, "xla", None),
    ("auto", "cpu", dict(dtype="float32", windows=[None, 4], softcap=3.0), "xla", None),
    ("xla", "gpu", {}, "xla", None),
    pytest.param("auto", "gpu", {}, "cudnn_packed", None, marks=PACKED),
    pytest.param("auto", "gpu", dict(windows=[4, 4]), "cudnn_packed", None, marks=PACKED),
    ("cudnn", "gpu", dict(windows=[4, 4]), "cudnn", None),
    ("cudnn_mask", "gpu", dict(windows=[4, None]), "cudnn_mask", None),
    ("splash", "tpu", dict(softcap=3.0), "splash", None),
    ("auto", "rocket", {}, "xla", None),
    ("cudnn", "cpu", {}, "xla", "needs a GPU"),
    ("cudnn", "tpu", {}, "xla", "needs a GPU"),
    ("splash", "gpu", {}, "xla", "needs a TPU"),
    ("tokamax", "gpu", {}, "xla", "needs a TPU"),
    ("auto", "gpu", dict(dtype="float32"), "xla", "float32"),
    ("auto", "gpu", dict(windows=[4, None]), "xla", "one window for all layers"),
    ("auto", "gpu", dict(softcap=3.0), "xla", "soft cap"),
    ("auto", "gpu", dict(head_dim=512), "xla", "head dim must be"),
    ("cudnn_mask", "gpu", dict(row_length=63), "xla", "even"),
    ("splash", "tpu", dict(windows=[4, None]), "xla", "one window for all layers"),
], ids=str)
def test_the_choice_says_why(name, platform, changes, backend, reason, caplog, cudnn_library):
    assert choose(name, platform, **changes) == backend
    lines = [record.getMessage() for record in caplog.records]
    if reason is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"model.attention={name}: runs as {backend} (") and reason in line and "\n" not in line


def test_before_hopper_or_jax_0_11_branches_are_not_packed(caplog, cudnn_library, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: False)
    assert choose("auto", "gpu") == choose("cudnn_packed", "gpu") == "cudnn"
    why = "in JAX before 0.11" if jax.__version_info__ < (0, 11) else "at least Hopper"
    assert all(why in record.getMessage() for record in caplog.records) and len(caplog.records) == 2


def test_without_cudnn_a_gpu_runs_xla(caplog):
    assert choose("auto", "gpu") == "xla"
    assert "cuDNN is not detected" in caplog.records[0].getMessage()


def test_a_tpu_runs_tokamax_where_it_is_installed(caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_tokamax", lambda: None)
    assert choose("auto", "tpu") == choose("auto", "tpu", windows=[4, None], softcap=3.0) == "tokamax"
    assert not caplog.records
    monkeypatch.undo()
    # An import of it fails.
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.experimental.tpu.splash_attention", None)
    assert choose("auto", "tpu") == "splash" and choose("tokamax", "tpu", windows=[4, None]) == "xla"
    first, second = (record.getMessage() for record in caplog.records)
    assert "runs as splash (tokamax: is not installed" in first
    assert "runs as xla (tokamax: is not installed" in second and "one window for all layers" in second
