"""Read rows of Parquet files, the format of data sets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genpoe_plugin.errors import InputError

_MAGIC = b"PAR1"
_BATCH = 64  # rows; a row of NarrativeQA contains a whole book


def is_parquet(path: str | Path) -> bool:
    """Whether a file begins with Parquet's magic bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_parquet_rows(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of a Parquet file, read in small batches, each with its location: file name and row number, from 1.

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
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{path}: not a complete Parquet file ({reason})") from error
