"""The rows of a Parquet file, as the Hugging Face hub keeps its data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genpoe_plugin.errors import InputError

_MAGIC = b"PAR1"
_BATCH = 64  # rows; NarrativeQA's have a whole book each


def is_parquet(path: str | Path) -> bool:
    """Whether a file begins as Parquet does."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_parquet_rows(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows, each with its number, counted from 1, after the file's name; few at a time are in memory.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{path}: not a whole Parquet file ({reason})") from error
