"""BM25: passages are scored by the words that they share with the question.

An index directory has the files of bm25s (``data.csc.index.npy``, ``indices.csc.index.npy``, ``indptr.csc.index.npy``,
``vocab.index.json``, ``params.index.json``), which ``bm25s.BM25.load`` reads, the passages (`PassageStore`) and the
manifest ``index.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer
from tqdm import tqdm

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.manifest import BM25, MANIFEST, invalid, read_manifest, retriever_kind, verify_files
from genpoe_plugin.retrieval.passage_store import PASSAGES, PassageStore

FILES = ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy", "vocab.index.json", "params.index.json")
STOP_WORDS, LANGUAGE = "en", "english"
FIELDS = {"k1": float, "b": float, "count": int, "vocabulary": int, "digest": str, "files": dict}
BLOCK = 256  # questions whose words are found at a time
BLOCKS_PER_RESULT = 16  # of the search for the best rows


class BM25Retriever:
    """A BM25 index with its passages: Lucene's formula over stemmed words without English stop words.

    Args:
        directory: directory of the index.
        manifest: content of ``index.json``.
        passages: the passages of the index.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], passages: PassageStore) -> None:
        self.directory, self.manifest, self.passages = directory, manifest, passages
        self._stemmer = Stemmer.Stemmer(LANGUAGE)

    @classmethod
    def load(cls, directory: str | Path) -> BM25Retriever:
        """Open an index and check the sizes of its files; the scores are memory-mapped at the first search.

        Raises:
            InputError: the directory is not an index of BM25, or the index is incomplete or damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if (kind := retriever_kind(manifest)) != BM25:
            raise InputError(f"{directory}: an index of {kind} retrieval, not of BM25")
        complete = all(isinstance(manifest.get(field), kind) for field, kind in FIELDS.items())
        if not complete or not {*FILES, PASSAGES} <= manifest["files"].keys():
            raise invalid(directory)
        passages = PassageStore.open(directory)
        if len(passages) != manifest["count"]:
            raise InputError(
                f"{directory}: damaged index ({len(passages):,} passages where {MANIFEST} says {manifest['count']:,});"
                " build it again"
            )
        return cls(directory, manifest, passages)

    @property
    def name(self) -> str:
        """The method."""
        return "BM25"

    @property
    def corpus(self) -> str:
        """A hash of the passages."""
        return self.manifest["digest"]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides a search: the scores of the words, with their parameters, and passages."""
        parts = [BM25, LANGUAGE, STOP_WORDS, self.manifest["files"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def scores(self) -> bm25s.BM25:
        """The opened files of bm25s: the score of each word in each passage, memory-mapped, and the vocabulary."""
        try:
            # Of .npy and .json files alone: arrays that hold pickles are refused.
            scores = bm25s.BM25.load(self.directory, mmap=True, allow_pickle=False, backend="numpy")
            values, rows, ends = (scores.scores[name] for name in ("data", "indices", "indptr"))
            sound = len(values) == len(rows) == ends[-1] and len(ends) == len(scores.vocab_dict) + 1
            sound = sound and (values.dtype.kind, rows.dtype.kind, ends.dtype.kind) == ("f", "i", "i")
            sound = sound and ends[0] == 0 and bool((ends[1:] >= ends[:-1]).all())
            sound = sound and (np.dtype(scores.dtype).kind, np.dtype(scores.int_dtype).kind) == ("f", "i")
            numbers = scores.unique_token_ids_set
            sound = sound and (min(numbers), max(numbers), len(numbers)) == (0, len(ends) - 2, len(ends) - 1)
        except Exception as error:  # numpy's and bm25s' own readers raise nearly anything
            raise self._damaged(error) from error
        counts = scores.scores["num_docs"], len(scores.vocab_dict)
        if not sound or counts != (self.manifest["count"], self.manifest["vocabulary"]):
            raise self._damaged("its files do not match")
        return scores

    def retrieve(
        self, questions: Sequence[str], k: int, *, progress: bool = False
    ) -> list[tuple[RetrievedPassage, ...]]:
        """The ``k`` best passages of each question, best first; the row breaks ties.

        Passages that share no word with the question are not among them, so there may be fewer than ``k``.

        Raises:
            InputError: ``k`` is below 1, or the index is damaged.
        """
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        results = []
        with tqdm(desc="retrieving", total=len(questions), unit="question", disable=not progress) as bar:
            for start in range(0, len(questions), BLOCK):
                for words in self._words(questions[start : start + BLOCK]):
                    try:
                        scores = self.scores.get_scores_from_ids(self.scores.get_tokens_ids(words))
                    except IndexError as error:
                        raise self._damaged(error) from error
                    rows = best_rows(scores, k)
                    results.append(
                        tuple(
                            RetrievedPassage(self.passages.passage(row), score, rank)
                            for rank, (row, score) in enumerate(
                                zip(rows.tolist(), scores[rows].tolist(), strict=True), 1
                            )
                        )
                    )
                    bar.update()
        return results

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.directory}: damaged index of BM25 ({' '.join(str(reason).split())}); build it again")

    def _words(self, questions: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(
            list(questions), stopwords=STOP_WORDS, stemmer=self._stemmer, return_ids=False, show_progress=False
        )

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest.

        Raises:
            InputError: a file is damaged; the message names it.
        """
        verify_files(self.directory, self.manifest)


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """The rows of the ``k`` highest scores above 0, best first; the row breaks ties.

    Args:
        scores: one score per passage, float ``[n]``.
        k: number of rows; fewer are returned if fewer scores are above 0.
    """
    # k blocks have a highest score of at least `least`, so k rows have. Leaving out all others first is several times
    # as fast as a selection among all scores.
    least, size = 0.0, len(scores) // (BLOCKS_PER_RESULT * k)
    if size > 1:
        highest = scores[: len(scores) // size * size].reshape(-1, size).max(axis=1)
        least = np.partition(highest, -k)[-k]
    rows = np.flatnonzero(scores >= least if least > 0 else scores > 0)
    values = scores[rows]
    if len(rows) > k:
        kept = values >= np.partition(values, -k)[-k]
        rows, values = rows[kept], values[kept]
    return rows[np.argsort(-values, kind="stable")[:k]]
