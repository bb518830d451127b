"""The passages of an index on disk: any of them in no time, by row or by id, and nothing to load.

- ``passages.arrow``: the passages in the order of their rows, an Arrow file in record batches of `BLOCK`;
- ``ids.npy``: uint64 [2, n]: hashes of the ids in ascending order, and the row of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.passages import Passage
from genpoe_plugin.retrieval.shards import BLOCK, SCHEMA, Shards

PASSAGES, IDS = "passages.arrow", "ids.npy"
OPEN_BLOCKS = 2**16  # more than Wikipedia has; to open one takes longer than to read a passage of it, to keep it 3 KB


class PassageStore:
    """Passages by row, counted from 0, and by id."""

    def __init__(self, passages: pa.ipc.RecordBatchFileReader, ids: np.ndarray, count: int) -> None:
        self._ids, self._count = ids, count
        self._columns = lru_cache(OPEN_BLOCKS)(lambda block: tuple(passages.get_batch(block).columns))

    @classmethod
    def open(cls, directory: Path) -> PassageStore:
        """Map the files into memory.

        Raises:
            InputError: one of them is not what it should be.
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
        """The passage of a row; an ``IndexError`` where there is no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} passages")
        block, offset = divmod(int(row), BLOCK)
        identifier, title, text = self._columns(block)
        return Passage(identifier[offset].as_py(), title[offset].as_py(), text[offset].as_py())

    def row(self, identifier: str) -> int:
        """The row of the passage with this id; a ``KeyError`` where there is none."""
        wanted = np.uint64(_hash(identifier))
        hashes, rows = self._ids
        for position in range(np.searchsorted(hashes, wanted), len(self)):
            if hashes[position] != wanted:
                break
            if self.passage(rows[position]).id == identifier:
                return int(rows[position])
        raise KeyError(identifier)


def write_passages(shards: Shards, directory: Path, *, progress: bool = False) -> None:
    """Write the files of a `PassageStore` from those of all shards; what is there already is left as it is."""
    if not (directory / PASSAGES).exists():
        with (
            tqdm(desc="storing passages", total=shards.count, unit="passage", disable=not progress) as bar,
            atomic_file(directory / PASSAGES) as temporary,
            temporary.open("wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
        ):
            for block in _blocks(shards):
                writer.write_batch(block)
                bar.update(block.num_rows)
    if not (directory / IDS).exists():
        hashes = np.empty(shards.count, "<u8")
        bar = tqdm(desc="storing ids", total=shards.count, unit="passage", disable=not progress)
        with bar, pa.ipc.open_file(pa.memory_map(str(directory / PASSAGES))) as passages:
            for number in range(passages.num_record_batches):
                ids = passages.get_batch(number).column("id").to_pylist()
                hashes[number * BLOCK : number * BLOCK + len(ids)] = [_hash(identifier) for identifier in ids]
                bar.update(len(ids))
        order = np.argsort(hashes, kind="stable")
        with atomic_file(directory / IDS) as temporary, temporary.open("wb") as file:
            header = {"shape": (2, len(order)), "fortran_order": False, "descr": hashes.dtype.str}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(hashes[order].data)
            file.write(order.astype(hashes.dtype).data)


def _blocks(shards: Shards) -> Iterator[pa.RecordBatch]:
    """All passages in record batches of `BLOCK`, wherever the shards end; the last batch may be smaller."""
    waiting: list[pa.RecordBatch] = []
    for number in shards.numbers:
        path = shards.passages_file(number)
        try:
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                for i in range(reader.num_record_batches):
                    waiting.append(reader.get_batch(i))
                    while sum(batch.num_rows for batch in waiting) >= BLOCK:
                        table = pa.Table.from_batches(waiting)
                        yield table.slice(0, BLOCK).combine_chunks().to_batches()[0]
                        waiting = table.slice(BLOCK).to_batches()
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read ({reason}); delete it and run the same command again") from error
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]


def _hash(identifier: str) -> int:
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "little")
