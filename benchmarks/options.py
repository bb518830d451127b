"""What a benchmark is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for.

    Attributes:
        quick: a size for a few minutes.
        out: a folder that keeps what is made on the way, and is used again.
        data: a folder of real data.
        reranker: directory or hub name of a trained one.
    """

    quick: bool = False
    out: Path | None = None
    data: Path | None = None
    reranker: str | None = None


@contextmanager
def folder_of(options: Options) -> Iterator[Path]:
    """The folder ``out``, or one that is deleted in the end."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        yield options.out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
