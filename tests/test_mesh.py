"""Meshes: tokens of a row over devices, what each device holds, what a shape is refused for, and where slices lie."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from trial import Trial, assert_same

from orpo_jax import batching, embedding, head, optim, packing, sharding, weights
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.families import architecture


def sizes_of(mesh):
    return {axis: 1 for axis in sharding.MESH_AXES} | dict(zip(sharding.MESH_AXES, mesh, strict=False))


# Tokens of a row over devices

# Two key/value heads are too few for eight devices, and 411 words are uneven on any number of them.
WIDE = dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8, intermediate_size=64)
MODELS = {
    "llama": dict(vocab_size=411), "tied": dict(tie_word_embeddings=True),
    "window": dict(model_type="mistral", sliding_window=5), "experts": tiny.EXPERTS,
    "caps": dict(model_type="gemma2", sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
                 query_pre_attn_scalar=20, vocab_size=409),
}
SPLIT = [(1, 2, 2, 1, 2), (2, 1, 1, 1, 4), (2, 2, 1, 1, 2), (1, 2, 1, 1, 4), (1, 1, 2, 1, 4), (1, 1, 1, 1, 8),
         (1, 1, 1, 2, 4), (1, 2, 1, 2, 2), (1, 1, 2, 2, 2)]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Makes a model's trial, and its numbers on one device with each sequence in a row of its own, when asked for."""
    made = {}

    def trial(name):
        if name not in made:
            folder = tiny.write_model(tmp_path_factory.mktemp(name), scale=0.1, **WIDE, **MODELS[name])
            some = Trial(tiny.skew_routers(folder), coef=1.0) if name == "experts" else Trial(folder)
            made[name] = some, some.step(packing=False, share_prompt=False, row_length=128, rows_per_device=24)
        return made[name]

    return trial


FAST = [("llama", SPLIT[0]), ("caps", SPLIT[1]), ("experts", SPLIT[7])]


@pytest.mark.parametrize(("name", "mesh"), [
    *FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(MODELS, SPLIT)
             if case not in FAST)], ids=str)
def test_tokens_over_devices_change_no_number(trials, name, mesh):
    trial, expected = trials(name)
    assert_same(trial.step(mesh), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [
    dict(packing=False, row_length=128, rows_per_device=2), dict(share_prompt=False, row_length=128),
    dict(chunks=4, row_length=128), dict(remat="minimal"), dict(remat="attention"), dict(remat="full")], ids=str)
@pytest.mark.parametrize("mesh", SPLIT[:2], ids=str)
def test_nor_do_they_with_any_layout(trials, mesh, layout):
    trial, expected = trials("llama")
    got = trial.step(mesh, **layout)
    assert got[3] > 1
    assert_same(got, expected)


@pytest.mark.slow
def test_nor_do_they_where_prompts_skip_the_head(trials):
    other = Trial(trials("llama")[0].folder, nll_scope="completion")
    assert_same(other.step(SPLIT[0]), other.step(packing=False, share_prompt=False))


# What each device holds

# A size that is split on a mesh is no other one. One key/value head is uneven on any, and 1,031 words are.
L, D, F, N, H, V, T, X = 6, 256, 384, 8, 20, 1032, 112, 4
DENSE = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N, head_dim=H,
             num_key_value_heads=1)
ODD, MOE = DENSE | dict(vocab_size=V - 1), DENSE | tiny.EXPERTS | dict(num_local_experts=X)
HELD = {"fsdp 8": (DENSE, (1, 8)), "fsdp 4, tensor 2": (DENSE, (1, 4, 2)), "data 2, fsdp 2, tensor 2": (ODD, (2, 2, 2)),
        "fsdp 4, sequence 2": (ODD, (1, 4, 1, 1, 2)), "fsdp 2, expert 4": (MOE, (1, 2, 1, 4))}
# What may be whole on every device: norms, biases, counters, and the scales of an odd vocabulary's blocks.
SMALL = 2 * V


def lowered(config, mesh, optimizer="adamw", lower=True):
    """Returns the train step, lowered, its state's shapes and shardings, and the mesh."""
    arch, mesh = architecture(tiny.config_of(**config), T), sharding.make_mesh(sizes_of(mesh))
    shards = sharding.num_shards(mesh)
    layout = batching.Layout((T,), 1, shards, 2, T, 2 * T, shards, True)
    model = step_lib.Model(weights.make_graph(arch), jnp.dtype("float32"), layout, head.Settings(0.1), remat="full",
                           router_aux_loss_coef=0.01 * arch.spec.num_experts)
    rows = jax.tree.map(lambda x: x[None], packing.empty_rows(shards, T, 2))
    batch = batching.StepBatch((batching.Group(rows, np.int32(1)),), head.Counts(*map(np.float32, (1, 1, 1))))
    batch = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch,
                         batching.batch_shardings(batch, mesh))
    optimizer = optim.make_optimizer(config_lib.OptimConfig(name=optimizer), 10, arch.decay_mask())
    with jax.set_mesh(mesh):
        params = weights.abstract_params(arch, jnp.float32, mesh)
        shardings = step_lib.state_shardings(params, optimizer, mesh)
        state = step_lib.abstract_state(params, optimizer, shardings)
        step = step_lib.make_train_step(model, optimizer, lambda _: 0.0, shardings)
        return step.lower(state, batch) if lower else None, state, mesh


def assert_split(shapes, shardings, parts):
    """Every array of a state but small ones lies in as many parts as there are devices beside copies along `data`."""
    by_path = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True)
    for (path, leaf), where in by_path:
        held = math.prod(where.shard_shape(leaf.shape))
        assert leaf.size <= SMALL or held * parts == leaf.size, (jax.tree_util.keystr(path), leaf.shape, where)


def assert_nothing_whole(text, state, mesh):
    """No array of a device's program is more than is meant to be there."""
    num_words, _ = state.params["embed"].shape
    table = state.params["embed"].sharding.shard_shape((num_words, D))
    tensor, sequence, shared = (mesh.shape[axis] for axis in ("tensor", "sequence", "expert"))
    # Stacks: a device's part of the weights, and what the backward pass keeps of each layer, its input.
    most_of_stack = max([L * T // sequence * D, *(math.prod(leaf.sharding.shard_shape(leaf.shape))
                                                  for leaf in jax.tree.leaves(state.params["layers"]))])
    # The head's weight of the device's words, and their logits of one row; a layer's weights; of the tokens of all
    # devices along `expert`, two experts' mlp.
    words = math.ceil(num_words / tensor / sequence)
    most = max(words * D, T * words, D * F // tensor * (X // shared if shared > 1 else 1), 2 * shared * T * F)
    ops = set()
    for kind, dims, op in re.findall(r"= (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", text):
        shape = tuple(map(int, dims.split(",")))
        ops.add(op)
        assert math.prod(shape) <= (most_of_stack if shape[0] == L else most), (op, kind, shape)
        if op == "scatter" and kind == "f32" and shape[0] in (num_words, table[0]):
            assert shape == table, (op, shape, table)  # the gradient of the embedding
        if op in ("all-gather", "all-reduce") and {T, T // sequence} & set(shape):
            # Activations: one row, or one for each device along `expert`.
            assert math.prod(shape) <= shared * T * D, (op, shape)
    assert {"all-gather", "dot", "scatter"} <= ops  # the text is what it was taken for


def check_held(name, optimizer="adamw"):
    step, state, mesh = lowered(*HELD[name], optimizer)
    compiled = step.compile(compiler_options={"xla_backend_optimization_level": 0})
    parts = mesh.size // mesh.shape["data"]
    assert_split(state, compiled.input_shardings[0][0], parts)
    assert_split(state, compiled.output_shardings[0], parts)
    assert_nothing_whole(compiled.as_text(), state, mesh)


@pytest.mark.parametrize(("name", "optimizer"), [
    ("fsdp 4, tensor 2", "adamw"), ("fsdp 4, sequence 2", "adamw"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("fsdp 8", "adamw"), ("data 2, fsdp 2, tensor 2", "adamw"), ("fsdp 2, expert 4", "adamw"),
        ("fsdp 2, expert 4", "adamw_8bit"), ("fsdp 4, sequence 2", "adamw_8bit")))])
def test_nothing_large_is_whole_on_a_device(name, optimizer):
    check_held(name, optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "lion", "sgd"])
@pytest.mark.parametrize("name", HELD)
def test_every_optimizers_state_is_split(name, optimizer):
    _, state, mesh = lowered(*HELD[name], optimizer, lower=False)
    assert_split(state, jax.tree.map(lambda leaf: leaf.sharding, state), mesh.size // mesh.shape["data"])


# One at a time, what keeps it so.
BROKEN = {
    "the optimiser's state is whole": ("fsdp 4, tensor 2", step_lib, "_spec_like", lambda *_: None),
    "a copy of the rest along expert": ("fsdp 2, expert 4", sharding, "SPARE", ()),
    "a whole table": ("fsdp 4, sequence 2", embedding, "lookup", lambda x, ids, dtype, _="vd": x[ids].astype(dtype)),
}


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_whole_is_found(broken, monkeypatch):
    name, module, what, instead = BROKEN[broken]
    monkeypatch.setattr(module, what, instead)
    with pytest.raises(AssertionError):
        check_held(name)


# What a mesh is refused for


def message_of(config, mesh):
    with pytest.raises(ValueError) as error:
        weights.check_mesh(sizes_of(mesh), architecture(config, 64))
    return str(error.value)


def test_a_mesh_that_does_not_fit_is_told_every_rule_at_once():
    message = message_of(tiny.config_of(hidden_size=36, head_dim=8), (1, 8, 5))
    assert message == (
        "mesh.fsdp: must divide hidden_size of config.json (dimension 'd' of embed and 11 more), which is 36, got 8; "
        "choose a divisor of it: 1, 2, 3, 4, 6, 9, 12, 18, 36; and "
        "mesh.tensor: must divide num_attention_heads of config.json (dimension 'n' of layers/attn/q/weight and 1 "
        "more), which is 4, got 5; choose a divisor of it: 1, 2, 4; and "
        "mesh.tensor: must divide intermediate_size of config.json (dimension 'f' of layers/mlp/gate/weight and 2 "
        "more), which is 48, got 5; choose a divisor of it: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48")


@pytest.mark.parametrize(("config", "mesh", "words"), [
    (tiny.config_of(), (1, 16, 1, 1, 4), ["mesh.fsdp * mesh.sequence", "hidden_size", "which is 32, got 16 * 4"]),
    (tiny.config_of(), (1, 1, 2, 1, 4), ["mesh.tensor * mesh.sequence", "num_attention_heads", "is 4", "from 1, 2"]),
    (tiny.config_of(hidden_size=48), (1, 1, 1, 1, 3), ["mesh.sequence", "must divide 64", "power of two"]),
    (tiny.T5, (1, 1, 1, 1, 2), ["mesh.sequence", "encoder-decoder", "mesh.fsdp"]),
    (tiny.T5, (1, 1, 8), ["mesh.tensor", "num_heads of config.json", "which is 4"]),
    (tiny.family_config("gpt2", n_embd=36, n_head=4, n_layer=2), (1, 8), ["n_embd of config.json", "which is 36"]),
    (tiny.config_of(**tiny.EXPERTS), (1, 1, 1, 8), ["mesh.expert", "num_local_experts", "dimension 'x'", "which is 4"]),
], ids=str)
def test_a_refusal_names_key_field_value_and_choice(config, mesh, words):
    message = message_of(config, mesh)
    assert all(word in message for word in words) and "choose" in message and "\n" not in message, message


def test_two_dimensions_of_a_weight_on_one_mesh_axis_are_refused():
    (line,) = sharding.problems(sizes_of((1, 1, 2)), [("mix", "nf", (4, 8))], {})
    assert line.startswith("mesh.tensor: must be 1 where it would split two dimensions of a weight, 'n' and 'f' of mix")


def test_rows_are_a_multiple_of_what_splits_them():
    values = {"output_dir": "runs/x", "model": {"path": "x"}, "data": {"train": "x", "row_length": 200}}
    config_lib.build({**values, "mesh": {"sequence": 8}})
    for sequence, splits in ((16, 16), (-1, 64)):
        with pytest.raises(ValueError, match=f"^data.row_length: must be 'auto' or a multiple of {splits}, .*got 200"):
            config_lib.build({**values, "mesh": {"sequence": sequence, "fsdp": 1}})


# Several slices


@dataclasses.dataclass(frozen=True)
class Chip:
    """What stands for a chip of a slice: what jax asks of one."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "stand-in"
    platform: str = "cpu"


def slices_of(num_slices, chips_each, **sizes):
    """Returns which slice lies at each place of the mesh, axes of one device left out."""
    # The order in which they come is not theirs.
    chips = [Chip(i, i // chips_each) for i in range(num_slices * chips_each)][::-1]
    mesh = sharding.make_mesh(sizes, chips)
    assert mesh.axis_names == sharding.MESH_AXES
    return np.vectorize(lambda chip: chip.slice_index)(mesh.devices).squeeze()


def test_data_crosses_slices_first_then_fsdp():
    np.testing.assert_array_equal(slices_of(2, 4, data=2, fsdp=-1), [[0] * 4, [1] * 4])
    np.testing.assert_array_equal(slices_of(2, 4, data=4, tensor=2), [[0, 0], [0, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(slices_of(2, 4, fsdp=-1), [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(slices_of(2, 4, fsdp=2, sequence=4), [[0] * 4, [1] * 4])
    # Two ways of data do not reach four slices: fsdp takes them the rest of the way.
    np.testing.assert_array_equal(slices_of(4, 2, data=2, fsdp=4), [[0, 0, 1, 1], [2, 2, 3, 3]])


def test_what_would_split_heads_over_slices_is_refused():
    with pytest.raises(ValueError, match=r"^mesh.data: must be a multiple of the number of slices \(2\).*mesh.fsdp.*"
                                         r"got mesh.data=1, mesh.fsdp=1; choose mesh.data=2"):
        slices_of(2, 4, fsdp=1, tensor=8)


@pytest.mark.slow
def test_two_slices_as_the_tpu_compiler_describes_them():
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "sequence": 2}, chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices).squeeze()
    np.testing.assert_array_equal(slices, [[[0] * 2] * 2, [[1] * 2] * 2])
