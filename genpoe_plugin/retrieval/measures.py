"""Measures of rankings: recall and mean reciprocal rank of passages with an answer, and recall of exact neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

RECALL_AT = (1, 5, 20, 100)

AnswerRank = int | None


def answer_rank(has_answer: Iterable[bool | None]) -> AnswerRank:
    """The rank, from 1, of the first passage with an answer; None if no passage has one.

    Args:
        has_answer: whether each passage of a question has an answer, best passage first.
    """
    return next((rank for rank, is_relevant in enumerate(has_answer, 1) if is_relevant), None)


def recall_at(k: int, ranks: Sequence[AnswerRank]) -> float:
    """The share of questions with an answer in their first ``k`` passages, from the questions' answer ranks."""
    return sum(rank is not None and rank <= k for rank in ranks) / len(ranks)


def mean_reciprocal_rank(ranks: Sequence[AnswerRank]) -> float:
    """The mean of 1 / rank over questions; 0 for a question without an answer in its passages."""
    return sum(1 / rank for rank in ranks if rank) / len(ranks)


def quality_table(rankings: Mapping[str, Sequence[AnswerRank]], retrieved: int) -> str:
    """A table with one line per ranking: recall at each k of ``RECALL_AT`` up to ``retrieved``, and MRR.

    Args:
        rankings: answer ranks of the same questions (at least one), by name of the ranking.
        retrieved: number of passages per question.
    """
    ks = [k for k in RECALL_AT if k <= retrieved]
    count = len(next(iter(rankings.values())))
    titles = [f"{count:,} question{'s' * (count != 1)}", *(f"recall@{k}" for k in ks), "MRR"]
    lines = [titles]
    for name, ranks in rankings.items():
        values = [*(recall_at(k, ranks) for k in ks), mean_reciprocal_rank(ranks)]
        lines.append([name, *(f"{value:.4f}" for value in values)])
    first = max(len(line[0]) for line in lines)
    return "\n".join("  ".join([line[0].ljust(first), *(cell.rjust(10) for cell in line[1:])]) for line in lines)


def neighbour_recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact neighbours (int64 ``[n, k]``) that are among those found (``[n, any number]``)."""
    hits = sum(np.isin(expected, rows).sum() for rows, expected in zip(found, exact, strict=True))
    return float(hits / exact.size)
