from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpoe_plugin.retrieval.measures import (
    answer_rank,
    mean_reciprocal_rank,
    neighbour_recall,
    quality_table,
    recall_at,
)

RANKINGS = st.lists(st.lists(st.none() | st.booleans(), max_size=12), min_size=1, max_size=8)


@given(RANKINGS, st.integers(1, 13))
def test_recall_and_mrr_equal_a_naive_loop(rankings: list[list[bool | None]], k: int) -> None:
    hits, reciprocal = 0, 0.0
    for flags in rankings:
        if True in flags[:k]:
            hits += 1
        for place in range(len(flags)):
            if flags[place] is True:
                reciprocal += 1 / (place + 1)
                break
    ranks = [answer_rank(flags) for flags in rankings]
    assert recall_at(k, ranks) == pytest.approx(hits / len(rankings))
    assert mean_reciprocal_rank(ranks) == pytest.approx(reciprocal / len(rankings))


def test_the_table_ends_where_the_retrieval_did() -> None:
    ranks = [1, 3, None, 50]
    lines = quality_table({"retrieved": ranks, "reranked": [1, 1, None, 2]}, retrieved=50).splitlines()
    assert [line.split() for line in lines] == [
        ["4", "questions", "recall@1", "recall@5", "recall@20", "MRR"],
        ["retrieved", "0.2500", "0.5000", "0.5000", "0.3383"],
        ["reranked", "0.5000", "0.7500", "0.7500", "0.6250"],
    ]
    assert quality_table({"retrieved": [2]}, retrieved=1).split() == [
        *("1", "question", "recall@1", "MRR", "retrieved", "0.0000", "0.5000")
    ]
    assert "recall@100" in quality_table({"retrieved": ranks}, retrieved=100)


def test_neighbour_recall_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    exact = np.array([rng.choice(60, 20, replace=False) for _ in range(9)])
    found = np.array([rng.choice(60, 25, replace=False) for _ in range(9)])
    found[0, 20:] = -1
    hits = 0
    for row in range(9):
        for neighbour in exact[row]:
            hits += neighbour in found[row].tolist()
    assert neighbour_recall(found, exact) == hits / 180
    assert neighbour_recall(exact, exact) == 1
