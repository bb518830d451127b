"""The passages of an index on disk, with random access by row or id, without loading them.

- ``passages.arrow``: the passages in the order of their rows, an Arrow file with record batches of `BLOCK` passages;
- ``ids.npy``: uint64 ``[2, n]``: hashes of the ids in ascending order, and the row of each.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError

PASSAGES, IDS = "passages.arrow", "ids.npy"
BLOCK = 512  # passages in a record batch
SCHEMA = pa.schema([(field, pa.string()) for field in ("id", "title", "text")])
OPEN_BLOCKS = 2**16  # cached record batches: more than Wikipedia has, 3 KB each; opening one is slower than reading it


class PassageStore:
    """The passages of an index, by row (from 0) and by id.

    Args:
        passages: the opened Arrow file.
        ids: the content of ``ids.npy``.
        count: number of passages.
    """

    def __init__(self, passages: pa.ipc.RecordBatchFileReader, ids: np.ndarray, count: int) -> None:
        self._ids, self._count, self._batches = ids, count, passages
        self._columns = lru_cache(OPEN_BLOCKS)(lambda block: tuple(passages.get_batch(block).columns))

    @classmethod
    def open(cls, directory: Path) -> PassageStore:
        """Open the files in ``directory``, memory-mapped.

        Raises:
            InputError: a file is damaged.
        """
        path = directory / PASSAGES
        try:
            passages = pa.ipc.open_file(pa.memory_map(str(path)))
            last = passages.get_batch(passages.num_record_batches - 1).num_rows
            count = (passages.num_record_batches - 1) * BLOCK + last
            path = directory / IDS
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: damaged ({' '.join(str(error).split())}); build the index again") from error
        if ids.shape != (2, count) or ids.dtype != "<u8":
            raise InputError(f"{path}: damaged ({ids.dtype} {ids.shape} for {count:,} passages); build the index again")
        return cls(passages, ids, count)

    def __len__(self) -> int:
        return self._count

    def passage(self, row: int) -> Passage:
        """The passage of a row.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} passages")
        block, offset = divmod(int(row), BLOCK)
        identifier, title, text = self._columns(block)
        return Passage(identifier[offset].as_py(), title[offset].as_py(), text[offset].as_py())

    def find(self, identifiers: Collection[str]) -> dict[str, Passage]:
        """The passages with these ids, by id, in the order of their rows; all ids of the store are compared."""
        wanted, found = pa.array(list(identifiers), pa.string()), {}
        for block in range(self._batches.num_record_batches):
            here = pc.is_in(self._batches.get_batch(block).column("id"), wanted)
            for offset in pc.indices_nonzero(here).to_pylist():
                passage = self.passage(block * BLOCK + offset)
                found[passage.id] = passage
        return found

    def row(self, identifier: str) -> int:
        """The row of the passage with this id.

        Raises:
            KeyError: there is no such passage.
        """
        target = np.uint64(hash_id(identifier))
        hashes, rows = self._ids
        for position in range(np.searchsorted(hashes, target), len(self)):
            if hashes[position] != target:
                break
            if self.passage(rows[position]).id == identifier:
                return int(rows[position])
        raise KeyError(identifier)


def hash_id(identifier: str) -> int:
    """A 64-bit hash of an id."""
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "little")
