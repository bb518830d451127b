"""Gates against a softmax in float64 of another library, and at their limits."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.special import softmax as reference

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.gates import GATES, passage_gates, softmax

SCORES = [[3.25, -1.5, 0.75, 0.5], [88.2, 87.9], [-4.0], [0.125] * 3, [700.0, -700.0, 699.0]]


def ranked(scores: list[float], reranked: list[float] | None = None) -> list[RetrievedPassage]:
    """Passages with retriever's scores and, if there are some, other rerank scores."""
    return [
        RetrievedPassage(Passage(f"p{n}", "", "text"), score, n + 1, reranked[n] if reranked else None)
        for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 2.0, 40.0])
@pytest.mark.parametrize("scores", SCORES)
def test_gates_are_the_softmax_of_scores_over_the_temperature(scores, temperature):
    expected = reference(np.array(scores, np.float64) / temperature)
    np.testing.assert_allclose(softmax(scores, temperature), expected, rtol=1e-12, atol=1e-300)
    others = random.Random(0).choices(range(-9, 9), k=len(scores))
    np.testing.assert_allclose(
        passage_gates("q", ranked(scores, others), "retriever", temperature), expected, rtol=1e-12, atol=1e-300
    )
    np.testing.assert_allclose(
        passage_gates("q", ranked(others, scores), "softmax", temperature), expected, rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("scores", SCORES)
def test_without_a_temperature_gates_are_what_they_were(scores):
    """Bit for bit: answers of earlier versions stay what they are."""
    weights = [math.exp(score - max(scores)) for score in scores]
    was = tuple(weight / sum(weights) for weight in weights)
    assert passage_gates("q", ranked([1.0] * len(scores), scores)) == softmax(scores) == was


@pytest.mark.parametrize("scores", SCORES)
def test_a_large_temperature_makes_gates_equal_and_a_small_one_leaves_the_best_alone(scores):
    for temperature in (1e12, 1.7e308):
        np.testing.assert_allclose(softmax(scores, temperature), [1 / len(scores)] * len(scores), rtol=1e-6)
    best = np.array(scores) == max(scores)
    for temperature in (1e-4, 5e-324):
        np.testing.assert_array_equal(softmax(scores, temperature), best / best.sum())


def test_uniform_gates_look_at_no_score():
    assert passage_gates("q", ranked([0.0, 5.0, 0.0], [1.0, 2.0, 3.0]), "uniform") == (1 / 3,) * 3


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_passage_counts_in_full_and_none_has_no_gate(kind, temperature):
    assert passage_gates("q", ranked([0.0]), kind, temperature) == (1.0,)
    assert passage_gates("q", [], kind, temperature) == ()


def test_without_rerank_scores_a_softmax_is_uniform_unless_a_temperature_was_asked_for():
    assert passage_gates("q", ranked([3.0, 2.0, 1.0])) == (1 / 3,) * 3
    with pytest.raises(InputError) as error:
        passage_gates("who", ranked([3.0, 2.0]), "softmax", 0.5)
    assert str(error.value) == (
        "gate_temperature=0.5: passage 'p0' of question 'who' has no rerank score to divide by it; give reranker=, or "
        "gates=retriever, or leave gate_temperature out"
    )


def test_a_passage_that_no_retriever_found_is_named():
    with pytest.raises(InputError) as error:
        passage_gates("who", ranked([3.0, 0.0, 1.0], [1.0, 2.0, 3.0]), "retriever")
    assert str(error.value) == (
        "gates=retriever: passage 'p1' of question 'who' has no retriever's score (0 stands for none); give passages "
        "with a `score`, or gates=softmax or gates=uniform"
    )
