import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_jax import packing
from orpo_jax.attention import visible
from orpo_jax.preference import make_pair


def random_pair(rng, max_prompt=6, max_response=7, same_prompt=True):
    prompt = rng.integers(5, 50, rng.integers(0, max_prompt + 1))
    chosen, rejected = (rng.integers(5, 50, rng.integers(1, max_response + 1)) for _ in range(2))
    other = prompt if same_prompt or not len(prompt) else np.append(prompt[:-1], 99)
    return make_pair(np.append(prompt, chosen).astype(np.int32), np.append(other, rejected).astype(np.int32),
                     len(prompt), len(other))


def lengths_of(pairs, share):
    return [int(packing.pair_length(len(p.chosen_ids), len(p.rejected_ids), p.shared, share)) for p in pairs]


def pack(lengths, row_length, max_pairs):
    """Returns the rows that hold pairs, of as many as there are pairs."""
    rooms = np.tile((row_length, max_pairs), (len(lengths), 1))
    return [row for row in packing.pack(np.stack([lengths, np.ones_like(lengths)], axis=1), rooms) if row]


def build(pairs, share, row_length=64, max_pairs=8, **options):
    plan = pack(lengths_of(pairs, share), row_length, max_pairs)
    options = {"nll_scope": "sequence", "nll_reduction": "token", **options}
    rows = packing.build_rows(pairs, plan, num_rows=len(plan) + 1, row_length=row_length, max_pairs=max_pairs,
                              share_prompt=share, **options)
    return plan, rows


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_each_target_is_predicted_from_exactly_its_own_sequence(seed, share, same_prompt):
    """What a query sees, in order of position, is the sequence up to it: the property that makes packing exact."""
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng, same_prompt=same_prompt) for _ in range(rng.integers(1, 7))]
    plan, rows = build(pairs, share)
    for row, members in enumerate(plan):
        T = rows.ids.shape[1]
        mask = np.asarray(visible(jnp.arange(T), jnp.arange(T), jnp.asarray(rows.q_end[row:row + 1])))[0]
        targets = {}
        for slot, member in enumerate(members):
            pair = pairs[member]
            for segment, ids, prompt in ((2 * slot + 1, pair.chosen_ids, pair.chosen_prompt),
                                         (2 * slot + 2, pair.rejected_ids, pair.rejected_prompt)):
                at = np.flatnonzero(rows.segments[row] == segment)
                assert len(at) == len(ids) - max(prompt, 1)  # the first token of a sequence is never predicted
                for q in at:
                    seen = np.flatnonzero(mask[q])
                    order = rows.positions[row, seen]
                    assert (order == np.arange(len(order))).all()
                    assert (rows.ids[row, seen] == ids[:len(order)]).all()
                    assert rows.targets[row, q] == ids[len(order)]
                    targets.setdefault(segment, []).append(len(order))
        assert all(sorted(places) == places for places in targets.values())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.booleans())
def test_weights_cover_prompt_and_chosen_once(seed, share):
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng) for _ in range(5)]
    _, rows = build(pairs, share)
    assert rows.nll_weights.sum() == sum(len(pair.chosen_ids) - 1 for pair in pairs)
    assert rows.pair_weights.sum() == sum(
        len(pair.chosen_ids) > max(pair.chosen_prompt, 1) and len(pair.rejected_ids) > max(pair.rejected_prompt, 1)
        for pair in pairs)
    _, rows = build(pairs, share, nll_scope="completion")
    assert rows.nll_weights.sum() == sum(len(pair.chosen_ids) - max(pair.chosen_prompt, 1) for pair in pairs)
    _, rows = build(pairs, share, nll_reduction="sequence")
    np.testing.assert_allclose(rows.nll_weights.sum(), sum(len(pair.chosen_ids) > 1 for pair in pairs), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["sequence", "completion"]),
       st.sampled_from(["token", "sequence"]), st.integers(0, 1))
def test_what_a_pair_weighs_is_known_before_its_row_is_built(seed, share, scope, reduction, tail):
    """By this a host knows the step's counts without the rows of others."""
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng, max_response=2) for _ in range(rng.integers(1, 9))]
    _, rows = build(pairs, share, nll_scope=scope, nll_reduction=reduction, tail=tail)
    weights_P2 = packing.weigh(np.array([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs]),
                               np.array([[p.chosen_prompt, p.rejected_prompt] for p in pairs]), scope, reduction, tail)
    np.testing.assert_allclose(weights_P2.sum(axis=0), [rows.nll_weights.sum(), rows.pair_weights.sum()], rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.integers(1, 5))
def test_every_pair_is_packed_once_and_fits(lengths, max_pairs):
    plan = pack(lengths, 100, max_pairs)
    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 100 and len(row) <= max_pairs for row in plan)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(0, 9)), min_size=1, max_size=60))
def test_every_capacity_holds(sizes):
    sizes = np.array(sizes)
    plan = packing.pack(sizes, np.tile((100, 60, 12), (len(sizes), 1)))
    assert sorted(i for row in plan for i in row) == list(range(len(sizes)))
    assert all((sizes[row].sum(0) <= (100, 60, 12)).all() for row in plan)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), max_size=20), st.lists(st.integers(10, 60), max_size=8))
def test_rows_may_differ_and_none_is_opened(lengths, rooms):
    sizes, rooms = np.array(lengths, int)[:, None], np.array(rooms, int)[:, None]
    plan = packing.pack(sizes, rooms)
    if plan is None:
        # Best fit decreasing leaves no pair out that an empty row would hold, and none if all are small.
        assert sum(lengths) > sum(rooms.T[0]) / 2 - 40 * len(rooms) or not len(rooms)
    else:
        assert sorted(i for row in plan for i in row) == list(range(len(lengths))) and len(plan) == len(rooms)
        assert all(sizes[row].sum() <= room for row, room in zip(plan, rooms, strict=True))


def test_best_fit_fills_rows():
    assert len(pack([60, 50, 50, 40, 30, 70], 100, 8)) == 3


def test_sharing_saves_the_prompt_but_its_last_token():
    pair = make_pair(np.arange(12, dtype=np.int32), np.array([*range(8), 90, 91], np.int32), 8, 8)
    assert lengths_of([pair], True) == [7 + 1 + 3 + 1 + 1]
    assert lengths_of([pair], False) == [11 + 9]


def test_prompts_that_end_otherwise_share_what_they_can():
    pair = make_pair(np.array([1, 2, 3, 9, 9], np.int32), np.array([1, 2, 4, 9], np.int32), 3, 3)
    assert pair.shared == 2


def test_padding_sees_only_itself():
    rows = packing.empty_rows(1, 5, 2)
    assert (visible(jnp.arange(5), jnp.arange(5), jnp.asarray(rows.q_end))[0] == jnp.eye(5, dtype=bool)).all()
    assert not rows.nll_weights.any() and not rows.pair_weights.any()


@pytest.mark.parametrize("count", [100_000])
def test_a_large_plan_takes_seconds(count):
    lengths = np.random.default_rng(0).integers(100, 1900, count)
    plan = pack(lengths, 2048, 16)
    assert sum(lengths) / (len(plan) * 2048) > 0.97
