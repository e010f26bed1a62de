"""Token pairs -> the batch of step s, a pure function of (seed, s), in shapes that are the whole run's.

Shapes: M micro-batches, B rows of one micro-batch over all devices, T tokens of a row, S pair slots of a row.
"""

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from orpo_jax import packing
from orpo_jax.config import DataConfig, OrpoConfig
from orpo_jax.data import Pairs
from orpo_jax.head import Counts
from orpo_jax.packing import Room, Rows
from orpo_jax.sharding import batch_sharding, num_shards, own_shards


class Group(NamedTuple):
    """The rows of one length of a step."""

    rows: Rows  # [M, B, ...]; past num_micro they are padding
    num_micro: Any  # int32


class StepBatch(NamedTuple):
    """One optimiser step's rows, and the denominators of its loss."""

    groups: tuple[Group, ...]
    counts: Counts


class BatchInfo(NamedTuple):
    slots: int  # positions computed
    branches: np.ndarray  # [pairs, 3], as Pairs.branches returns them
    encoded: np.ndarray  # [pairs], tokens that an encoder reads

    @property
    def tokens(self) -> int:
        """Positions that hold a token."""
        return packing.count_positions(self.branches) + int(self.encoded.sum())


class Costs(NamedTuple):
    """What decides the shapes of batches on a platform."""

    row_unit: int  # row lengths are multiples of this: of a TPU's tiles on accelerators, of a vector on CPU
    micro_tokens: int  # positions of one micro-batch on one device, at most: its activations must fit
    # What a micro-batch costs beside its positions, in positions. Gradients are zeroed, written and added, 20 bytes a
    # weight; a position takes 6 FLOPs a weight. On two CPU cores (8 GB/s, 250 GFLOP/s) that makes 100 positions.
    micro_cost: int
    # What one more row length costs, once: the FLOPs that the device does in the time that its loop compiles.
    compile_flops: float


ROW_UNIT, CPU_ROW_UNIT = 128, 64
COSTS = {
    # 3.2 s a length (SmolLM2-135M, two cores; 1 to 12 lengths) at 160 GFLOP/s.
    "cpu": Costs(CPU_ROW_UNIT, 2048, 128, 5e11),
    # An estimate: 20 s at half the peak of a v5p (twice that of a v5e).
    "tpu": Costs(ROW_UNIT, 4096, 128, 4e15),
    # 400 is an estimate: 500 to 980 by the data sheets of A100, H200 and H100, at half of their peak FLOPs. On an H200
    # (Qwen2-0.5B's shape) about half as many micro-batches, of looped layers, took 0.08 s off a step of 0.68; a third
    # length took 19 s. That is 6e15 FLOPs there and, if as long, 2e15 on an A100 at half its peak.
    "gpu": Costs(ROW_UNIT, 8192, 400, 3e15),
}
# How much more than the best a layout may cost that is simpler. On an H200 (Qwen2-0.5B's shape, 64 pairs of
# UltraFeedback's lengths a step, each at its fastest of three rounds) it makes three lengths: 154.7 pairs a second. At
# 0.05 there are two, and 147.0.
SLACK = 0.02
# Into how many parts what needs shorter rows may be cut, with a length for each: as many as pay for their compilation
# in the steps of the run.
PARTS = (1, 2, 3, 4, 6, 8, 12)
# Shorter rows that are for what a step's longest rows leave over. Three change nothing (HH's and UltraFeedback's
# lengths, 4 to 512 pairs a step, 1 to 64 shards: the same layouts).
MOST_SHORTER = 2


class SecondLogits(NamedTuple):
    """What rows cost whose logits are too many to be kept: they are computed again."""

    above: int = 0  # scored positions of such rows are more (head.most_at_once)
    cost: float = 0.0  # of each one, in positions


LOGITS_ONCE = SecondLogits()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shapes of every batch of a run: one compiled program serves them all."""

    row_lengths: tuple[int, ...]  # rising; a compiled loop for each
    rows_per_device: int
    num_shards: int
    max_pairs: int  # slots of a row, at most
    branch_length: int  # positions of the longest branch with its trunk
    expanded_length: int  # Room.expanded of the longest row
    max_rows: int  # rows that a step may need
    share_prompt: bool
    packing: bool = True
    scored_length: int | None = None  # Room.scored of the longest row; None: every position is scored
    encoder_length: int | None = None  # tokens of the prompt beside each row; None: there is none
    micro_cost: int = 0  # Costs.micro_cost
    second_logits: SecondLogits = LOGITS_ONCE
    pair_length: float = 1.0  # a row has a slot for each so many of its positions

    @property
    def rows(self) -> int:
        """Rows of one micro-batch over all devices."""
        return self.rows_per_device * self.num_shards

    @property
    def max_micro(self) -> tuple[int, ...]:
        """Micro-batches that a step may need of each length."""
        most = -(-self.max_rows // self.rows)
        return (*(1 if self.packing else most for _ in self.row_lengths[1:]), most)

    def room(self, row_length: int) -> Room:
        """Returns what a row of one of the lengths has."""
        scored = row_length
        if self.scored_length is not None:
            share = math.ceil(self.scored_length * row_length / self.row_lengths[-1] / CPU_ROW_UNIT)
            scored = min(share * CPU_ROW_UNIT, row_length)
        pairs = min(math.ceil(row_length / self.pair_length), self.max_pairs)
        return Room(row_length, pairs, min(self.expanded_length, 2 * row_length), scored)

    def plan(self, sizes: np.ndarray) -> list[list[list[int]]]:
        """Returns the rows of each length as lists of pairs: of what holds them all, the fewest positions.

        sizes: [pairs, 4], as Pairs.sizes returns them.
        """
        for num_micro in self._proposals(sizes):
            counts = [n * self.rows for n in num_micro]
            rows = packing.pack(sizes, np.repeat(self._rooms, counts, axis=0))
            if rows is not None:
                return [rows[sum(counts[:i]):sum(counts[:i + 1])] for i in range(len(counts))]
        raise AssertionError("a pair is longer than the longest row")

    def _proposals(self, sizes: np.ndarray) -> Iterator[Sequence[int]]:
        """Yields micro-batches of each length, from the cheapest on, the last one with a row for each pair.

        Packed, a step is so many micro-batches of the longest rows, and at most one of each shorter length for what is
        left: every shard has the same rows, and without those a whole row of each would be lost to the rounding.
        """
        if not self.packing:  # each pair in the shortest row that has room for it
            shortest = (sizes[:, None] <= self._rooms).all(axis=-1).argmax(axis=1)
            yield [-(-count // self.rows) for count in np.bincount(shortest, minlength=len(self._rooms)).tolist()]
            return
        need, longest = sizes.sum(axis=0), np.eye(len(self._rooms), dtype=int)[-1]
        held = self.rows * self._rooms[-1]
        # Less one: a step that fills the longest rows to the last slot may do with other rows.
        least, most = max(int(((need - 1) // held).max()), 0), -(-len(sizes) // self.rows)
        enough = (self._few_hold >= need - least * held).all(axis=1)
        yield from (self._few[enough] + least * longest).tolist()
        yield from (full * longest for full in range(least + 2, max(least + 2, most) + 1))

    @functools.cached_property
    def _few(self) -> np.ndarray:
        """Micro-batches of each length, from the cheapest on: of the longest one or none, and up to MOST_SHORTER of
        shorter lengths."""
        some = [counts for counts in itertools.product((0, 1), repeat=len(self.row_lengths))
                if sum(counts[:-1]) <= MOST_SHORTER]
        return np.array(sorted(some, key=self._cost))

    @functools.cached_property
    def _rooms(self) -> np.ndarray:
        """What a row of each length has, [lengths, 4]."""
        return np.array([self.room(length) for length in self.row_lengths])

    @functools.cached_property
    def _few_hold(self) -> np.ndarray:
        """What the rows of each of _few have together."""
        return self.rows * (self._few @ self._rooms)

    def _cost(self, num_micro: Sequence[int]) -> float:
        """Returns what a step costs each device, in positions; see `cost`."""
        again = sum(n * cost for n, cost in zip(num_micro, self._again, strict=True))
        return self.slots(num_micro) / self.num_shards + sum(num_micro) * self.micro_cost + again

    @functools.cached_property
    def _again(self) -> list[float]:
        """What a device computes twice in a micro-batch of each length, in positions."""
        above, cost = self.second_logits
        scored = [self.room(length).scored for length in self.row_lengths]
        return [cost * self.rows_per_device * size if size > above else 0.0 for size in scored]

    def num_micro(self, plan: Sequence[Sequence[Any]]) -> list[int]:
        """Returns the micro-batches of each length; each gives every shard the same number of rows."""
        return [-(-len(rows) // self.rows) for rows in plan]

    def slots(self, num_micro: Sequence[int]) -> int:
        beside = self.encoder_length or 0
        return sum(n * self.rows * (length + beside) for n, length in zip(num_micro, self.row_lengths, strict=True))

    def cost(self, steps: Iterable[np.ndarray]) -> float:
        """Returns what such steps cost each device, in positions: those it computes, and what a micro-batch costs
        beside.

        What attention costs is left out: in the back ends that are preferred it goes by the pairs, not by the rows that
        hold them. By rows go splash, cudnn_mask, and XLA's on GPUs.
        """
        return sum(self._cost(self.num_micro(self.plan(step))) for step in steps)

    def least_cost(self, steps: Iterable[np.ndarray]) -> float:
        """Returns what `cost` is not below, without packing: as if pairs could be cut anywhere."""
        return sum(self._cost(next(self._proposals(step))) for step in steps)

    def fill(self, steps: Iterable[np.ndarray]) -> float:
        """Returns which share of the computed positions holds tokens, over steps of pairs of these sizes."""
        steps = list(steps)
        return sum(int(step[:, 0].sum()) for step in steps) / sum(
            max(self.slots(self.num_micro(self.plan(step))), 1) for step in steps)


# Layouts are tried on a set's pairs, at most so many of them, or on more where that makes fewer steps than these.
SAMPLE_PAIRS, SAMPLE_STEPS = 2048, 16
# With train.rows_per_step: pairs that are packed together, and tokens of a row. 1,024 pairs fill 99 % of such rows.
PACKING_BUFFER = 1024
FULL_ROW_LENGTH = 2048


def _sample_steps(sizes: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns the sizes of the pairs of some steps, of as many shuffled epochs as it takes."""
    rng, pairs = np.random.default_rng(0), max(min(len(sizes), SAMPLE_PAIRS), SAMPLE_STEPS * batch_size)
    epochs = (rng.permutation(sizes) for _ in range(-(-pairs // len(sizes))))
    steps = (epoch[start:start + batch_size] for epoch in epochs for start in range(0, len(epoch), batch_size))
    return list(itertools.islice(steps, -(-pairs // batch_size)))


def make_layout(pairs: Pairs, config: DataConfig, batch_size: int, rows_per_device: int | str, num_shards: int,
                platform: str, rows_per_step: int | None = None, attention: str = "xla",
                nll_scope: str = "sequence", position_flops: float = 0.0, num_steps: float = 1.0,
                second_logits: SecondLogits = LOGITS_ONCE) -> Layout:
    """Returns the layout that fits the data; ValueError where a set row_length is too short for a pair.

    Of the row lengths and rows per device that are 'auto' it takes those that cost sample steps least: where a shard
    has few pairs, rows as long as the longest pair would leave half of the last micro-batch empty. position_flops: what
    a device computes for a position; with it, lengths are as many as `num_steps` steps pay for.
    """
    if pairs.encodes:
        config = dataclasses.replace(config, packing=False)  # an encoder reads one prompt to a row
    sizes = pairs.sizes(config.share_prompt)
    lengths, _, expanded, scored = sizes.T
    costs = COSTS.get(platform, COSTS["tpu"])
    unit = costs.row_unit
    round_up = lambda length: max(-(-int(length) // unit) * unit, unit)
    longest = int(lengths.max())
    encoder_length = round_up(pairs.encoder_lengths().max()) if pairs.encodes else None
    if config.row_length == "auto" and rows_per_step is not None:
        # Which pairs a step takes follows from it: the same on every machine.
        tops = {max(FULL_ROW_LENGTH, -(-longest // ROW_UNIT) * ROW_UNIT)}
    elif config.row_length == "auto":
        tops = {round_up(longest * (1 + i / 8)) for i in range(13 if config.packing else 1)}
    else:
        if longest > config.row_length:
            raise ValueError(f"data.row_length: must hold the longest pair ({longest} tokens), got "
                             f"{config.row_length}; set 'auto', or lower data.max_length")
        tops = {config.row_length}
    one_length = config.row_length != "auto" or rows_per_step is not None

    steps = _sample_steps(sizes, batch_size)
    of_steps = np.array([step[:, 0].sum() for step in steps]) / num_shards

    @functools.cache
    def shortest(rows: int) -> np.ndarray:
        """Returns for each step the rows that hold it in one micro-batch, or longer ones than there may be."""
        def of_step(step: np.ndarray) -> int:
            holds = lambda length: packing.pack(step[:, :1], np.full((rows * num_shards, 1), length)) is not None
            choices = range(round_up(step[:, 0].max()), max(tops) + 1, unit)
            at = bisect.bisect_left(choices, True, key=holds)
            return choices[at] if at < len(choices) else max(tops) + 1

        return np.array([of_step(step) for step in steps])

    def cut(top: int, rows: int, parts: int) -> tuple[int, ...]:
        """Returns row lengths: beside the longest one a length for each of equal shares of what needs a shorter row.

        Packed, that is a step in one micro-batch, or what it leaves over when its longest rows are full: close together
        where a shard has few pairs of a step, and evenly spread where it has many. Without packing it is each pair.
        """
        needs = np.where(shortest(rows) <= top, shortest(rows), of_steps / rows % top) if config.packing else lengths
        return tuple(sorted({*map(round_up, np.quantile(needs, np.arange(1, parts) / parts)), top}))

    step_rows = rows_per_step or batch_size
    most_pairs = 1 if not config.packing else sys.maxsize if rows_per_step else batch_size
    crowded = 1.5 if attention in ("cudnn_packed", "cudnn") else math.inf  # in these a slot costs something
    pair_length = float(max(lengths.mean() / crowded, lengths.min(), 1))

    def candidates() -> Iterator[Layout]:
        branch_length = round_up(pairs.sequence_lengths().max() - 1 + pairs.tail)
        for top in sorted(tops):
            # Kernels compute on as much as rows may hold. A little above what they do hold costs next to no fill.
            enough = lambda size, top=top: round_up(max(1.05 * top * size.mean() / lengths.mean(), size.max()))
            max_pairs = min(math.ceil(top / pair_length), most_pairs)
            expanded_length = enough(expanded) if attention in ("cudnn_packed", "splash") else 2 * top
            scored_length = enough(scored) if nll_scope == "completion" else None
            most = costs.micro_tokens // (top + (encoder_length or 0))
            most = max(1, min(most, -(-step_rows // num_shards)))
            for rows in range(most, 0, -1) if isinstance(rows_per_device, str) else (rows_per_device,):
                # Packed, shorter rows save a step one micro-batch at most: of many, that is less than what is let pass.
                pays = not config.packing or rows * top > SLACK * of_steps.mean()
                for some in sorted({cut(top, rows, parts) for parts in (PARTS if pays and not one_length else (1,))}):
                    yield Layout(some, rows, num_shards, max_pairs, branch_length, expanded_length, step_rows,
                                 config.share_prompt, config.packing, scored_length, encoder_length, costs.micro_cost,
                                 second_logits, pair_length)

    layouts = list(candidates())
    if len(layouts) == 1 or rows_per_step is not None:
        return layouts[0]
    # Of compiling a row length, in positions of these steps.
    length_cost = costs.compile_flops / position_flops * len(steps) / num_steps if position_flops else 0.0
    return _cheapest(layouts, steps, length_cost)


def _cheapest(layouts: Sequence[Layout], steps: Sequence[np.ndarray], length_cost: float) -> Layout:
    """Returns the simplest of the layouts that cost such steps, and the compilation of their lengths, within SLACK of
    the least."""
    once_of = {layout: len(layout.row_lengths) * length_cost for layout in layouts}
    least_of = {layout: [layout.least_cost([step]) for step in steps] for layout in layouts}
    cost_of: dict[Layout, float] = {}
    limit = math.inf
    for layout in sorted(layouts, key=lambda layout: sum(least_of[layout]) + once_of[layout]):
        cost = sum(least_of[layout]) + once_of[layout]
        if cost > limit:
            break  # no layout from here on can be good
        for step, least in zip(steps, least_of[layout], strict=True):
            cost += layout.cost([step]) - least
            if cost > limit:
                break
        cost_of[layout] = cost
        limit = min(limit, cost * (1 + SLACK))
    good = [layout for layout, cost in cost_of.items() if cost <= limit]
    # Few lengths make a program that compiles fast, short rows take little memory.
    return min(good, key=lambda layout: (len(layout.row_lengths), layout.rows_per_device * layout.row_lengths[-1],
                                         layout.row_lengths[-1], cost_of[layout]))


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run. `batch(s)` depends on nothing but the data, the seed and s."""

    pairs: Pairs
    layout: Layout
    batch_size: int
    orpo: OrpoConfig
    seed: int | None  # None: file order
    # None: a step takes batch_size pairs, in as many rows as they need. Else it takes that many full rows.
    rows_per_step: int | None = None
    # The shards whose rows `batch` builds: this process's own (sharding.own_shards). None: all.
    shards: tuple[int, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.num_steps(0)

    def num_steps(self, epoch: int) -> int:
        """Returns the steps of an epoch; with rows_per_step they may differ by a few."""
        if self.rows_per_step is not None:
            return -(-len(self._epoch_rows(epoch)) // self.rows_per_step)
        return -(-len(self.pairs) // self.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step, and its place in it."""
        epoch = 0
        while step >= self.num_steps(epoch):
            step -= self.num_steps(epoch)
            epoch += 1
        return epoch, step

    def members(self, step: int) -> np.ndarray:
        """Returns the pairs of a step; an epoch's last step may have fewer."""
        epoch, place = self.locate(step)
        if self.rows_per_step is not None:
            return np.concatenate(self.plan(step)[0])
        return self._order(epoch)[place * self.batch_size:(place + 1) * self.batch_size]

    def plan(self, step: int) -> list[list[np.ndarray]]:
        """Returns the pairs of each row of a step, by row length."""
        if self.rows_per_step is not None:
            epoch, place = self.locate(step)
            return [self._epoch_rows(epoch)[place * self.rows_per_step:(place + 1) * self.rows_per_step]]
        members = self.members(step)
        return [[members[row] for row in rows] for rows in self.layout.plan(self._sizes[members])]

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return self.pairs.sizes(self.layout.share_prompt)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run makes one Batches per data set
    def _order(self, epoch: int) -> np.ndarray:
        count = len(self.pairs)
        return np.arange(count) if self.seed is None else np.random.default_rng([self.seed, epoch]).permutation(count)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _epoch_rows(self, epoch: int) -> list[np.ndarray]:
        """Returns an epoch's rows, each buffer of shuffled pairs packed by itself and its rows shuffled again.

        The planner orders pairs by length: unshuffled, a step would see long ones only, or short ones.
        """
        order, rows = self._order(epoch), []
        for start in range(0, len(order), PACKING_BUFFER):
            buffer = order[start:start + PACKING_BUFFER]
            packed = [buffer[row] for row in self.layout.plan(self._sizes[buffer])[0] if row]
            shuffled = range(len(packed)) if self.seed is None else np.random.default_rng(
                [self.seed, epoch, start]).permutation(len(packed))
            rows.extend(packed[i] for i in shuffled)
        return rows

    @functools.cached_property
    def _branches(self) -> np.ndarray:
        return self.pairs.branches(self.layout.share_prompt)

    @functools.cached_property
    def _weights(self) -> np.ndarray:
        return packing.weigh(self.pairs.sequence_lengths() + self.pairs.tail, self.pairs.prompt_lengths(),
                             self.orpo.nll_scope, self.orpo.nll_reduction, self.pairs.tail)

    def batch(self, step: int) -> tuple[StepBatch, BatchInfo]:
        """Returns the step's rows as numpy arrays, those of `shards` only, and what the whole step holds."""
        layout, plan, groups = self.layout, self.plan(step), []
        own = np.arange(layout.rows).reshape(layout.num_shards, -1)
        own = own[list(self.shards)].ravel() if self.shards is not None else own.ravel()
        for row_length, rows_of_pairs, num_micro, max_micro in zip(
                layout.row_lengths, plan, layout.num_micro(plan), layout.max_micro, strict=True):
            mine = [rows_of_pairs[i].tolist() if i < len(rows_of_pairs) else []
                    for i in (np.arange(max_micro)[:, None] * layout.rows + own).ravel().tolist()]
            rows = packing.build_rows(
                {i: self.pairs[i] for row in mine for i in row}, mine, num_rows=len(mine), row_length=row_length,
                max_pairs=layout.room(row_length).pairs, share_prompt=layout.share_prompt,
                nll_scope=self.orpo.nll_scope, nll_reduction=self.orpo.nll_reduction, tail=self.pairs.tail,
                encoder_length=layout.encoder_length)
            split = lambda x, most=max_micro: x.reshape(most, len(own), *x.shape[1:])
            groups.append(Group(jax.tree.map(split, rows), np.int32(num_micro)))
        members = np.concatenate([row for rows in plan for row in rows])
        info = self._info(plan, members)
        nll_weight, pairs = self._weights[members].sum(axis=0, dtype=np.float64)
        # Counts of nothing are 1: a sum of zeros divided by them stays 0.
        counts = Counts(nll_weight=np.float32(nll_weight or 1), pairs=np.float32(pairs or 1),
                        inputs=np.float32(info.branches[:, 1:].sum()))
        return StepBatch(tuple(groups), counts), info

    def info(self, step: int) -> BatchInfo:
        """Returns what a step holds."""
        plan = self.plan(step)
        return self._info(plan, np.concatenate([row for rows in plan for row in rows]))

    def _info(self, plan: Sequence[Sequence[Any]], members: np.ndarray) -> BatchInfo:
        return BatchInfo(self.layout.slots(self.layout.num_micro(plan)), self._branches[members],
                         self.pairs.encoder_lengths()[members])

    def shapes(self) -> StepBatch:
        """Returns the shapes and types of every batch, over all shards."""
        layout, number = self.layout, lambda dtype: jax.ShapeDtypeStruct((), dtype)

        def group(row_length: int, most: int) -> Group:
            rows = packing.empty_rows(1, row_length, layout.room(row_length).pairs, layout.encoder_length)
            return Group(jax.tree.map(lambda x: jax.ShapeDtypeStruct((most, layout.rows, *x.shape[1:]), x.dtype), rows),
                         number(np.int32))

        return StepBatch(tuple(map(group, layout.row_lengths, layout.max_micro)),
                         Counts(*[number(np.float32)] * len(Counts._fields)))


def batch_shardings(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns where each array of a StepBatch lies: rows are split over the mesh, numbers are everywhere."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: batch_sharding(mesh) if x.ndim else whole, batch)


def to_devices(batch: StepBatch, mesh: jax.sharding.Mesh) -> StepBatch:
    """Returns the batch as global arrays, rows split over the mesh, from the rows of this process's own shards."""
    own, total = own_shards(mesh), num_shards(mesh)

    def place(x: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
        if not x.ndim:
            return jax.make_array_from_callback((), sharding, lambda _: x)
        per_shard = x.shape[1] // len(own)

        def read(index: Any) -> np.ndarray:
            at = own.index((index[1].start or 0) // per_shard) * per_shard
            return x[:, at:at + per_shard]

        return jax.make_array_from_callback((x.shape[0], per_shard * total, *x.shape[2:]), sharding, read)

    return jax.tree.map(place, batch, batch_shardings(batch, mesh))


T = TypeVar("T")


def ahead(make: Callable[[int], T], steps: Iterable[int], count: int = 2) -> Generator[tuple[T, float]]:
    """Yields make(step) of each step, made by a thread up to `count` steps ahead, and the seconds waited for it."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        left = iter(steps)
        waiting = collections.deque(pool.submit(make, step) for step in itertools.islice(left, count))
        while waiting:
            began = time.monotonic()
            made = waiting.popleft().result()
            waited = time.monotonic() - began
            waiting.extend(pool.submit(make, step) for step in itertools.islice(left, 1))
            yield made, waited


def total_steps(batches: Batches, num_train_epochs: float, max_steps: int) -> int:
    """Returns the optimiser steps of a run; fractional epochs are rounded up to whole steps, as in HF's Trainer."""
    if max_steps > 0:
        return max_steps
    epochs = math.floor(num_train_epochs)
    return sum(map(batches.num_steps, range(epochs))) + math.ceil(
        (num_train_epochs - epochs) * batches.num_steps(epochs))
