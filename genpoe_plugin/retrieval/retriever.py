"""The retriever: questions in, ranked passages out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.encoder import Encoder, load_encoder
from genpoe_plugin.retrieval.index import PassageIndex

BLOCK = 256  # questions encoded and searched at a time


class Retriever:
    """An index with the encoder that it was built with.

    Raises:
        InputError: the encoder is another one; the message names both.
    """

    def __init__(self, index: PassageIndex, encoder: Encoder) -> None:
        if encoder.fingerprint != index.encoder_fingerprint:
            raise InputError(
                f"{index.directory}: built with encoder {index.encoder_name} ({index.encoder_fingerprint[:12]}),"
                f" opened with {encoder.name} ({encoder.fingerprint[:12]}); give that one, or build anew"
            )
        self.index, self.encoder = index, encoder

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "cpu", encoder: str | None = None) -> Retriever:
        """Open an index and load its encoder, from ``encoder`` where that has moved since."""
        index = PassageIndex.load(directory)
        return cls(index, load_encoder(encoder or index.encoder_name, device=device))

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is retrieved, but for the number of passages."""
        return self.index.fingerprint

    def retrieve(
        self, questions: Sequence[str], k: int, *, progress: bool = False
    ) -> list[tuple[RetrievedPassage, ...]]:
        """The ``k`` best passages of each question, best first (fewer where the index finds no more)."""
        results = []
        with tqdm(desc="retrieving", total=len(questions), unit="question", disable=not progress) as bar:
            for start in range(0, len(questions), BLOCK):
                block = questions[start : start + BLOCK]
                scores, rows = self.index.search(self.encoder.encode_questions(block), k)
                for question_scores, question_rows in zip(scores.tolist(), rows.tolist(), strict=True):
                    ranked = enumerate(zip(question_scores, question_rows, strict=True), 1)
                    results.append(
                        tuple(
                            RetrievedPassage(self.index.passage(row), score, rank)
                            for rank, (score, row) in ranked
                            if row >= 0
                        )
                    )
                bar.update(len(block))
        return results
