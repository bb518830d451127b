"""Check a corpus before it is encoded: count and hash its passages, and check that ids are unique."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from genpoe_plugin.data.passages import Passage, located_passages
from genpoe_plugin.errors import InputError

CANDIDATES = 1000  # number of repeated hashes to check; one is enough to find equal ids


@dataclass(frozen=True, slots=True)
class Corpus:
    """The result of checking a corpus.

    Attributes:
        count: number of passages.
        digest: SHA-256 of id, title and text of all passages; the same for a file and its ``.gz``.
    """

    count: int
    digest: str


def check_corpus(passages: str | Path | Iterable[Passage], *, progress: bool = False) -> Corpus:
    """Read all passages once and check them, with 16 bytes of memory per passage.

    Args:
        passages: a file, or an iterable that can be read again.
        progress: whether to show a progress bar.

    Raises:
        InputError: a passage is malformed (see `read_passages`), two passages have the same id, or there are none.
    """
    digest, hashes = hashlib.sha256(), array("q")
    for passage, _ in tqdm(_located(passages), desc="checking passages", unit="passage", disable=not progress):
        digest.update(f"{passage.id}\0{passage.title}\0{passage.text}\0".encode())
        hashes.append(hash(passage.id))
    if not hashes:
        raise InputError(f"{passages if isinstance(passages, str | Path) else 'passages'}: no passages in it")
    if repeated := _repeated(hashes):
        seen: dict[str, str] = {}
        for passage, where in _located(passages):
            if hash(passage.id) in repeated and (first := seen.setdefault(passage.id, where)) != where:
                raise InputError(f"{where}: id {passage.id!r} is also the id of {first}; ids must be unique")
    return Corpus(len(hashes), digest.hexdigest())


def _repeated(hashes: array[int]) -> set[int]:
    """Hashes that occur more than once, at most `CANDIDATES`."""
    values = np.sort(np.frombuffer(hashes, np.int64))
    return set(values[1:][values[1:] == values[:-1]][:CANDIDATES].tolist())


def _located(passages: str | Path | Iterable[Passage]) -> Iterator[tuple[Passage, str]]:
    if isinstance(passages, str | Path):
        yield from located_passages(passages)
    else:
        for number, passage in enumerate(passages, 1):
            yield passage, f"passage {number}"


def source_of(passages: str | Path | Iterable[Passage]) -> dict[str, Any] | None:
    """Path, size and modification time of a file, to detect changes; None for other passages."""
    if not isinstance(passages, str | Path) or not Path(passages).is_file():
        return None
    status = Path(passages).stat()
    return {"path": str(Path(passages).resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
