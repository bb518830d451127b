"""The passages of an index on disk, with random access by row, without loading them.

``passages.arrow`` has them in the order of their rows: an Arrow file with record batches of `BLOCK` passages.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError

PASSAGES = "passages.arrow"
BLOCK = 512  # passages in a record batch
SCHEMA = pa.schema([(field, pa.string()) for field in ("id", "title", "text")])
OPEN_BLOCKS = 2**16  # cached record batches: more than Wikipedia has, 3 KB each; opening one is slower than reading it


class PassageStore:
    """The passages of an index, by row (from 0).

    Args:
        path: path of the file, for error messages.
        passages: the opened Arrow file.
        count: number of passages.
    """

    def __init__(self, path: Path, passages: pa.ipc.RecordBatchFileReader, count: int) -> None:
        self._path, self._count, self._batches = path, count, passages
        self._columns = lru_cache(OPEN_BLOCKS)(lambda block: tuple(self._block(block).columns))

    @classmethod
    def open(cls, directory: Path) -> PassageStore:
        """Open the file in ``directory``, memory-mapped.

        Raises:
            InputError: it is damaged.
        """
        path = directory / PASSAGES
        try:
            passages = pa.ipc.open_file(pa.memory_map(str(path)))
            last = passages.get_batch(passages.num_record_batches - 1).num_rows
        except (ValueError, OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from error
        if passages.schema != SCHEMA:
            raise _damaged(path, "other columns")
        return cls(path, passages, (passages.num_record_batches - 1) * BLOCK + last)

    def __len__(self) -> int:
        return self._count

    def passage(self, row: int) -> Passage:
        """The passage of a row.

        Raises:
            IndexError: there is no such row.
            InputError: the file is damaged there.
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
            here = pc.is_in(self._columns(block)[0], wanted)
            for offset in pc.indices_nonzero(here).to_pylist():
                passage = self.passage(block * BLOCK + offset)
                found[passage.id] = passage
        return found

    def _block(self, number: int) -> pa.RecordBatch:
        """A record batch after a check of its offsets, which Arrow does not make by itself; a wrong one may crash."""
        try:
            batch = self._batches.get_batch(number)
            batch.validate(full=True)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise _damaged(self._path, error) from error
        rows = min(BLOCK, self._count - number * BLOCK)
        if batch.num_rows != rows or any(column.null_count for column in batch.columns):
            raise _damaged(self._path, f"block {number} has not {rows} passages")
        if pc.min(pc.binary_length(batch.column("text"))).as_py() == 0:  # no corpus has one
            raise _damaged(self._path, f"block {number} has a passage without text")
        return batch


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"{path}: damaged ({' '.join(str(reason).split())}); build the index again")
