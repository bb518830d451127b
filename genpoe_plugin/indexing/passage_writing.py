"""Write the passages of an index, from its shards or one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.passage_store import BLOCK, PASSAGES, SCHEMA


def write_passages(shards: Shards, directory: Path, *, progress: bool = False) -> None:
    """Write the file of a `PassageStore` from the passages of all shards; an existing file is kept."""
    _write(_blocks(shards), shards.count, directory, progress)


def write_passage_list(passages: Iterable[Passage], count: int, directory: Path, *, progress: bool = False) -> None:
    """Write the file of a `PassageStore` from ``count`` passages."""
    rows = iter(passages)
    blocks = iter(lambda: list(islice(rows, BLOCK)), [])
    _write(map(_batch, blocks), count, directory, progress)


def _write(blocks: Iterable[pa.RecordBatch], count: int, directory: Path, progress: bool) -> None:
    if (directory / PASSAGES).exists():
        return
    with (
        tqdm(desc="storing passages", total=count, unit="passage", disable=not progress) as bar,
        atomic_file(directory / PASSAGES) as temporary,
        temporary.open("wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for block in blocks:
            writer.write_batch(block)
            bar.update(block.num_rows)


def _batch(passages: list[Passage]) -> pa.RecordBatch:
    columns = zip(*((passage.id, passage.title, passage.text) for passage in passages), strict=True)
    return pa.record_batch([pa.array(column, pa.string()) for column in columns], SCHEMA)


def _blocks(shards: Shards) -> Iterator[pa.RecordBatch]:
    """All passages in record batches of `BLOCK` passages, across shards; the last batch may be smaller."""
    waiting: list[pa.RecordBatch] = []
    for number in shards.numbers:
        path = shards.passages_file(number)
        try:
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
                if reader.schema != SCHEMA:
                    raise ValueError("other columns")
                for i in range(reader.num_record_batches):
                    batch = reader.get_batch(i)
                    batch.validate(full=True)  # Arrow does not by itself, and reading a wrong offset may end a process
                    waiting.append(batch)
                    while sum(batch.num_rows for batch in waiting) >= BLOCK:
                        table = pa.Table.from_batches(waiting)
                        yield table.slice(0, BLOCK).combine_chunks().to_batches()[0]
                        waiting = table.slice(BLOCK).to_batches()
        except (ValueError, OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read ({reason}); delete it and rerun the same command") from error
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]
