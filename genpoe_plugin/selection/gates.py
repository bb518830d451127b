"""Gates: the weights of a question's passages, computed from their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError

GATES = ("softmax", "retriever", "uniform")


def softmax(scores: Sequence[float], temperature: float = 1.0) -> tuple[float, ...]:
    """The softmax of ``scores / temperature``.

    Args:
        scores: K finite scores; higher is better.
        temperature: above 0. A high temperature makes the gates equal; a low one selects the best passage.

    Returns:
        K gates, which add up to 1.
    """
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return tuple(weight / sum(weights) for weight in weights)


def uniform(count: int) -> tuple[float, ...]:
    """Equal gates that add up to 1."""
    return (1 / count,) * count if count else ()


def passage_gates(
    question: str, passages: Sequence[RetrievedPassage], kind: str = "softmax", temperature: float = 1.0
) -> tuple[float, ...]:
    """The gates of the passages selected for a question.

    Args:
        question: the question, for error messages.
        passages: K passages.
        kind: one of `GATES`: ``softmax`` of the rerank scores, ``retriever`` (softmax of the retriever's scores), or
            ``uniform``. If a passage has no rerank score, ``softmax`` gives equal gates.
        temperature: temperature of the softmax.

    Returns:
        K gates, which add up to 1.

    Raises:
        InputError: a passage lacks the score that ``retriever``, or a temperature other than 1, needs.
    """
    if kind == "uniform" or len(passages) < 2:
        return uniform(len(passages))
    # Files and docs give passages without a retriever a score of 0.
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
