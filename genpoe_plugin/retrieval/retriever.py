"""The interface of retrievers: questions in, ranked passages out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.retrieval.passage_store import PassageStore


class Retriever(Protocol):
    """What finds passages for questions: vectors (`DenseRetriever`), words (`BM25Retriever`), or several together."""

    @property
    def name(self) -> str:
        """Name for result files and traces: the encoder, or the method."""

    @property
    def directory(self) -> str | Path:
        """Directory of the index, for messages."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what is retrieved, except the number of passages."""

    @property
    def passages(self) -> PassageStore:
        """All passages that can be retrieved."""

    @property
    def corpus(self) -> str:
        """A hash of the passages; retrievers over the same passages have the same."""

    def retrieve(
        self, questions: Sequence[str], k: int, *, progress: bool = False
    ) -> list[tuple[RetrievedPassage, ...]]:
        """The ``k`` best passages of each question, best first; fewer if fewer are found."""
