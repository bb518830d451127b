"""The look through a whole corpus before the long work on it: how many passages, which, and whether ids are unique."""

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

CANDIDATES = 1000  # repeated hashes looked into; one is enough to find two equal ids


@dataclass(frozen=True, slots=True)
class Corpus:
    """``digest`` is the sha256 over id, title and text of all passages: a file and its ``.gz`` have the same."""

    count: int
    digest: str


def check_corpus(passages: str | Path | Iterable[Passage], *, progress: bool = False) -> Corpus:
    """Read all passages of a file, or of an iterable that can be read again, once; 16 bytes a passage stay in memory.

    Raises:
        InputError: a line is malformed, as `read_passages` says; two passages have one id; or there are no passages.
    """
    digest, hashes = hashlib.sha256(), array("q")
    for passage, _ in tqdm(_located(passages), desc="checking passages", unit="passage", disable=not progress):
        digest.update(f"{passage.id}\0{passage.title}\0{passage.text}\0".encode())
        hashes.append(hash(passage.id))
    if not hashes:
        raise InputError(f"{passages if isinstance(passages, str | Path) else 'passages'}: no passages to encode")
    if repeated := _repeated(hashes):
        seen: dict[str, str] = {}
        for passage, where in _located(passages):
            if hash(passage.id) in repeated and (first := seen.setdefault(passage.id, where)) != where:
                raise InputError(f"{where}: id {passage.id!r} is also that of {first}; ids have to be unique")
    return Corpus(len(hashes), digest.hexdigest())


def _repeated(hashes: array[int]) -> set[int]:
    """Some of the hashes that come more than once."""
    values = np.sort(np.frombuffer(hashes, np.int64))
    return set(values[1:][values[1:] == values[:-1]][:CANDIDATES].tolist())


def _located(passages: str | Path | Iterable[Passage]) -> Iterator[tuple[Passage, str]]:
    if isinstance(passages, str | Path):
        yield from located_passages(passages)
    else:
        for number, passage in enumerate(passages, 1):
            yield passage, f"passage {number}"


def source_of(passages: str | Path | Iterable[Passage]) -> dict[str, Any] | None:
    """What tells that a file is still the same; None for what is not a file."""
    if not isinstance(passages, str | Path) or not Path(passages).is_file():
        return None
    status = Path(passages).stat()
    return {"path": str(Path(passages).resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
