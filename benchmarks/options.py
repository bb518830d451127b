"""Options of a benchmark run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Options of a benchmark run.

    Attributes:
        quick: use a small size.
        out: folder that keeps intermediate files, to reuse them.
        data: folder of real data.
        reranker: directory or hub name of a trained reranker.
    """

    quick: bool = False
    out: Path | None = None
    data: Path | None = None
    reranker: str | None = None


@contextmanager
def folder_of(options: Options) -> Iterator[Path]:
    """The folder ``out``, or a temporary one."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        yield options.out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
