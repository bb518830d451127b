from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpoe_plugin.retrieval.measures import (
    Judged,
    mean_reciprocal_rank,
    ndcg_at,
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
    judged = [Judged.by_answers(flags) for flags in rankings]
    assert recall_at(k, judged) == pytest.approx(hits / len(rankings))
    assert mean_reciprocal_rank(judged) == pytest.approx(reciprocal / len(rankings))


def test_ndcg_by_hand() -> None:
    # Gains 1 at ranks 2 and 4, 2 at rank 3; best order 2, 1, 1 with discounts 1, log2(3), 2.
    ranking = Judged.by_qrels("xbacy", {"a": 2, "b": 1, "c": 1, "x": 0, "z": -1})
    gain = 1 / math.log2(3) + 2 / 2 + 1 / math.log2(5)
    best = 2 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at(10, [ranking]) == pytest.approx(gain / best)
    assert ndcg_at(2, [ranking]) == pytest.approx((1 / math.log2(3)) / (2 + 1 / math.log2(3)))
    # Nothing relevant, and a relevant passage that was not found: 0 each.
    rankings = [ranking, Judged.by_qrels("xy", {"x": 0}), Judged.by_qrels("xy", {"a": 1})]
    assert ndcg_at(10, rankings) == pytest.approx(gain / best / 3)
    assert ndcg_at(10, [Judged.by_answers([False, None, True])]) == pytest.approx(0.5)


def test_recall_of_qrels_is_of_all_relevant_passages() -> None:
    ranking = Judged.by_qrels("xbacy", {"a": 2, "b": 1, "c": 1, "d": 1})
    assert [recall_at(k, [ranking]) for k in (1, 2, 3, 4, 5)] == [0, 0.25, 0.5, 0.75, 0.75]
    assert recall_at(5, [ranking, Judged.by_qrels("xy", {"x": 0})]) == 0.375


def judged(rank: int | None) -> Judged:
    return Judged.by_answers([False] * (rank - 1) + [True] if rank else [False])


def test_the_table_ends_where_the_retrieval_did() -> None:
    ranks = [judged(rank) for rank in (1, 3, None, 50)]
    again = [judged(rank) for rank in (1, 1, None, 2)]
    lines = quality_table({"retrieved": ranks, "reranked": again}, retrieved=50).splitlines()
    assert [line.split() for line in lines] == [
        ["4", "questions", "recall@1", "recall@5", "recall@20", "MRR", "nDCG@10"],
        ["retrieved", "0.2500", "0.5000", "0.5000", "0.3383", "0.3750"],
        ["reranked", "0.5000", "0.7500", "0.7500", "0.6250", "0.6577"],
    ]
    assert quality_table({"retrieved": [judged(2)]}, retrieved=1).split() == [
        *("1", "question", "recall@1", "MRR", "nDCG@10", "retrieved", "0.0000", "0.5000", "0.6309")
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
