"""Gates: how much each of a question's passages counts, from their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError

GATES = ("softmax", "retriever", "uniform")


def softmax(scores: Sequence[float], temperature: float = 1.0) -> tuple[float, ...]:
    """Gates that add up to 1, the softmax of ``scores / temperature``.

    Args:
        scores: K finite ones; the higher, the better.
        temperature: above 0. A large one makes the gates equal, a small one leaves the best passage alone.

    Returns:
        K gates.
    """
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return tuple(weight / sum(weights) for weight in weights)


def uniform(count: int) -> tuple[float, ...]:
    """As many equal gates, which add up to 1."""
    return (1 / count,) * count if count else ()


def passage_gates(
    question: str, passages: Sequence[RetrievedPassage], kind: str = "softmax", temperature: float = 1.0
) -> tuple[float, ...]:
    """The gates of the passages that a question is answered with.

    Args:
        question: for error messages.
        passages: K of them.
        kind: of `GATES`: ``softmax`` of the rerank scores, ``retriever`` for that of the retriever's scores, or
            ``uniform``. Where a passage has no rerank score, ``softmax`` is uniform as well.
        temperature: of a softmax.

    Returns:
        K gates, which add up to 1.

    Raises:
        InputError: a passage has no score, and the retriever's scores or a temperature were asked for.
    """
    if kind == "uniform" or len(passages) < 2:
        return uniform(len(passages))
    # A passage that no retriever has found has a score of 0 in all files and docs.
    found = [entry.score or None if kind == "retriever" else entry.rerank_score for entry in passages]
    scores = [score for score in found if score is not None]
    if len(scores) == len(passages):
        return softmax(scores, temperature)
    where = f"passage {passages[found.index(None)].passage.id!r} of question {question!r}"
    if kind == "retriever":
        raise InputError(
            f"gates=retriever: {where} has no retriever's score (0 stands for none); "
            "give passages with a `score`, or gates=softmax or gates=uniform"
        )
    if temperature != 1:
        raise InputError(
            f"gate_temperature={temperature:g}: {where} has no rerank score to divide by it; "
            "give reranker=, or gates=retriever, or leave gate_temperature out"
        )
    return uniform(len(passages))
