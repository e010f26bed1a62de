"""From token pairs to the batch of step s: once an epoch, in an order that only a seed sets, in one run's shapes."""

import dataclasses
import itertools
import math
import time

import jax
import numpy as np
import pytest
import tiny

from orpo_jax import batching, standin
from orpo_jax.batching import Batches, make_layout, total_steps
from orpo_jax.config import DataConfig, OrpoConfig
from orpo_jax.data import from_rows, load_pairs
from orpo_jax.pretrained import open_pretrained


@pytest.fixture(scope="module")
def pretrained(model_folder):
    return open_pretrained(str(model_folder))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Batches


def make_batches(pretrained, *, count=23, batch_size=4, seed=0, rows=None, shards=1, rows_per_device=2, orpo=None,
                 rows_per_step=None, platform="cpu", attention="xla", **changes):
    config = DataConfig(**{"train": "rows.jsonl", "max_length": 64, **changes})
    pairs = load_pairs(from_rows(rows or tiny.make_rows(count, "standard"), "rows"), pretrained, config)[0]
    layout = make_layout(pairs, config, batch_size, rows_per_device, shards, platform, rows_per_step, attention)
    return Batches(pairs, layout, batch_size, orpo or OrpoConfig(), seed, rows_per_step)


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("count", "batch_size"), [(23, 4), (24, 4), (3, 8), (1, 1), (9, 9)])
def test_every_pair_comes_once_an_epoch_and_the_last_step_is_short(pretrained, count, batch_size, seed):
    batches = make_batches(pretrained, count=count, batch_size=batch_size, seed=seed)
    steps = math.ceil(count / batch_size)
    assert batches.steps_per_epoch == steps
    for epoch in range(3):
        members = [batches.members(epoch * steps + i).tolist() for i in range(steps)]
        assert sorted(itertools.chain.from_iterable(members)) == list(range(count))
        sizes = [len(some) for some in members]
        assert sizes == [batch_size] * (steps - 1) + [count - batch_size * (steps - 1)]


def test_a_batch_holds_its_members_and_nothing_else(pretrained):
    """Read back from the rows: the targets of both branches of every pair, and their counts."""
    batches = make_batches(pretrained)
    for step in range(batches.steps_per_epoch):
        batch, info = batches.batch(step)
        members = [batches.pairs[i] for i in batches.members(step)]
        found = []
        for group in batch.groups:
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), group.rows)
            for row in range(len(flat.ids)):
                for slot in np.flatnonzero(flat.pair_weights[row]):
                    found.append(tuple(tuple(flat.targets[row][flat.segments[row] == 2 * slot + side].tolist())
                                       for side in (1, 2)))
        assert sorted(found) == sorted((tuple(p.chosen_ids[p.chosen_prompt:].tolist()),
                                        tuple(p.rejected_ids[p.rejected_prompt:].tolist())) for p in members)
        assert float(batch.counts.pairs) == len(info.branches) == len(members)
        assert float(batch.counts.nll_weight) == sum(len(p.chosen_ids) - 1 for p in members)
        assert info.tokens == sum(len(p.chosen_ids) + len(p.rejected_ids) - 1 - max(p.shared, 1) for p in members)


@pytest.mark.parametrize("own", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("packing", [True, False])
def test_a_host_s_rows_are_its_shards_of_the_batch(pretrained, own, packing):
    whole = make_batches(pretrained, shards=4, batch_size=12, packing=packing)
    part = dataclasses.replace(whole, shards=own)
    per_shard = whole.layout.rows // 4
    mine = [shard * per_shard + i for shard in own for i in range(per_shard)]
    for step in range(whole.steps_per_epoch):
        (batch, info), (rows, same_info) = whole.batch(step), part.batch(step)
        for group, own_group in zip(batch.groups, rows.groups, strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, mine], b), group.rows, own_group.rows)
            assert group.num_micro == own_group.num_micro
        assert rows.counts == batch.counts
        assert info.slots == same_info.slots and info.branches.tolist() == same_info.branches.tolist()
        jax.tree.map(lambda x, shape: (x.shape, x.dtype) == (shape.shape, shape.dtype) or pytest.fail(str(shape)),
                     batch, whole.shapes())


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [
    (1.0, -1, 6), (3.0, -1, 18), (0.5, -1, 3), (1.1, -1, 7), (0.01, -1, 1), (2.5, -1, 15), (3.0, 2, 2),
    (0.5, 100, 100)])
def test_total_steps_are_whole_epochs_of_short_last_steps(pretrained, epochs, max_steps, steps):
    assert total_steps(make_batches(pretrained), epochs, max_steps) == steps


@pytest.mark.parametrize("seed", [None, 3])
def test_a_batch_depends_on_nothing_but_seed_and_step(pretrained, seed):
    batches = make_batches(pretrained, seed=seed)
    in_order = [batches.batch(step)[0] for step in range(14)]
    for step in (13, 0, 7, 6, 13, 5):
        assert equal(make_batches(pretrained, seed=seed).batch(step)[0], in_order[step])
        assert equal(batches.batch(step)[0], in_order[step])


def orders(batches, epochs=3):
    steps = batches.steps_per_epoch
    return [np.concatenate([batches.members(epoch * steps + i) for i in range(steps)]).tolist()
            for epoch in range(epochs)]


def test_shuffled_epochs_differ_by_epoch_and_by_seed(pretrained):
    some = orders(make_batches(pretrained, seed=0)) + orders(make_batches(pretrained, seed=1))
    assert len(set(map(tuple, some))) == 6


def test_without_shuffling_every_epoch_has_the_order_of_the_file(pretrained):
    assert orders(make_batches(pretrained, seed=None)) == [list(range(23))] * 3


def test_the_order_does_not_depend_on_the_layout(pretrained):
    base = orders(make_batches(pretrained))
    for changes in (dict(packing=False), dict(share_prompt=False), dict(shards=8), dict(row_length=128),
                    dict(rows_per_device=1)):
        assert orders(make_batches(pretrained, **changes)) == base


# Layout


def test_the_process_and_the_epoch_leave_shapes_alone(pretrained):
    """Fifty steps, short ones among them, have the shapes of one compiled program."""
    batches = make_batches(pretrained, shards=2)
    shapes = {tuple((np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(batches.batch(step)[0]))
              for step in range(50)}
    assert len(shapes) == 1
    layout, groups = batches.layout, batches.batch(0)[0].groups
    assert [group.rows.ids.shape for group in groups] == [
        (max_micro, layout.rows, length)
        for max_micro, length in zip(layout.max_micro, layout.row_lengths, strict=True)]
    assert layout.rows == layout.rows_per_device * 2


@pytest.mark.parametrize("changes", [{}, dict(packing=False), dict(share_prompt=False), dict(row_length=100),
                                     dict(rows_per_device="auto"), dict(shards=8), dict(batch_size=1),
                                     dict(rows_per_step=3), dict(attention="cudnn"), dict(attention="cudnn_packed"),
                                     dict(attention="splash"),
                                     dict(platform="tpu", rows_per_device="auto"),
                                     dict(platform="gpu", rows_per_device="auto", attention="cudnn")])
def test_every_batch_fits_its_layout(pretrained, changes):
    batches = make_batches(pretrained, **changes)
    for step in range(batches.steps_per_epoch):
        batch, info = batches.batch(step)
        layout = batches.layout
        assert info.tokens <= info.slots == sum(
            int(group.num_micro) * layout.rows * length
            for group, length in zip(batch.groups, layout.row_lengths, strict=True))
        for group, length, max_micro in zip(batch.groups, layout.row_lengths, layout.max_micro, strict=True):
            assert 0 <= group.num_micro <= max_micro
            used = np.asarray(group.rows.pair_weights).any(-1).any(-1)
            assert not used[group.num_micro:].any()
            assert "packing" not in changes or group.rows.pair_weights.shape[-1] == 1
            start, chosen, rejected, end = np.moveaxis(np.asarray(group.rows.bounds), -1, 0)
            assert max((rejected - start).max(), (chosen - start + end - rejected).max()) <= layout.branch_length
            assert (chosen - start + end - start).sum(-1).max() <= layout.room(length).expanded


@pytest.mark.parametrize("seed", [None, 0])
def test_steps_of_full_rows_take_every_pair_once_an_epoch(pretrained, seed):
    batches = make_batches(pretrained, count=200, rows_per_step=3, rows_per_device=3, seed=seed, row_length=256)
    for epoch in range(3):
        first = sum(map(batches.num_steps, range(epoch)))
        steps = [batches.members(first + i) for i in range(batches.num_steps(epoch))]
        assert sorted(np.concatenate(steps).tolist()) == list(range(200))
        assert all(len(batches.plan(first + i)[0]) == 3 for i in range(batches.num_steps(epoch) - 1))
        assert batches.locate(first) == (epoch, 0)
    _, info = batches.batch(0)
    assert info.tokens / info.slots > 0.9
    assert total_steps(batches, 2.5, -1) == batches.num_steps(0) + batches.num_steps(1) + math.ceil(
        batches.num_steps(2) / 2)


def test_steps_of_full_rows_do_not_depend_on_the_machine(pretrained):
    base = make_batches(pretrained, rows_per_step=3)
    for changes in (dict(platform="gpu"), dict(shards=8), dict(rows_per_device=1)):
        other = make_batches(pretrained, rows_per_step=3, **changes)
        for step in range(base.num_steps(0)):
            assert [row.tolist() for row in other.plan(step)[0]] == [row.tolist() for row in base.plan(step)[0]]


class Lengths:
    """Stands for Pairs where nothing but lengths is read."""

    tail = 0
    encodes = False

    def __init__(self, parts):
        self.prompt, self.chosen, self.rejected = parts.T

    def sequence_lengths(self):
        return np.stack([self.prompt + self.chosen, self.prompt + self.rejected], axis=1)

    def sizes(self, share_prompt):
        longer = self.chosen + self.rejected + 2 * self.prompt - 2
        lengths = longer - (self.prompt - 1) * share_prompt
        return np.stack([lengths, np.ones_like(lengths), longer, self.chosen + self.rejected], axis=1)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("name", "shards", "batch_size"), [
    *[("ultrafeedback", *sizes) for sizes in [
        (1, 4), (1, 64), (1, 128), (1, 512), (8, 64), (8, 128), (8, 512), (16, 64), (16, 128), (16, 512), (64, 256),
        (64, 512)]],
    ("hh", 1, 4), ("hh", 64, 256)])
def test_rows_are_well_filled_where_a_shard_has_four_pairs(platform, name, shards, batch_size):
    parts = standin.lengths(name, 24_000)
    layout = make_layout(Lengths(parts[:12_000]), DataConfig(train="rows"), batch_size, "auto", shards, platform,
                         attention="cudnn_packed" if platform == "gpu" else "xla")
    unseen = Lengths(parts[12_000:]).sizes(True)
    steps = [unseen[start:start + batch_size] for start in range(0, len(unseen) - batch_size, batch_size)][:24]
    # Pairs longer than any that were seen can't come: the layout is made for the whole data set.
    fill = layout.fill([step[step[:, 0] <= layout.row_lengths[-1]] for step in steps])
    print(f"{name}, {platform}, {shards} shards, {batch_size} pairs: {fill:.3f}, {layout.rows_per_device} rows of "
          f"{layout.row_lengths}")
    assert fill >= 0.85


def test_rows_whose_logits_are_computed_twice_cost_more():
    pairs, config = Lengths(standin.lengths("ultrafeedback", 2000)), DataConfig(train="rows")

    def make(above, cost=0.1, scope="sequence"):
        return make_layout(pairs, config, 64, "auto", 1, "gpu", attention="cudnn_packed", nll_scope=scope,
                           second_logits=batching.SecondLogits(above, cost))

    layout, above = make(10**6), 3328
    assert layout.row_lengths[-1] > above >= make(above).row_lengths[-1]
    assert make(above, cost=1e-4).row_lengths == layout.row_lengths  # fewer empty positions are worth more
    assert make(1).row_lengths == layout.row_lengths  # every row would
    plain = make(10**6, scope="completion")  # prompts have no logits
    assert plain.scored_length < plain.row_lengths[-1]
    assert make(plain.scored_length, scope="completion").row_lengths == plain.row_lengths
    twice = dataclasses.replace(layout, second_logits=batching.SecondLogits(1, 0.1))
    steps = [pairs.sizes(True)[:64]]
    positions = layout.cost(steps) - layout.micro_cost * sum(layout.num_micro(layout.plan(steps[0])))
    assert twice.cost(steps) == pytest.approx(layout.cost(steps) + 0.1 * positions)


@pytest.mark.parametrize(("platform", "packing", "position_flops"), [
    ("cpu", True, 0.0), ("gpu", True, 0.0), ("tpu", True, 0.0), ("cpu", False, 0.0), ("cpu", True, 1e9),
    ("gpu", True, 3e9)])
def test_no_better_layout_is_left_untried(platform, packing, position_flops, monkeypatch):
    pairs, config = Lengths(standin.lengths("hh", 600)), DataConfig(train="rows", packing=packing)
    choose = lambda: make_layout(pairs, config, 32, "auto", 2, platform, position_flops=position_flops,
                                 num_steps=1000)
    tried, cost, least_cost = [], batching.Layout.cost, batching.Layout.least_cost

    def watched(layout, steps):
        tried.append(cost(layout, steps))
        assert least_cost(layout, steps) <= tried[-1]
        return tried[-1]

    monkeypatch.setattr(batching.Layout, "cost", watched)
    chosen, some = choose(), len(tried)
    monkeypatch.setattr(batching.Layout, "least_cost", lambda self, steps: 0.0)
    assert choose() == chosen
    assert some < len(tried) - some  # it does leave some out, of those that all are tried of now


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("platform", "shards", "batch_size"), [("cpu", 1, 4), ("gpu", 1, 64), ("tpu", 16, 64)])
def test_a_run_has_as_many_row_lengths_as_its_steps_pay_for(platform, shards, batch_size, packing):
    pairs, flops = Lengths(standin.lengths("hh", 2000)), {"cpu": 1e9, "gpu": 3e9, "tpu": 5e10}[platform]
    sizes, counts = np.random.default_rng(0).permutation(pairs.sizes(True)), (1, 30, 1000, 30_000, 1_000_000)
    steps = [sizes[start:start + batch_size] for start in range(0, len(sizes), batch_size)]
    layouts = [make_layout(pairs, DataConfig(train="rows", packing=packing), batch_size, "auto", shards, platform,
                           position_flops=flops, num_steps=count) for count in counts]

    def seconds(layout, count):
        """Of compiling, and of all steps, in those of a position."""
        return (len(layout.row_lengths) * batching.COSTS[platform].compile_flops / flops
                + layout.cost(steps) / len(steps) * count)

    for count, layout in zip(counts, layouts, strict=True):
        assert seconds(layout, count) <= (1 + batching.SLACK) * min(seconds(other, count) for other in layouts)
    lengths = [len(layout.row_lengths) for layout in layouts]
    assert lengths == sorted(lengths) and lengths[0] <= 2 and lengths[0] < lengths[-1]


def test_the_longest_row_is_taken_only_where_a_shorter_one_does_not_do():
    layout = make_layout(Lengths(standin.lengths("hh", 600)), DataConfig(train="rows"), 4, "auto", 1, "cpu")
    shorter = layout.room(layout.row_lengths[0])
    few = np.array([[shorter.positions // 4, 1, shorter.positions // 3, 1]] * 4)  # every slot of a row is taken
    assert shorter.pairs == 4 and len(layout.row_lengths) > 1
    assert layout.num_micro(layout.plan(few)) == [1] + [0] * (len(layout.row_lengths) - 1)


@pytest.mark.parametrize(("count", "batch_size"), [(3, 4), (10, 4), (100, 64), (5000, 4)])
def test_layouts_are_tried_on_steps_as_a_run_has_them(count, batch_size):
    steps = batching._sample_steps(np.arange(count)[:, None], batch_size)
    per_epoch = -(-count // batch_size)
    assert len(steps) >= batching.SAMPLE_STEPS and all(0 < len(step) <= batch_size for step in steps)
    epochs = [np.concatenate(steps[start:start + per_epoch]).ravel().tolist()
              for start in range(0, len(steps) - per_epoch + 1, per_epoch)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1 or len(steps) <= 2 * per_epoch
    first = np.concatenate(steps).ravel().tolist()[:count]
    assert len(set(first)) == len(first) and (first != sorted(first) or count < 10)


@pytest.mark.parametrize("shards", [8, 64])
def test_a_pair_to_a_shard_gets_a_row_of_the_steps_longest(shards):
    """Not of the mean of a step's pairs, which holds hardly any step."""
    pairs = Lengths(standin.lengths("hh", 4096))
    layout = make_layout(pairs, DataConfig(train="rows"), shards, "auto", shards, "cpu")
    sizes = pairs.sizes(True)
    steps = [sizes[start:start + shards] for start in range(0, len(sizes), shards)]
    longest = sum(step[:, 0].max() + layout.micro_cost for step in steps)
    assert layout.rows_per_device == 1 and layout.cost(steps) <= 1.12 * longest


@pytest.mark.parametrize("packing", [True, False])
def test_a_pair_lies_where_its_scored_positions_have_room(packing):
    """Rows of long prompts and short responses, and a few pairs that are all response."""
    rng = np.random.default_rng(0)
    parts = np.concatenate([np.stack([rng.integers(100, 900, 60), *rng.integers(4, 40, (2, 60))], axis=1),
                            np.stack([np.full(20, 2), *rng.integers(20, 300, (2, 20))], axis=1)])
    layout = make_layout(Lengths(parts), DataConfig(train="rows", packing=packing), 16, "auto", 2, "cpu",
                         nll_scope="completion")
    sizes = rng.permutation(Lengths(parts).sizes(True))
    for start in range(0, len(sizes), 16):
        step = sizes[start:start + 16]
        plan = layout.plan(step)
        assert sorted(pair for rows in plan for row in rows for pair in row) == list(range(16))
        for rows, length in zip(plan, layout.row_lengths, strict=True):
            assert all((step[row].sum(axis=0) <= layout.room(length)).all() for row in rows)


def test_what_is_made_ahead_comes_in_order_and_errors_come_through():
    made = list(batching.ahead(lambda step: step * step, range(20)))
    assert [value for value, _ in made] == [step * step for step in range(20)]
    assert all(waited >= 0 for _, waited in made)
    broken = batching.ahead(lambda step: 1 // (3 - step), range(20))
    with pytest.raises(ZeroDivisionError):
        list(broken)


def test_a_slow_reader_never_waits():
    """While a step runs, the next batch is made."""
    waits = []
    for _, waited in batching.ahead(lambda step: time.sleep(0.05), range(5)):
        waits.append(waited)
        time.sleep(0.2)
    assert waits[0] > 0.03 and max(waits[1:]) < 0.02


def test_a_row_holds_the_longest_pair_and_no_less(pretrained):
    pairs = make_batches(pretrained).pairs
    longest = int(pairs.lengths(True).max())
    for share in (True, False):
        longest = int(pairs.lengths(share).max())
        make_batches(pretrained, row_length=longest, share_prompt=share)
        assert make_batches(pretrained, share_prompt=share).layout.row_lengths[-1] >= longest
        with pytest.raises(ValueError, match=rf"^data\.row_length: .*\({longest} tokens\), got {longest - 1}; "):
            make_batches(pretrained, row_length=longest - 1, share_prompt=share)


@pytest.mark.parametrize("rows", [
    [{"prompt": "the sky", "chosen": "", "rejected": " is"}],
    [{"prompt": "the sky", "chosen": " is", "rejected": " is"}],
    [{"prompt": "", "chosen": "", "rejected": ""}], [{"prompt": "", "chosen": "a", "rejected": ""}]])
@pytest.mark.parametrize("bos", ["<bos>", None])
def test_a_step_without_a_target_has_counts_that_divide(tmp_path, rows, bos):
    model = open_pretrained(str(tiny.write_model(tmp_path / "model", tokenizer=tiny.make_tokenizer(bos=bos))))
    batch, _ = make_batches(model, rows=rows, identical="keep", empty="keep").batch(0)
    assert batch.counts.nll_weight >= 1 and batch.counts.pairs >= 1


def test_batches_on_devices_are_the_batches(pretrained):
    from orpo_jax.sharding import make_mesh

    batches = make_batches(pretrained, shards=8, rows_per_device=1)
    mesh = make_mesh(dict(data=2, fsdp=4, tensor=1))
    batch, _ = batches.batch(1)
    on_devices = batching.to_devices(batch, mesh)
    assert equal(jax.device_get(on_devices), batch)
    for there, here in zip(on_devices.groups, batch.groups, strict=True):
        shape = here.rows.ids.shape
        assert there.rows.ids.sharding.shard_shape(shape)[1] == shape[1] // 8


