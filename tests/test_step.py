"""The step's numbers do not depend on the mesh, the micro-batches, the rows or the sharing of prompts."""

import ctypes
import os
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from trial import PAIRS, Trial, assert_same

from orpo_jax import batching, data, flops, head, optim, packing, program, sharding, standin, weights
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.families import architecture
from orpo_jax.model import REMAT, remat_ladder, unrolls

# Every axis size of a mesh of 8 divides these.
WIDE = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8, intermediate_size=64)


def meshes():
    sizes = [1, 2, 4, 8]
    return [(d, f, t) for d in sizes for f in sizes for t in sizes if d * f * t == 8]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """A model with a head of its own and one whose head is the embedding, each with its one-device numbers."""
    made = {tied: Trial(tiny.write_model(tmp_path_factory.mktemp("wide"), scale=0.1, tie_word_embeddings=tied, **WIDE))
            for tied in (False, True)}
    return {tied: (trial, trial.step()) for tied, trial in made.items()}


@pytest.fixture(scope="module")
def trial(trials):
    return trials[True][0]


@pytest.fixture(scope="module")
def expected(trials):
    return trials[True][1]


@pytest.mark.parametrize(("mesh", "tied"), [
    *((mesh, False) for mesh in meshes()), ((2, 2, 2), True), ((1, 8, 1), True)], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_every_mesh_gives_the_one_device_numbers(trials, mesh, tied, micro_batches):
    trial, expected = trials[tied]
    shards = mesh[0] * mesh[1]
    # One pair to a row, so that 24 rows make the wanted number of micro-batches on any mesh.
    got = trial.step(mesh, packing=False, row_length=128, rows_per_device=PAIRS // shards // micro_batches)
    assert got[3] == micro_batches
    assert_same(got, expected)


def test_nor_do_layers_one_by_one(trials):
    trial, expected = trials[False]
    assert_same(trial.step((2, 2, 2), remat="minimal", unroll=True, rows_per_device=2, row_length=128), expected)


def test_gradients_of_layers_one_by_one_are_stacked_once_a_step(trial):
    layout = batching.Layout(row_lengths=(128,), rows_per_device=1, num_shards=1, max_pairs=2, branch_length=64,
                             expanded_length=256, max_rows=2, share_prompt=True)
    rows = jax.tree.map(lambda x: np.stack([x, x]), packing.empty_rows(1, 128, 2))
    batch = batching.StepBatch((batching.Group(rows, np.int32(2)),), head.Counts(np.float32(1), np.float32(1)))
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
    params, optimizer = weights.abstract_params(trial.arch, jnp.float32, mesh), optax.sgd(1.0)
    shardings = step_lib.state_shardings(params, optimizer, mesh)
    up = "f32[" + ",".join(map(str, params["layers"]["mlp"]["up"]["weight"].shape)) + "]"
    with jax.set_mesh(mesh):
        model = step_lib.make_model(trial.arch, layout, jnp.dtype("float32"), 0.1, unroll=True)
        compiled = step_lib.make_train_step(model, optimizer, lambda step: 0.0, shardings).lower(
            step_lib.abstract_state(params, optimizer, shardings), batch).compile().as_text()
    stacks = [line for line in compiled.splitlines() if up in line and "concatenate(" in line]
    assert stacks and not any("while" in line for line in stacks)


@pytest.mark.parametrize("changes", [
    dict(packing=False), dict(share_prompt=False), dict(packing=False, share_prompt=False), dict(row_length=256),
    dict(rows_per_device=5), dict(chunks=4), dict(remat="minimal"), dict(remat="attention"), dict(remat="full"),
    dict(remat="minimal", unroll=True),
    dict(row_length=97, rows_per_device=2),
], ids=str)
def test_no_layout_changes_a_number(trial, expected, changes):
    assert_same(trial.step(**changes), expected)


def test_what_was_measured_on_a_gpu_is_what_runs_there(trial):
    assert [remat_ladder(platform)[0] for platform in ("cpu", "gpu", "tpu")] == ["minimal", "minimal", "none"]
    assert [platform for platform in ("cpu", "gpu", "tpu") if unrolls(platform)] == ["gpu"]
    pairs = data.from_pairs(standin.make_pairs(standin.lengths("ultrafeedback", 256), 400))
    layout = batching.make_layout(pairs, config_lib.DataConfig(train="rows"), 64, "auto", 1, "gpu",
                                  attention="cudnn_packed")
    assert layout.rows_per_device * layout.row_lengths[-1] == 4 * 1920
    for unroll in (False, True):
        model = step_lib.make_model(trial.arch, layout, jnp.dtype("float32"), 0.1, unroll=unroll)
        jaxpr = str(jax.make_jaxpr(lambda params, rows, model=model: model.hidden(params, rows)[0])(
            weights.abstract_params(trial.arch), packing.empty_rows(1, 2304, 2)))
        assert (f"unroll={trial.arch.spec.num_layers}" in jaxpr) == unroll
        assert ("while" in jaxpr) == (not unroll)  # XLA's attention


@pytest.mark.parametrize("tensor", [1, 2])
def test_layouts_know_how_many_logits_a_device_keeps(trial, tensor, monkeypatch):
    spec, config = trial.arch.spec, config_lib.build(dict(
        model={"path": str(trial.folder)}, data={"train": "rows"}, output_dir="run"))
    monkeypatch.setattr(head, "LOGITS_BUDGET", 4 * 50 * spec.vocab_size)
    mesh = sharding.make_mesh(dict(data=1, fsdp=2, tensor=tensor), jax.devices()[:2 * tensor])
    batches, _ = program.lay_out(config, trial.arch, mesh, "xla", trial.pairs, 8, 10)
    assert batches.layout.second_logits.above == 50 * tensor == head.most_at_once(spec.vocab_size // tensor)
    flops_again = batches.layout.second_logits.cost * flops.position_flops(trial.arch)
    assert flops_again == pytest.approx(2 * spec.vocab_size * spec.d_model)


def test_a_window_is_exact_in_shared_rows(tmp_path):
    """Windows compare positions: branches of one pair lie far apart in a row, and near in their sequences."""
    trial = Trial(tiny.write_model(tmp_path, scale=0.3, model_type="mistral", sliding_window=5))
    expected = trial.step(packing=False, share_prompt=False)
    assert_same(trial.step(), expected)
    without = Trial(tiny.write_model(tmp_path / "without", scale=0.3, model_type="mistral", sliding_window=None))
    assert abs(without.step()[0]["loss"] - expected[0]["loss"]) > 1e-3


@pytest.mark.parametrize("orpo", [
    dict(nll_scope="completion"), dict(nll_reduction="sequence"), dict(beta=0.0)], ids=str)
def test_options_of_the_loss_hold_in_every_layout(trial, orpo):
    other = Trial(trial.folder, **orpo)
    expected = other.step(packing=False, share_prompt=False)
    assert_same(other.step(), expected)
    assert abs(expected[0]["nll_loss"] - trial.step()[0]["nll_loss"]) > 1e-4 or "beta" in orpo


def test_pad_equal_to_eos_changes_nothing(tmp_path):
    models = [tiny.write_model(tmp_path / str(pad), tokenizer=tiny.make_tokenizer(pad=pad), scale=0.1)
              for pad in ("<pad>", "<eos>", None)]
    first, *others = (Trial(model).step() for model in models)
    for other in others:
        assert other[0] == first[0]


def test_an_empty_response_is_finite_and_weighs_nothing(tmp_path):
    """With no BOS and no prompt, a response of one token has no target."""
    tokenizer = tiny.make_tokenizer(bos=None)
    folder = tiny.write_model(tmp_path, tokenizer=tokenizer, scale=0.1)
    rows = tiny.make_rows(6, "standard")
    lone = {"prompt": "", "chosen": "<eos>", "rejected": " good cats and dogs"}
    with_lone, without = Trial(folder, rows=[*rows, lone]).step(), Trial(folder, rows=rows).step()
    assert all(np.isfinite(value) for value in with_lone[0].values())
    assert all(np.isfinite(leaf).all() for leaf in with_lone[1].values())
    assert_same(with_lone, without)


def test_fifty_steps_compile_once(trial):
    rows = [row for seed in range(50) for row in tiny.make_rows(PAIRS, "standard", seed)]
    _, _, train_step, _ = Trial(trial.folder, rows=rows).step(steps=50, optimizer=optax.adam(1e-4))
    assert train_step._cache_size() == 1


def test_a_loop_that_is_not_entered_computes_nothing(trial):
    """A pass over rows of a length that the step does not need must not be moved out of their loop."""
    layout = batching.Layout(row_lengths=(64, 128), rows_per_device=1, num_shards=1, max_pairs=2, branch_length=64,
                             expanded_length=256, max_rows=2, share_prompt=True)
    times = lambda rows, most: jax.tree.map(lambda x: np.stack([x] * most), rows)
    groups = [batching.Group(times(packing.empty_rows(1, length, 2), most), np.int32(1))
              for length, most in zip(layout.row_lengths, layout.max_micro, strict=True)]
    batch = batching.StepBatch(tuple(groups), head.Counts(np.float32(1), np.float32(1)))
    model = step_lib.make_model(trial.arch, layout, jnp.dtype("float32"), 0.1)
    gradients = lambda params, batch: step_lib._over_micro_batches(
        batch, lambda rows: jax.grad(model.loss, has_aux=True)(params, rows, batch.counts))
    compiled = jax.jit(gradients).lower(weights.random_params(trial.arch, 0), batch).compile().as_text()
    outside = compiled[compiled.index("ENTRY"):]
    assert outside.count(" while(") == len(groups) < compiled.count(" while(")
    assert " dot(" not in outside


def test_weights_and_moments_are_split_over_the_mesh(trial):
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
    abstract = weights.abstract_params(trial.arch, jnp.float32, mesh)
    for name in ("adamw", "adamw_8bit", "lion", "adafactor", "sgd"):
        optimizer = optim.make_optimizer(config_lib.OptimConfig(name=name), 10, trial.arch.decay_mask())
        shardings = step_lib.state_shardings(abstract, optimizer, mesh)
        state = step_lib.abstract_state(abstract, optimizer, shardings)
        for leaf in jax.tree.leaves(state):
            if leaf.size > 64 * 8 * 2:  # all but norms, counters and adafactor's factors
                assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size, (name, leaf)


def test_chunks_of_the_head_cost_bfloat16_nothing(trial):
    """The head's gradient adds up in float32: a chunk's part is rounded once, by at most 2**-9, and the sum is not."""
    one, many = (trial.step(dtype=jnp.bfloat16, chunks=chunks)[1]["embed"] for chunks in (1, 32))
    assert np.linalg.norm(one - many) < 2**-9 * np.linalg.norm(one)


def test_bfloat16_is_near_float32(trial, expected):
    got = trial.step(dtype=jnp.bfloat16)
    assert abs(got[0]["loss"] - expected[0]["loss"]) < 0.02 * expected[0]["loss"]
    assert got[0]["loss"] != expected[0]["loss"]


# Memory


def compiled_step(remat, T=256, rows=4):
    """Returns the compiled train step of a model whose layers hold more than one layer's work does."""
    arch = architecture(tiny.config_of(vocab_size=256, hidden_size=64, intermediate_size=160, head_dim=16,
                                       num_hidden_layers=8), T)
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    layout = batching.Layout((T,), rows, 1, 2, T, 2 * T, rows, True)
    model = step_lib.Model(weights.make_graph(arch), jnp.dtype("float32"), layout, head.Settings(0.1), remat=remat)
    micro_batches = jax.tree.map(lambda x: x[None], packing.empty_rows(rows, T, 2))
    batch = batching.StepBatch((batching.Group(micro_batches, np.int32(1)),),
                               head.Counts(np.float32(1), np.float32(1)))
    with jax.set_mesh(mesh):
        abstract = weights.abstract_params(arch, jnp.float32, mesh)
        shardings = step_lib.state_shardings(abstract, optax.sgd(1.0), mesh)
        return step_lib.make_train_step(model, optax.sgd(1.0), lambda _: 0.0, shardings).lower(
            step_lib.abstract_state(abstract, optax.sgd(1.0), shardings), batch).compile(
            compiler_options={"xla_backend_optimization_level": 0})  # it does not run


def stands_for(compiled):
    """Returns what compile_to_fit lowers and compiles; an exception is raised by the compiler."""
    def compile_it():
        if isinstance(compiled, Exception):
            raise compiled
        return compiled

    return types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=compile_it))


NO_ROOM = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    """Blocks that are too small for glibc to map by themselves, below one that stays."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    held = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    blocks = [libc.malloc(100_000) for _ in range(2_000)]
    for block in blocks:
        libc.memset(block, 1, 100_000)
    for block in blocks[:-1]:
        libc.free(block)
    before = held()
    step_lib.release_freed_memory()
    assert before - held() > 150_000_000
    libc.free(blocks[-1])


def test_remat_steps_down_until_the_step_fits():
    steps = {remat: compiled_step(remat) for remat in REMAT}
    need = {remat: step_lib.bytes_needed(step) for remat, step in steps.items()}
    print({remat: f"{count / 1e6:.1f} MB" for remat, count in need.items()})
    assert list(need) == sorted(need, key=lambda remat: -need[remat]) == ["none", "minimal", "attention", "full"]
    # The gaps are no rounding.
    assert all(b < 0.95 * a for a, b in zip(need.values(), list(need.values())[1:], strict=False))

    def fit(limit, broken=()):
        tried = []

        def make(remat):
            tried.append(remat)
            return stands_for(NO_ROOM if remat in broken else steps[remat])

        step, remat, count = step_lib.compile_to_fit(make, list(REMAT), (), limit)
        assert tried == list(REMAT)[:tried.index(remat) + 1]  # none is compiled in vain
        assert step is steps[remat] and count == need[remat]
        return remat

    for remat, count in need.items():
        assert fit(count) == remat
    # Where none fits, the smallest may still run: the limit is an estimate.
    assert fit(need["full"] - 1) == fit(0) == "full"
    # What the compiler finds no room for is passed over, whatever the limit.
    assert fit(10**12, broken=["none", "minimal"]) == "attention"


def test_a_step_that_no_remat_makes_fit_says_what_to_change():
    with pytest.raises(ValueError, match=r"model.remat: must leave room for the step on a device of 2.0 GB, got "
                                         "'full'; choose a smaller train.rows_per_device"):
        step_lib.compile_to_fit(lambda _: stands_for(NO_ROOM), list(REMAT), (), 2 * 10**9)
    with pytest.raises(ValueError, match="got 'none'"):
        step_lib.compile_to_fit(lambda _: stands_for(NO_ROOM), ["none"], (), 2 * 10**9)
    # Any other error of the compiler is a bug, and no reason to try the next.
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        step_lib.compile_to_fit(lambda _: stands_for(jax.errors.JaxRuntimeError("INTERNAL: oh")), list(REMAT), (), 1)
