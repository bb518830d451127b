"""Measures of rankings: recall, mean reciprocal rank and nDCG of relevant passages, and recall of exact neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2

import numpy as np

RECALL_AT = (1, 5, 20, 100)
NDCG_AT = 10


@dataclass(frozen=True, slots=True)
class Judged:
    """A ranking of one question, with the grades of its passages; a grade above 0 says that a passage is relevant.

    Attributes:
        grades: grades of the ranked passages, best passage first.
        relevant: grades of all relevant passages.
        needed: how many relevant passages are a recall of 1.
    """

    grades: tuple[int, ...]
    relevant: tuple[int, ...]
    needed: int

    @classmethod
    def by_answers(cls, has_answer: Iterable[bool | None]) -> Judged:
        """Passages with an answer are relevant, and one is enough. Others than the ranked ones are unknown.

        Args:
            has_answer: whether each passage has an answer, best passage first.
        """
        grades = tuple(int(bool(flag)) for flag in has_answer)
        return cls(grades, tuple(grade for grade in grades if grade), 1)

    @classmethod
    def by_qrels(cls, identifiers: Iterable[str], qrels: Mapping[str, int]) -> Judged:
        """Grades of qrels: all relevant passages are needed, and passages without a grade are not relevant.

        Args:
            identifiers: ids of the ranked passages, best first.
            qrels: the question's grades by passage id.
        """
        relevant = tuple(grade for grade in qrels.values() if grade > 0)
        return cls(tuple(max(0, qrels.get(identifier, 0)) for identifier in identifiers), relevant, len(relevant))


def recall_at(k: int, rankings: Sequence[Judged]) -> float:
    """The mean share of the needed relevant passages among the first ``k``.

    Where one passage with an answer is enough, it is the share of questions with such a passage (DPR's top-k accuracy).
    """
    return float(np.mean([_recall(k, ranking) for ranking in rankings]))


def _recall(k: int, ranking: Judged) -> float:
    found = sum(grade > 0 for grade in ranking.grades[:k])
    return min(found, ranking.needed) / ranking.needed if ranking.needed else 0.0


def mean_reciprocal_rank(rankings: Sequence[Judged]) -> float:
    """The mean of 1 / rank of the first relevant passage; 0 for a question without one."""
    ranks = (next((rank for rank, grade in enumerate(r.grades, 1) if grade), None) for r in rankings)
    return float(np.mean([1 / rank if rank else 0.0 for rank in ranks]))


def ndcg_at(k: int, rankings: Sequence[Judged]) -> float:
    """The mean discounted gain of the first ``k`` passages, over that of the best order; gain and discount are
    trec_eval's: the grade over log2(rank + 1). 0 for a question without relevant passages."""
    gains = [(_dcg(r.grades[:k]), _dcg(sorted(r.relevant, reverse=True)[:k])) for r in rankings]
    return float(np.mean([gain / best if best else 0.0 for gain, best in gains]))


def _dcg(grades: Sequence[int]) -> float:
    return sum(grade / log2(rank + 1) for rank, grade in enumerate(grades, 1))


def quality_table(rankings: Mapping[str, Sequence[Judged]], retrieved: int) -> str:
    """A table with one line per ranking: recall at each k of ``RECALL_AT`` up to ``retrieved``, MRR and nDCG@10.

    Args:
        rankings: rankings of the same questions (at least one), by name.
        retrieved: number of passages per question.
    """
    ks = [k for k in RECALL_AT if k <= retrieved]
    count = len(next(iter(rankings.values())))
    titles = [f"{count:,} question{'s' * (count != 1)}", *(f"recall@{k}" for k in ks), "MRR", f"nDCG@{NDCG_AT}"]
    lines = [titles]
    for name, judged in rankings.items():
        values = [*(recall_at(k, judged) for k in ks), mean_reciprocal_rank(judged), ndcg_at(NDCG_AT, judged)]
        lines.append([name, *(f"{value:.4f}" for value in values)])
    first = max(len(line[0]) for line in lines)
    return "\n".join("  ".join([line[0].ljust(first), *(cell.rjust(10) for cell in line[1:])]) for line in lines)


def neighbour_recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact neighbours (int64 ``[n, k]``) that are among those found (``[n, any number]``)."""
    hits = sum(np.isin(expected, rows).sum() for rows, expected in zip(found, exact, strict=True))
    return float(hits / exact.size)
