from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import numpy as np
import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.pipeline import Pipeline

PASSAGES = [Passage(str(i), f"T{i}", f"fact {i} is answer{i}") for i in range(40)]


class FakeRetriever:
    """Finds the passages after the number in the question; notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.passages = self

    def __len__(self) -> int:
        return len(PASSAGES)

    def passage(self, row: int) -> Passage:
        return PASSAGES[row]

    def retrieve(self, questions: Sequence[str], k: int, *, progress: bool = False):
        self.asked += questions
        numbers = [int(question.split()[-1]) for question in questions]
        return [tuple(RetrievedPassage(PASSAGES[(n + i) % 40], 10.0 - i, i + 1) for i in range(k)) for n in numbers]


class FakeReranker:
    """Scores a passage by the number in its title; notes the pairs."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        self.pairs += pairs
        return np.array([float(passage.split(":")[0][1:]) for _, passage in pairs], dtype=np.float32)


@pytest.fixture
def make(tokenizer):
    def make(**options) -> Pipeline:
        options = {"num_retrieved": 5, "num_passages": 3, "progress": False} | options
        return Pipeline(tokenizer, **options)

    return make


def ids(selection) -> list[str]:
    return [entry.passage.id for entry in selection.passages]


def ctxs(*numbers: int) -> tuple[RetrievedPassage, ...]:
    return tuple(RetrievedPassage(PASSAGES[n], 1.0, rank) for rank, n in enumerate(numbers, 1))


def test_retrieved_reranked_kept_and_gated(make):
    pipeline = make(retriever=FakeRetriever(), reranker=FakeReranker())
    (selection,) = pipeline.select(["t"], [Question("who is 7", ("answer9",))])
    assert ids(selection) == ["11", "10", "9"]
    assert [(entry.rank, entry.rerank_rank, entry.rerank_score) for entry in selection.passages] == [
        (5, 1, 11.0),
        (4, 2, 10.0),
        (3, 3, 9.0),
    ]
    assert [entry.has_answer for entry in selection.passages] == [False, False, True]
    assert len(selection.retrieved) == 5
    assert selection.strings[0] == "T11: fact 11 is answer11"


def test_gates_are_softmaxed_once(make):
    """Research code: once more for every sample, until they are uniform."""
    pipeline = make(retriever=FakeRetriever(), reranker=FakeReranker())
    scores = np.array([11.0, 10.0, 9.0])
    expected = np.exp(scores) / np.exp(scores).sum()
    for _ in range(3):
        (selection,) = pipeline.select(["t"], [Question("who is 7", ())])
        np.testing.assert_allclose(selection.gates, expected, rtol=1e-12)


def test_gates_without_a_reranker_or_when_uniform(make):
    for pipeline in (
        make(retriever=FakeRetriever()),
        make(retriever=FakeRetriever(), reranker=FakeReranker(), gates="uniform"),
    ):
        (selection,) = pipeline.select(["t"], [Question("who is 7", ())])
        assert selection.gates == (1 / 3, 1 / 3, 1 / 3)
    assert ids(make(retriever=FakeRetriever()).select(["t"], [Question("who is 7", ())])[0]) == ["7", "8", "9"]


def test_gates_of_the_retriever_in_the_rerankers_order(make):
    options = {"retriever": FakeRetriever(), "reranker": FakeReranker(), "gates": "retriever", "gate_temperature": 3.0}
    (selection,) = make(**options).select(["t"], [Question("who is 7", ())])
    assert [entry.score for entry in selection.passages] == [6.0, 7.0, 8.0]
    weights = np.exp(np.array([6.0, 7.0, 8.0]) / 3)
    np.testing.assert_allclose(selection.gates, weights / weights.sum(), rtol=1e-12)


def test_shuffled_passages_bring_their_retrievers_scores(make):
    options = {"retriever": FakeRetriever(), "gates": "retriever", "control": "shuffled"}
    selections = make(**options).select(["t"] * 2, [Question("who is 0", ()), Question("who is 20", ())])
    weights = np.exp([10.0, 9.0, 8.0])
    for selection in selections:
        np.testing.assert_allclose(selection.gates, weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("asked", [{"gates": "retriever"}, {"gate_temperature": 0.5}])
def test_gates_of_scores_that_are_not_there(make, asked):
    own = [RetrievedPassage(PASSAGES[n], 0.0, n + 1) for n in range(5)]
    questions = [Question("who", (), tuple(own)), Question("where", (), tuple(own[::-1]))]
    for control in ("retrieved", "shuffled"):
        with pytest.raises(InputError, match=r"passage '\d' of question 'wh\w+' has no .* score"):
            make(control=control, **asked).select(["t"] * 2, questions)
    for options in ({"control": "random"}, {"control": "constant"}, {"control": "none"}, {"num_passages": 1}):
        for selection in make(**options, **asked).select(["t"] * 2, questions):
            count = len(selection.passages)
            assert selection.gates == tuple(1 / count for _ in range(count))


def test_rerank_scores_that_passages_bring_along_count(make):
    own = tuple(
        RetrievedPassage(PASSAGES[n], 1.0, n + 1, rerank_score=score) for n, score in enumerate((0.5, 2.5, 1.5))
    )
    (selection,) = make(num_passages=2).select(["t"], [Question("q", (), own)])
    assert ids(selection) == ["1", "2"]
    assert selection.gates[0] == pytest.approx(1 / (1 + np.exp(-1.0)))


def test_own_passages_come_before_the_index(make):
    retriever = FakeRetriever()
    selections = make(retriever=retriever).select(
        ["t"] * 3, [Question("who is 1", (), ctxs(20, 21)), Question("who is 2", ()), Question("who is 2", ())]
    )
    assert retriever.asked == ["who is 2"], "asked once, and not for a question that brings passages"
    assert ids(selections[0]) == ["20", "21"]
    assert ids(selections[1]) == ids(selections[2]) == ["2", "3", "4"]


def test_fewer_passages_are_fewer_gates(make, caplog):
    """Research code: fewer passages than experts crash."""
    questions = [Question("a", (), ctxs(1)), Question("b", (), ctxs(1, 2, 3, 4)), Question("c", ())]
    with caplog.at_level(logging.WARNING):
        selections = make(reranker=FakeReranker()).select(["t"] * 3, questions)
    assert [len(selection.strings) for selection in selections] == [1, 3, 0]
    assert [sum(selection.gates) for selection in selections] == pytest.approx([1, 1, 0])
    assert [record.message for record in caplog.records] == [
        "1 of 3 questions have no passages and are answered without"
    ]


def test_num_retrieved_bounds_own_passages_before_reranking(make):
    (selection,) = make(reranker=FakeReranker(), num_retrieved=2).select(["t"], [Question("a", (), ctxs(1, 2, 3))])
    assert ids(selection) == ["2", "1"]


def test_each_pair_is_scored_once_with_the_cut_string(make, tokenizer):
    long = RetrievedPassage(Passage("x", "T3", "word " * 2000), 1.0, 1)
    reranker = FakeReranker()
    questions = [Question("a", (), (long, *ctxs(1))), Question("a", (), (long, *ctxs(1))), Question("b", (), (long,))]
    selections = make(reranker=reranker).select(["t"] * 3, questions)
    cut = selections[0].strings[0]
    assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= 256
    assert cut.startswith("T3: word word")
    assert sorted(reranker.pairs) == sorted([("a", cut), ("a", "T1: fact 1 is answer1"), ("b", cut)])


def test_results_do_not_depend_on_order(make):
    questions = [Question(f"who is {n}", (f"answer{n + 1}",)) for n in range(12)]
    for control in ("retrieved", "gold", "shuffled", "random", "constant"):

        def run(asked, control=control):
            pipeline = make(retriever=FakeRetriever(), reranker=FakeReranker(), control=control)
            return pipeline.select(["t"] * len(asked), asked)

        assert run(questions[::-1])[::-1] == run(questions)


def test_gold_keeps_answers_among_all_retrieved(make):
    pipeline = make(retriever=FakeRetriever(), control="gold", num_passages=1)
    selections = pipeline.select(["t"] * 2, [Question("who is 7", ("answer10",)), Question("who is 7", ("answer30",))])
    assert [ids(selection) for selection in selections] == [["10"], []]
    assert selections[0].gates == (1.0,)


def test_gold_needs_answers(make):
    with pytest.raises(InputError, match="gold"):
        make(retriever=FakeRetriever(), control="gold").select(["t"], [Question("who is 7", ())])


def test_a_flag_in_the_data_is_believed(make):
    own = (RetrievedPassage(PASSAGES[0], 1.0, 1, has_answer=True), RetrievedPassage(PASSAGES[1], 1.0, 2))
    (selection,) = make(control="gold").select(["t"], [Question("q", ("answer5",), own)])
    assert ids(selection) == ["0"]


def test_shuffled_stays_within_the_task_and_brings_its_gates(make):
    questions = [Question(f"who is {n}", (f"answer{n}",)) for n in (0, 10, 20, 30)]
    pipeline = make(retriever=FakeRetriever(), reranker=FakeReranker(), control="shuffled")
    selections = pipeline.select(["a", "b", "a", "b"], questions)
    assert [ids(selection)[0] for selection in selections] == ["24", "34", "4", "14"]
    assert selections[0].gates == pytest.approx([0.66524, 0.24473, 0.09003], abs=1e-5)
    assert all(entry.has_answer is False for selection in selections for entry in selection.passages)
    assert selections[0].retrieved[0].passage.id == "4", "what was retrieved stays on record"


def test_random_and_constant_need_neither_retrieval_nor_reranker(make):
    questions = [Question(f"who is {n}", (f"answer{n}",)) for n in range(6)]
    retriever, reranker = FakeRetriever(), FakeReranker()
    for control, count in (("random", 3), ("constant", 1)):
        selections = make(retriever=retriever, reranker=reranker, control=control).select(["t"] * 6, questions)
        assert all(len(selection.passages) == count for selection in selections)
        assert all(selection.gates == (1 / count,) * count for selection in selections)
        assert len({tuple(ids(selection)) for selection in selections}) == (6 if control == "random" else 1)
    assert not retriever.asked and not reranker.pairs


def test_random_draws_from_the_run_without_an_index(make):
    questions = [Question(f"q{n}", (f"answer{n}",), ctxs(n, n + 1)) for n in range(10)]
    for question, selection in zip(questions, make(control="random").select(["t"] * 10, questions), strict=True):
        assert len(selection.passages) == 3
        assert all(int(number) <= 10 for number in ids(selection))
        assert all(question.answers[0] not in entry.passage.text.split() for entry in selection.passages)


@pytest.mark.parametrize("control", ["retrieved", "gold", "shuffled", "random", "constant"])
@pytest.mark.parametrize("index", [True, False])
def test_processes_that_share_the_questions_select_like_one(make, control, index):
    questions = [
        Question(f"who is {n}", (f"answer{n}",), () if index else ctxs(n, n + 1, n + 2)) for n in range(0, 35, 5)
    ]
    tasks = ["a", "b", "a", "a", "b", "b", "a"]
    boxes = [Queue(), Queue()]

    def select(rank: int):
        def from_others(own):
            boxes[1 - rank].put(own)
            return boxes[rank].get(timeout=10)

        options = {"control": control, "retriever": FakeRetriever() if index else None, "from_others": from_others}
        return make(**options).select(tasks[rank::2], questions[rank::2])

    alone = make(control=control, retriever=FakeRetriever() if index else None).select(tasks, questions)
    with ThreadPoolExecutor(2) as processes:
        first, second = processes.map(select, range(2))
    assert first == alone[0::2]
    assert second == alone[1::2]


def test_none_asks_nobody(make):
    retriever = FakeRetriever()
    (selection,) = make(retriever=retriever, control="none").select(["t"], [Question("who is 7", (), ctxs(1))])
    assert (selection.passages, selection.strings, selection.gates) == ((), (), ())
    assert not retriever.asked


def test_no_passages_and_no_index(make):
    with pytest.raises(InputError, match=r"index=DIRECTORY") as error:
        make().select(["nq"], [Question("who", ())])
    assert "\n" not in str(error.value)


def test_an_empty_passage(make):
    empty = RetrievedPassage(Passage("p9", "Title", " "), 1.0, 1)
    with pytest.raises(InputError, match="'p9' has no text"):
        make().select(["t"], [Question("who", (), (empty,))])


def test_seconds_are_kept(make):
    pipeline = make(retriever=FakeRetriever(), reranker=FakeReranker())
    pipeline.select(["t"], [Question("who is 7", ())])
    assert set(pipeline.seconds) == {"retrieve", "rerank"}
    assert all(value > 0 for value in pipeline.seconds.values())
