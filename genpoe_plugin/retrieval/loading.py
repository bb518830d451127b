"""Open the retriever of an index directory, whatever its kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.manifest import BM25, DENSE, read_manifest, retriever_kind

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.retriever import Retriever


def load_retriever(index: str | Path, *, device: str = "cpu", encoder: str | None = None) -> Retriever:
    """Open an index directory with the retriever that it was built for.

    Args:
        index: directory of the index.
        device: device of the encoder.
        encoder: new path of the encoder, if it has moved.

    Raises:
        InputError: the index or its encoder cannot be loaded, or they do not match.
    """
    directory = Path(index)
    kind = retriever_kind(read_manifest(directory))
    # Imported here because faiss and the encoders take seconds, and BM25 does without.
    if kind == DENSE:
        from genpoe_plugin.retrieval.dense import DenseRetriever

        return DenseRetriever.load(directory, device=device, encoder=encoder)
    if kind != BM25:
        raise InputError(f"{directory}: an index of {kind}, which this version does not know")
    if encoder is not None:
        raise InputError(f"{directory}: an index of BM25, which has no encoder; leave {encoder} out")
    from genpoe_plugin.retrieval.bm25 import BM25Retriever

    return BM25Retriever.load(directory)
