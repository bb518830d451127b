"""Read the vectors of shards without loading all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from genpoe_plugin.indexing.shards import Shards


def chunks(shards: Shards, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
    """Yield the vectors of rows ``start`` to ``stop`` in chunks, float32 ``[size, dimension]``; the last is shorter."""
    for first in range(start, stop, size):
        yield gathered(shards, np.arange(first, min(first + size, stop)))


def gathered(shards: Shards, rows: np.ndarray) -> np.ndarray:
    """The vectors of some rows, float32 ``[n, dimension]``.

    Args:
        shards: the shards.
        rows: row numbers, ascending.

    Raises:
        InputError: a shard is missing or damaged.
    """
    vectors = None
    for number in shards.numbers:
        first = number * shards.rows(0)
        begin, end = np.searchsorted(rows, [first, first + shards.rows(number)])
        if begin < end:
            # The memory mapping ends with this statement, so the shard does not stay in memory.
            part = shards.vectors(number)[rows[begin:end] - first]
            if vectors is None:  # only now is it known that the shards have this dimension
                vectors = np.empty((len(rows), shards.dimension), np.float32)
            vectors[begin:end] = part
    return np.empty((0, shards.dimension), np.float32) if vectors is None else vectors


def sampled_rows(count: int, number: int, seed: int) -> np.ndarray:
    """Draw ``number`` distinct rows of ``count``; int64, ascending."""
    return np.sort(np.random.default_rng(seed).choice(count, number, replace=False, shuffle=False))
