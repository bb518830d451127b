"""Hybrid retrieval: the rankings of several retrievers over the same passages, joined by reciprocal rank fusion.

A passage's score is the sum over the rankings of 1 / (60 + its rank there), after Cormack, Clarke and Büttcher, SIGIR
2009. Scores of different retrievers need no common scale for that.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.passage_store import PassageStore
from genpoe_plugin.retrieval.retriever import Retriever

K = 60  # of the formula
DEPTH = 100  # passages of each ranking that are joined; more if more are asked for


class HybridRetriever:
    """Several retrievers whose rankings are joined.

    Args:
        retrievers: at least one.

    Raises:
        InputError: they do not have the same passages.
    """

    def __init__(self, retrievers: Sequence[Retriever]) -> None:
        for retriever in retrievers[1:]:
            if retriever.corpus != retrievers[0].corpus:
                raise InputError(
                    f"{retrievers[0].directory} and {retriever.directory}: indexes of different passages"
                    f" ({len(retrievers[0].passages):,} and {len(retriever.passages):,}); build both from the same file"
                )
        self.retrievers = retrievers

    @property
    def name(self) -> str:
        """The names of the retrievers."""
        return "+".join(retriever.name for retriever in self.retrievers)

    @property
    def directory(self) -> str:
        """The directories of their indexes."""
        return "+".join(str(retriever.directory) for retriever in self.retrievers)

    @property
    def passages(self) -> PassageStore:
        """The passages of the indexes."""
        return self.retrievers[0].passages

    @property
    def corpus(self) -> str:
        """A hash of the passages."""
        return self.retrievers[0].corpus

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what is retrieved, except the number of passages."""
        parts = ["reciprocal rank fusion", K, DEPTH, *(retriever.fingerprint for retriever in self.retrievers)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def retrieve(
        self, questions: Sequence[str], k: int, *, progress: bool = False
    ) -> list[tuple[RetrievedPassage, ...]]:
        """The ``k`` passages of each question with the highest sums of reciprocal ranks, best first.

        A tie goes to the passage that an earlier retriever found.
        """
        rankings = [retriever.retrieve(questions, max(k, DEPTH), progress=progress) for retriever in self.retrievers]
        return [fused(of_question)[:k] for of_question in zip(*rankings, strict=True)]


def fused(rankings: Sequence[Sequence[RetrievedPassage]]) -> tuple[RetrievedPassage, ...]:
    """The passages of all rankings of one question, by the sum of their reciprocal ranks, which is their score."""
    passages: dict[str, Passage] = {}
    scores: defaultdict[str, float] = defaultdict(float)
    for ranking in rankings:
        for entry in ranking:
            passages.setdefault(entry.passage.id, entry.passage)
            scores[entry.passage.id] += 1 / (K + entry.rank)
    # Sorting keeps the order of ties, which is that in which they were found.
    order = sorted(scores, key=lambda identifier: -scores[identifier])
    return tuple(
        RetrievedPassage(passages[identifier], scores[identifier], rank) for rank, identifier in enumerate(order, 1)
    )
