"""Dense retrieval: a passage index that is searched with the vectors of its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.encoder import Encoder, load_encoder
from genpoe_plugin.retrieval.encoder_options import in_words
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.passage_store import PassageStore

BLOCK = 256  # questions encoded and searched at a time


class DenseRetriever:
    """A passage index with its encoder.

    Args:
        index: the passage index.
        encoder: the encoder that the index was built with.

    Raises:
        InputError: the index was built with another encoder; the message names both.
    """

    def __init__(self, index: PassageIndex, encoder: Encoder) -> None:
        if encoder.fingerprint != index.encoder_fingerprint:
            raise InputError(
                f"{index.directory}: built with encoder {index.encoder_words}, opened with"
                f" {in_words(encoder.name, encoder.fingerprint, encoder.options)}; give the former, or build the index"
                " again"
            )
        self.index, self.encoder = index, encoder

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "cpu", encoder: str | None = None) -> DenseRetriever:
        """Open an index and load its encoder, with the prompts and the cut that the index was built with.

        Args:
            directory: directory of the index.
            device: device of the encoder.
            encoder: new path of the encoder, if it has moved.

        Raises:
            InputError: the index or the encoder cannot be loaded, or they do not match.
        """
        index = PassageIndex.load(directory)
        return cls(index, load_encoder(encoder or index.encoder_name, device=device, options=index.encoder_options))

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return self.encoder.name

    @property
    def directory(self) -> Path:
        """Directory of the index."""
        return self.index.directory

    @property
    def passages(self) -> PassageStore:
        """The passages of the index."""
        return self.index.passages

    @property
    def corpus(self) -> str:
        """A hash of the passages."""
        return self.index.manifest["digest"]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what is retrieved, except the number of passages."""
        return self.index.fingerprint

    def retrieve(
        self, questions: Sequence[str], k: int, *, progress: bool = False
    ) -> list[tuple[RetrievedPassage, ...]]:
        """The ``k`` best passages of each question, best first; fewer if the index finds fewer."""
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
