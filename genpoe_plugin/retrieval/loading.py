"""Open the retriever of an index directory, whatever its kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.manifest import BM25, DENSE, read_manifest, retriever_kind

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.passage_store import PassageStore
    from genpoe_plugin.retrieval.retriever import Retriever


def index_directories(index: str | Path) -> list[Path]:
    """The directories in the name of an index: one, or several with ``+`` between.

    A directory whose own name has a ``+`` is that directory.

    Raises:
        InputError: there is no such directory.
    """
    name = str(index)
    if (directories := _directories(name)) is None:
        missing = next((part for part in name.split("+") if not Path(part).is_dir()), name)
        raise InputError(f"{missing}: no such directory; `genpoe index build` makes one")
    return directories


def _directories(name: str) -> list[Path] | None:
    if name and Path(name).is_dir():
        return [Path(name)]
    for plus in re.finditer(r"\+", name):
        first, rest = name[: plus.start()], _directories(name[plus.end() :])
        if first and Path(first).is_dir() and rest is not None:
            return [Path(first), *rest]
    return None


def load_retriever(index: str | Path, *, device: str = "cpu", encoder: str | None = None) -> Retriever:
    """Open an index with the retriever that it was built for, or several indexes as one `HybridRetriever`.

    Args:
        index: directory of the index, or several with ``+`` between.
        device: device of the encoder.
        encoder: new path of the encoder, if it has moved.

    Raises:
        InputError: an index or its encoder cannot be loaded, they do not match, or indexes have different passages.
    """
    directories = index_directories(index)
    kinds = [retriever_kind(read_manifest(directory)) for directory in directories]
    if encoder is not None and kinds.count(DENSE) != 1:
        raise InputError(f"{index}: {kinds.count(DENSE)} of its indexes have an encoder; {encoder} is for one")
    retrievers = [
        _load_one(directory, kind, device, encoder) for directory, kind in zip(directories, kinds, strict=True)
    ]
    if len(retrievers) == 1:
        return retrievers[0]
    from genpoe_plugin.retrieval.hybrid import HybridRetriever

    return HybridRetriever(retrievers)


def open_passages(index: str | Path) -> PassageStore:
    """The passages of an index, without what searches them.

    Raises:
        InputError: the index is incomplete or damaged.
    """
    from genpoe_plugin.retrieval.passage_store import PassageStore

    directory = index_directories(index)[0]
    read_manifest(directory)
    return PassageStore.open(directory)


def _load_one(directory: Path, kind: str, device: str, encoder: str | None) -> Retriever:
    # Imported here because faiss and the encoders take seconds, and BM25 does without.
    if kind == DENSE:
        from genpoe_plugin.retrieval.dense import DenseRetriever

        return DenseRetriever.load(directory, device=device, encoder=encoder)
    if kind == BM25:
        from genpoe_plugin.retrieval.bm25 import BM25Retriever

        return BM25Retriever.load(directory)
    raise InputError(f"{directory}: an index of {kind}, which this version does not know")
