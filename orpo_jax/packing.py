"""The plan: preference pairs -> rows of a fixed length. Numpy only; knows nothing of models or devices.

A row holds whole pairs, one after the other, each as a trunk that both branches share and two branches:

    prompt[:-1] | prompt[-1] chosen[:-1] | prompt[-1] rejected[:-1]

Each branch starts with the last token that the two sequences share, so every position predicts exactly one target.
Positions restart at 0 with each pair, and both branches' go on from the trunk's. One integer per position carries the
attention mask: key k is visible to query q when `k <= q < q_end[k]`. It shares the trunk, hides the branches from
each other and separates the pairs. Without prompt sharing the trunk is empty and a branch holds its whole sequence.
For an encoder-decoder a row holds one pair: the sequences are a start token and the response, the start token being all
of the prompt, and the prompt itself lies beside the row, to be encoded once for both responses.
Shapes: B rows, T tokens of a row, S pair slots of a row, E tokens of the encoder.
"""

import bisect
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Pair(NamedTuple):
    """One tokenised pair: whole sequences, how many of their ids are prompt, and how many of those both share."""

    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_prompt: int
    rejected_prompt: int
    shared: int
    encoder_ids: np.ndarray | None = None  # the prompt, where an encoder reads it


class Rows(NamedTuple):
    """What the model and the loss see of some rows."""

    ids: Any  # [B, T] int32
    positions: Any  # [B, T] int32
    targets: Any  # [B, T] int32, the token that the position predicts
    nll_weights: Any  # [B, T] float32, weight of the target in the NLL
    segments: Any  # [B, T] int32, 2s+1 / 2s+2 for a chosen / rejected response target of slot s, 0 elsewhere
    q_end: Any  # [B, T] int32, the first query index that the position, as a key, is hidden from
    pair_weights: Any  # [B, S] float32
    bounds: Any  # [B, S, 4] int32, where a slot's trunk, chosen and rejected branch start, and its end; 0 if empty
    # Of an encoder-decoder's rows only.
    encoder_ids: Any = None  # [B, E] int32
    encoder_lengths: Any = None  # [B] int32, from where on they are padding


def trunk_length(shared: Any, share_prompt: bool) -> Any:
    """Returns how many positions the two branches share: the common start of the prompts, less its last token."""
    return np.maximum(shared, 1) - 1 if share_prompt else np.zeros_like(shared)


def pair_length(chosen_length: Any, rejected_length: Any, shared: Any, share_prompt: bool) -> Any:
    """Returns the positions that a pair takes of a row, from the lengths of its whole sequences."""
    return chosen_length + rejected_length - 2 - trunk_length(shared, share_prompt)


def branch_lengths(lengths_P2: np.ndarray, shared_P: np.ndarray, share_prompt: bool) -> np.ndarray:
    """Returns the positions of each pair's trunk, and of its chosen and rejected branch with it, [pairs, 3].

    lengths_P2: tokens of the whole chosen and rejected sequence; shared_P: of the prompts' common start.
    """
    return np.column_stack([trunk_length(shared_P, share_prompt), lengths_P2 - 1])


def weigh(lengths_P2: np.ndarray, prompts_P2: np.ndarray, nll_scope: str, nll_reduction: str, tail: int = 0
          ) -> np.ndarray:
    """Returns each pair's sum of nll_weights and its pair_weight, [pairs, 2], as `build_rows` will write them.

    lengths_P2, prompts_P2: tokens of the chosen and the rejected sequence, and how many of them are prompt.
    """
    responses_P2 = np.maximum(lengths_P2 - tail - np.maximum(prompts_P2, 1), 0)
    nll = responses_P2[:, 0] if nll_scope == "completion" else np.maximum(lengths_P2[:, 0] - 1 - tail, 0)
    return np.stack([nll > 0 if nll_reduction == "sequence" else nll, responses_P2.min(axis=1) > 0], axis=1)


def count_positions(branches: np.ndarray) -> int:
    """Returns the positions that pairs take of rows together; branches as branch_lengths returns them."""
    return int((branches @ (-1, 1, 1)).sum())


class Room(NamedTuple):
    """What a row has, and a pair takes."""

    positions: Any
    pairs: Any
    expanded: Any  # positions of whole branches, each with its trunk, for kernels that want them so
    scored: Any  # positions that predict a response's token


def pack(sizes_PC: np.ndarray, rooms_RC: np.ndarray) -> list[list[int]] | None:
    """Returns the pairs of each of R rows, or None where they do not fit: best fit decreasing, the same on every host.

    sizes_PC: what each pair takes of each of a row's capacities. The first is positions, by which pairs are ordered
    and the best fit is found; the others (slots, ...) must have room too. rooms_RC: what each row has of them.
    """
    rows: list[list[int]] = [[] for _ in rooms_RC]
    # Lists: with arrays of four numbers each, layouts take 2.4 times as long to choose.
    size_of, room_of = sizes_PC.tolist(), rooms_RC.tolist()
    open_rows = sorted((room[0], row) for row, room in enumerate(room_of))  # (positions left, row)
    for pair in np.lexsort((np.arange(len(sizes_PC)), -sizes_PC[:, 0])).tolist():
        size_C = size_of[pair]
        fit = bisect.bisect_left(open_rows, (size_C[0], -1))
        while fit < len(open_rows) and any(map(operator.lt, room_of[open_rows[fit][1]], size_C)):
            fit += 1
        if fit == len(open_rows):
            return None
        row = open_rows.pop(fit)[1]
        rows[row].append(pair)
        room_of[row] = list(map(operator.sub, room_of[row], size_C))
        if min(room_of[row]) > 0:
            bisect.insort(open_rows, (room_of[row][0], row))
    return rows


def empty_rows(num_rows: int, row_length: int, max_pairs: int, encoder_length: int | None = None) -> Rows:
    """Returns rows of padding: weight 0 everywhere, and each position visible to itself only."""
    zeros = np.zeros((num_rows, row_length), np.int32)
    self_only = np.broadcast_to(np.arange(1, row_length + 1, dtype=np.int32), zeros.shape).copy()
    rows = Rows(zeros, zeros.copy(), zeros.copy(), zeros.astype(np.float32), zeros.copy(), self_only,
                np.zeros((num_rows, max_pairs), np.float32), np.zeros((num_rows, max_pairs, 4), np.int32))
    if encoder_length is None:
        return rows
    return rows._replace(encoder_ids=np.zeros((num_rows, encoder_length), np.int32),
                         encoder_lengths=np.zeros(num_rows, np.int32))


def build_rows(pairs: Sequence[Pair] | Mapping[int, Pair], plan: Iterable[Iterable[int]], *, num_rows: int,
               row_length: int, max_pairs: int, share_prompt: bool, nll_scope: str, nll_reduction: str,
               tail: int = 0, encoder_length: int | None = None) -> Rows:
    """Returns the planned rows, followed by rows of padding up to `num_rows`.

    tail: how many ids at the end of each sequence are no target of the loss. encoder_length: the room for a prompt
    beside each row; None: prompts lie in the rows.
    """
    rows = empty_rows(num_rows, row_length, max_pairs, encoder_length)
    for row, members in enumerate(plan):
        start = 0
        for slot, member in enumerate(members):
            start = _place(rows, row, slot, start, pairs[member], share_prompt, nll_scope, nll_reduction, tail)
            prompt = pairs[member].encoder_ids
            if prompt is not None:
                assert slot == 0, "an encoder reads one prompt to a row"
                rows.encoder_ids[row, :len(prompt)], rows.encoder_lengths[row] = prompt, len(prompt)
    return rows


def _place(rows: Rows, row: int, slot: int, start: int, pair: Pair, share_prompt: bool, nll_scope: str,
           nll_reduction: str, tail: int) -> int:
    """Writes a pair into its slot and returns where the next one starts."""
    trunk = int(trunk_length(pair.shared, share_prompt))
    chosen_start = start + trunk
    rejected_start = chosen_start + len(pair.chosen_ids) - 1 - trunk
    end = rejected_start + len(pair.rejected_ids) - 1 - trunk

    def write(at: slice, ids: np.ndarray, first: int, segment_from: int, segment: int) -> np.ndarray:
        """Lays out inputs ids[first:-1] and targets ids[first+1:]; returns which targets are response tokens."""
        positions = np.arange(first, first + at.stop - at.start)
        response = (positions + 1 >= segment_from) & (positions + 1 < len(ids) - tail)
        rows.ids[row, at] = ids[positions]
        rows.targets[row, at] = ids[positions + 1]
        rows.positions[row, at] = positions
        rows.segments[row, at] = np.where(response, segment, 0)
        return response

    trunk_at, chosen_at, rejected_at = slice(start, chosen_start), slice(chosen_start, rejected_start), slice(
        rejected_start, end)
    write(trunk_at, pair.chosen_ids, 0, pair.chosen_prompt, 0)
    chosen_response = write(chosen_at, pair.chosen_ids, trunk, pair.chosen_prompt, 2 * slot + 1)
    rejected_response = write(rejected_at, pair.rejected_ids, trunk, pair.rejected_prompt, 2 * slot + 2)

    rows.bounds[row, slot] = start, chosen_start, rejected_start, end
    rows.q_end[row, start:end] = end
    rows.q_end[row, chosen_at] = rejected_start
    weights = rows.nll_weights[row, start:rejected_start]
    weights[:len(pair.chosen_ids) - 1 - tail] = 1.0
    if nll_scope == "completion":
        weights[:trunk] = 0.0
        weights[trunk:] = chosen_response
    if nll_reduction == "sequence" and weights.any():
        weights /= weights.sum()
    rows.pair_weights[row, slot] = float(chosen_response.any() and rejected_response.any())
    return end
