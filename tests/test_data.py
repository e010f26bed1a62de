"""From rows of any source to the batch of step s: the same pairs, once an epoch, in an order that only a seed sets."""

import dataclasses
import gzip
import itertools
import json
import math
import time

import datasets
import jax
import numpy as np
import pytest
import tiny
import zstandard

from orpo_jax import data, standin
from orpo_jax.config import DataConfig, OrpoConfig
from orpo_jax.data import Batches, from_rows, load_pairs, make_layout, read_source, total_steps
from orpo_jax.preference import Encoder
from orpo_jax.pretrained import open_pretrained

ROWS = tiny.make_rows(23, "standard")
KINDS = ["standard", "implicit", "conversational", "conversational_implicit"]


@pytest.fixture(scope="module")
def pretrained(model_folder):
    return open_pretrained(str(model_folder))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for every test."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def settings(**changes):
    return DataConfig(**{"train": "rows.jsonl", "max_length": 64, **changes})


def load(source, pretrained, **changes):
    return load_pairs(source, pretrained, settings(**changes))[0]


def as_lists(pairs):
    """Returns pairs in a form that compares."""
    return [(pair.chosen_ids.tolist(), pair.rejected_ids.tolist(), *pair[2:]) for pair in pairs]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Sources


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "rows.ndjson": lambda path, rows: path.write_bytes(jsonl(rows)),
    "lines.json": lambda path, rows: path.write_bytes(jsonl(rows)),
    "array.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "windows.jsonl": lambda path, rows: path.write_bytes(jsonl(rows).replace(b"\n", b"\r\n") + b"\r\n\r\n"),
    "byte_order_mark.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + jsonl(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows))),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(zstandard.compress(jsonl(rows))),
    "two_frames.jsonl.zst": lambda path, rows: path.write_bytes(
        zstandard.compress(jsonl(rows[:9])) + zstandard.compress(jsonl(rows[9:]))),
    "array.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(str(path)),
    "folder": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
    "splits": lambda path, rows: datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])).save_to_disk(str(path)),
}
STANDARD_WRITERS = {
    "rows.csv": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(str(path), index=False),
    "rows.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(
        datasets.Dataset.from_list(rows).to_pandas().to_csv(index=False).encode())),
}


@pytest.fixture(scope="module")
def expected(pretrained, tmp_path_factory):
    """The pairs of each kind of rows, handed over as a list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", tmp_path_factory.mktemp("expected"))
        return {kind: as_lists(load(from_rows(tiny.make_rows(23, kind), "rows"), pretrained)) for kind in KINDS}


@pytest.mark.parametrize(("name", "kind"), [
    *((name, kind) for name in WRITERS for kind in ("standard", "conversational")),
    *((name, "standard") for name in STANDARD_WRITERS),
])
def test_every_format_gives_the_same_pairs(tmp_path, pretrained, expected, name, kind):
    path = tmp_path / name
    (WRITERS | STANDARD_WRITERS)[name](path, tiny.make_rows(23, kind))
    assert as_lists(load(read_source(str(path), None, "train", "data.train"), pretrained)) == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_program_give_the_same_pairs(pretrained, expected, kind):
    rows = tiny.make_rows(23, kind)
    for given in (iter(rows), tuple(rows), datasets.Dataset.from_list(rows)):
        assert as_lists(load(from_rows(given, "rows"), pretrained)) == expected[kind]


def test_a_split_of_a_folder_can_be_chosen(tmp_path, pretrained, expected):
    WRITERS["splits"](tmp_path / "splits", ROWS)
    source = read_source(str(tmp_path / "splits"), None, "test", "data.train")
    assert as_lists(load(source, pretrained)) == expected["standard"][:2]


def test_other_columns_and_odd_characters_change_nothing(tmp_path, pretrained):
    """Columns may differ from row to row, and line separators of Unicode are no ends of lines."""
    rows = [{**row, "prompt": row["prompt"] + "\u2028天 \x85 é"} for row in ROWS]
    for ascii_only in (True, False):
        more = [{**row, "score": i if i % 2 else {"a": [i]}} for i, row in enumerate(rows)]
        (tmp_path / "rows.jsonl").write_text(
            "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in more), encoding="utf-8")
        source = read_source(str(tmp_path / "rows.jsonl"), None, "train", "data.train")
        assert as_lists(load(source, pretrained)) == as_lists(load(from_rows(rows, "rows"), pretrained))


def test_blank_lines_are_skipped_and_keep_their_numbers(tmp_path, pretrained, expected):
    lines = jsonl(ROWS).decode().splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(lines))
    source = read_source(str(file), None, "train", "data.train")
    assert as_lists(load(source, pretrained)) == expected["standard"]
    file.write_text("\n\n".join([*lines[:2], "{}"]))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 5: needs the column chosen"):
        load(read_source(str(file), None, "train", "data.train"), pretrained)


# Tokenised rows and their cache


def test_processes_change_nothing(pretrained, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZER_BATCH", 5)
    rows = from_rows(ROWS, "rows")
    one = as_lists(load(rows, pretrained))
    for file in (data.CACHE / "tokenised").iterdir():
        file.unlink()
    assert as_lists(load(rows, pretrained, dataset_num_proc=2)) == one


def test_a_process_s_error_names_the_row(pretrained):
    with pytest.raises(ValueError, match=r"^rows, row 2: needs the column rejected"):
        load(from_rows([ROWS[0], {"chosen": "a"}], "rows"), pretrained, dataset_num_proc=2)


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the pairs that are tokenised."""
    count = [0]
    real = Encoder.__call__

    def counting(self, batch):
        count[0] += len(batch)
        return real(self, batch)

    monkeypatch.setattr(Encoder, "__call__", counting)
    return count


def test_rows_are_tokenised_once(tmp_path, pretrained, tokenised):
    file = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    first = load(read_source(str(file), None, "train", "data.train"), pretrained)
    assert tokenised[0] == len(ROWS)
    again = load(read_source(str(file), None, "train", "data.train"), open_pretrained(str(pretrained.folder)))
    assert tokenised[0] == len(ROWS) and as_lists(again) == as_lists(first)
    # What is done with the pairs is not what is cached.
    load(from_rows(datasets.Dataset.from_list(ROWS), "rows"), pretrained)
    assert tokenised[0] == 2 * len(ROWS)
    load(read_source(str(file), None, "train", "data.train"), pretrained, identical="keep", overlong="drop",
         dataset_num_proc=2, packing=False, shuffle=False)
    assert tokenised[0] == 2 * len(ROWS)


@pytest.mark.parametrize("changes", [
    {"max_length": 63}, {"max_prompt_length": 8}, {"max_completion_length": 8}, {"truncation_mode": "keep_start"},
])
def test_other_settings_are_tokenised_anew(pretrained, tokenised, changes):
    rows = from_rows(ROWS, "rows")
    load(rows, pretrained)
    load(rows, pretrained, **changes)
    assert tokenised[0] == 2 * len(ROWS)


def test_other_rows_tokenizers_templates_and_stop_tokens_are_tokenised_anew(model_folder, pretrained, tokenised,
                                                                           tmp_path):
    rows = tiny.make_rows(5, "conversational")
    edited = [{**rows[0], "chosen": [{"role": "assistant", "content": "good day"}]}, *rows[1:]]
    no_bos = tiny.write_model(tmp_path / "no_bos", tokenizer=tiny.make_tokenizer(bos=None))
    stops = tiny.write_model(tmp_path / "stops")
    (stops / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    for count, (some, model) in enumerate([
            (rows, pretrained), (edited, pretrained), (rows[:4], pretrained), (rows[::-1], pretrained),
            (rows, open_pretrained(str(no_bos))), (rows, open_pretrained(str(stops))),
            (rows, open_pretrained(str(model_folder), chat_template=tiny.TEMPLATE.replace("'<|'", "'<| '"))),
            (rows, pretrained)]):
        before = tokenised[0]
        load(from_rows(some, "rows"), model)
        assert (tokenised[0] > before) == (count < 7), count


def test_a_failure_leaves_no_cache(pretrained, cache):
    with pytest.raises(ValueError, match="row 2"):
        load(from_rows([ROWS[0], {"chosen": "a"}], "rows"), pretrained)
    assert not [path for path in cache.rglob("*") if path.is_file()]


# What is kept

LONG = {"prompt": "the sky", "chosen": " blue" * 90, "rejected": " green"}
SAME = {"prompt": "the sky", "chosen": " is", "rejected": " is"}
EMPTY = {"prompt": "the sky", "chosen": "", "rejected": " is"}


def test_over_long_pairs_may_be_cut_or_dropped_or_stop_the_run(pretrained):
    source = from_rows([ROWS[0], LONG, ROWS[1]], "rows")
    pairs, counts = load_pairs(source, pretrained, settings())
    assert (len(pairs), counts["overlong"], counts["truncated"]) == (3, 1, 1)
    assert len(pairs[1].chosen_ids) == 64
    pairs, counts = load_pairs(source, pretrained, settings(overlong="drop"))
    assert (len(pairs), counts["overlong"], counts["truncated"]) == (2, 1, 0)
    assert as_lists(pairs) == as_lists(load(from_rows(ROWS[:2], "rows"), pretrained))
    with pytest.raises(ValueError, match=r"^rows, row 2: the pair is longer than data\.max_length \(64\)"):
        load_pairs(source, pretrained, settings(overlong="error"))


def test_a_pair_that_just_fits_is_not_over_long(pretrained):
    longest = int(load(from_rows(ROWS, "rows"), pretrained).sequence_lengths().max())
    for length, overlong in ((longest, 0), (longest - 1, 1)):
        counts = load_pairs(from_rows(ROWS, "rows"), pretrained, settings(max_length=length))[1]
        assert (counts["overlong"] > 0) == overlong


@pytest.mark.parametrize(("identical", "empty", "kept"), [
    ("drop", "drop", [0, 3]), ("keep", "drop", [0, 1, 3]), ("drop", "keep", [0, 2, 3]), ("keep", "keep", [0, 1, 2, 3])])
def test_identical_and_empty_pairs_are_counted_and_dropped_or_kept(pretrained, identical, empty, kept):
    rows = [ROWS[0], SAME, EMPTY, ROWS[1]]
    pairs, counts = load_pairs(from_rows(rows, "rows"), pretrained, settings(identical=identical, empty=empty))
    assert counts == {"rows": 4, "identical": 1, "empty": 1, "overlong": 0, "pairs": len(kept), "truncated": 0}
    everything = as_lists(load(from_rows(rows, "rows"), pretrained, identical="keep", empty="keep"))
    assert as_lists(pairs) == [everything[i] for i in kept]


def test_lengths_are_those_of_the_pairs(pretrained):
    pairs = load(from_rows([ROWS[0], SAME, *ROWS[1:]], "rows"), pretrained)
    assert pairs.sequence_lengths().tolist() == [[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs]
    assert pairs.max_id() == max(int(max(p.chosen_ids.max(), p.rejected_ids.max())) for p in pairs)


# Batches


def make_batches(pretrained, *, count=23, batch_size=4, seed=0, rows=None, shards=1, rows_per_device=2, orpo=None,
                 rows_per_step=None, platform="cpu", attention="xla", **changes):
    config = settings(**changes)
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
                                     dict(rows_per_step=3), dict(attention="cudnn"), dict(attention="splash"),
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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("shards", "batch_size"), [
    (1, 64), (1, 128), (1, 512), (8, 64), (8, 128), (8, 512), (16, 64), (16, 128), (16, 512), (64, 512)])
def test_rows_are_well_filled_where_a_shard_has_four_pairs(platform, shards, batch_size):
    parts = standin.lengths("ultrafeedback", 24_000)
    layout = make_layout(Lengths(parts[:12_000]), DataConfig(train="rows"), batch_size, "auto", shards, platform)
    unseen = Lengths(parts[12_000:]).sizes(True)
    steps = [unseen[start:start + batch_size] for start in range(0, len(unseen) - batch_size, batch_size)][:24]
    # Pairs longer than any that were seen can't come: the layout is made for the whole data set.
    fill = layout.fill([step[step[:, 0] <= layout.row_lengths[-1]] for step in steps])
    print(f"{platform}, {shards} shards, {batch_size} pairs: {fill:.3f}, {layout.rows_per_device} rows of "
          f"{layout.row_lengths}")
    assert fill >= 0.85


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
    made = list(data.ahead(lambda step: step * step, range(20)))
    assert [value for value, _ in made] == [step * step for step in range(20)]
    assert all(waited >= 0 for _, waited in made)
    broken = data.ahead(lambda step: 1 // (3 - step), range(20))
    with pytest.raises(ZeroDivisionError):
        list(broken)


def test_a_slow_reader_never_waits():
    """While a step runs, the next batch is made."""
    waits = []
    for _, waited in data.ahead(lambda step: time.sleep(0.05), range(5)):
        waits.append(waited)
        time.sleep(0.2)
    assert waits[0] > 0.03 and max(waits[1:]) < 0.02


def test_a_row_holds_the_longest_pair_and_no_less(pretrained):
    pairs = load(from_rows(ROWS, "rows"), pretrained)
    longest = int(pairs.lengths(True).max())
    for share in (True, False):
        longest = int(pairs.lengths(share).max())
        make_batches(pretrained, row_length=longest, share_prompt=share)
        assert make_batches(pretrained, share_prompt=share).layout.row_lengths[-1] >= longest
        with pytest.raises(ValueError, match=rf"^data\.row_length: .*\({longest} tokens\), got {longest - 1}; "):
            make_batches(pretrained, row_length=longest - 1, share_prompt=share)


@pytest.mark.parametrize("rows", [
    [EMPTY], [SAME], [{"prompt": "", "chosen": "", "rejected": ""}], [{"prompt": "", "chosen": "a", "rejected": ""}]])
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
    on_devices = data.to_devices(batch, mesh)
    assert equal(jax.device_get(on_devices), batch)
    for there, here in zip(on_devices.groups, batch.groups, strict=True):
        shape = here.rows.ids.shape
        assert there.rows.ids.sharding.shard_shape(shape)[1] == shape[1] // 8


def test_ids_and_positions_past_the_tables_are_errors(pretrained):
    pairs = load(from_rows(ROWS, "rows"), pretrained)
    most, longest = pairs.max_id(), int(pairs.sequence_lengths().max())
    data.check_tables(pairs, most + 1, longest, "data.train")
    with pytest.raises(ValueError, match=rf"^data\.train: token ids must be below .* \({most}\), got {most}"):
        data.check_tables(pairs, most, longest, "data.train")
    with pytest.raises(ValueError, match=rf"^data\.train: sequences .* {longest - 1} positions, got {longest}"):
        data.check_tables(pairs, most + 1, longest - 1, "data.train")


def test_a_damaged_cache_file_is_made_again(tmp_path, pretrained, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    config = DataConfig(train="rows", max_length=64)
    digest = load_pairs(from_rows(ROWS, "rows"), pretrained, config)[0].digest()
    (file,) = (tmp_path / "tokenised").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again, _ = load_pairs(from_rows(ROWS, "rows"), pretrained, config)
    assert again.digest() == digest


def test_rows_that_hold_no_text_are_named():
    with pytest.raises(ValueError, match=r"rows, row 2: must hold strings or messages"):
        from_rows([{"chosen": "a", "rejected": "b"}, {"chosen": {1}, "rejected": "b"}], "rows")
