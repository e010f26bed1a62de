"""The file that hands pairs to every system.

Numpy only: a process that measures PyTorch must not hold JAX.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Pair(NamedTuple):
    """The fields of orpo_jax.packing.Pair."""

    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_prompt: int
    rejected_prompt: int
    shared: int
    encoder_ids: np.ndarray | None = None  # of encoder-decoders, which no benchmark has

    @property
    def sequences(self) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """The chosen and the rejected sequence, each with how many of its tokens are prompt."""
        return (self.chosen_ids, self.chosen_prompt), (self.rejected_ids, self.rejected_prompt)

    @property
    def longest(self) -> int:
        return max(len(self.chosen_ids), len(self.rejected_ids))


def save(pairs: Sequence[Any], file: pathlib.Path) -> None:
    """Writes pairs, of this kind or of packing's, as one npz file."""
    counts = [[len(p.chosen_ids), len(p.rejected_ids), *p[2:5]] for p in pairs]
    ids = np.concatenate([ids for p in pairs for ids in p[:2]])
    np.savez(file, ids=ids.astype(np.int32), counts=np.array(counts, np.int64))


def load(file: pathlib.Path) -> list[Pair]:
    """Returns the pairs of such a file."""
    with np.load(file) as arrays:
        ids, counts = arrays["ids"], arrays["counts"]
    parts = np.split(ids, np.cumsum(counts[:, :2].reshape(-1))[:-1])
    return [Pair(parts[2 * i], parts[2 * i + 1], *row) for i, row in enumerate(counts[:, 2:].tolist())]
