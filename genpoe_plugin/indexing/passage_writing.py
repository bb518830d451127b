"""Write the passages of an index from the passages of its shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.passage_store import BLOCK, PASSAGES, SCHEMA


def write_passages(shards: Shards, directory: Path, *, progress: bool = False) -> None:
    """Write the file of a `PassageStore` from the passages of all shards; an existing file is kept."""
    if (directory / PASSAGES).exists():
        return
    with (
        tqdm(desc="storing passages", total=shards.count, unit="passage", disable=not progress) as bar,
        atomic_file(directory / PASSAGES) as temporary,
        temporary.open("wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for block in _blocks(shards):
            writer.write_batch(block)
            bar.update(block.num_rows)


def _blocks(shards: Shards) -> Iterator[pa.RecordBatch]:
    """All passages in record batches of `BLOCK` passages, across shards; the last batch may be smaller."""
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
            raise InputError(f"{path}: cannot be read ({reason}); delete it and rerun the same command") from error
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks().to_batches()[0]
