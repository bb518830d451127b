"""Examples out of questions, and the passages and gates of one use of them."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.training.examples import TrainingExample, draw_passages, training_examples

OTHERS = [TrainingExample("q", f"answer{number}", f"passage {number}") for number in range(9)]


def retrieved(text, **facts):
    return RetrievedPassage(Passage("1", "Title", text), 1.0, 1, **facts)


def test_examples_take_the_best_passage_with_an_answer_and_the_form_it_uses():
    question = Question("Who?", ("a physician", "doctor"), (retrieved("No one."), retrieved("He was a doctor.")))
    (example,) = training_examples([question])
    assert (example.question, example.answer, example.passage) == ("Who?", "doctor", "Title: He was a doctor.")
    assert example.negatives == ("Title: No one.",) and example.scores is None
    marked = Question("Who?", ("doctor",), (retrieved("Another doctor.", has_answer=False),))
    assert training_examples([marked, Question("Who?", ("doctor",))]) == []


def test_without_titles_passages_are_their_texts():
    question = Question("Who?", ("doctor",), (retrieved("No one."), retrieved("He was a doctor.")))
    (example,) = training_examples([question], titles=False)
    assert (example.passage, example.negatives) == ("He was a doctor.", ("No one.",))


def test_negatives_hold_no_answer_and_scores_are_theirs():
    passages = (
        retrieved("First, no.", rerank_score=3.0),
        retrieved("A doctor.", rerank_score=2.0),
        retrieved("Another doctor.", rerank_score=1.0),
        retrieved("Marked wrong.", rerank_score=0.5, has_answer=True),
        retrieved("Last, no.", rerank_score=0.0),
    )
    (example,) = training_examples([Question("Who?", ("doctor",), passages)])
    assert example.passage == "Title: A doctor."
    assert example.negatives == ("Title: First, no.", "Title: Last, no.")
    assert example.scores == (2.0, 3.0, 0.0)


def test_a_draw_has_its_passage_and_any_number_of_negatives_best_first():
    example = TrainingExample("q", "a", "own", ("n1", "n2", "n3"), (1.0, 4.0, 0.0, -1.0))
    by_score = {"n1": 4.0, "own": 1.0, "n2": 0.0, "n3": -1.0}
    counts = Counter()
    for seed in range(300):
        drawn = draw_passages([example, *OTHERS], 0, 3, random.Random(seed))
        assert drawn == draw_passages([example, *OTHERS], 0, 3, random.Random(seed))
        assert "own" in drawn.passages and {*drawn.passages} <= {*by_score}
        assert len({*drawn.passages}) == len(drawn.passages)
        assert sorted(drawn.passages, key=lambda name: -by_score[name]) == list(drawn.passages)
        total = sum(math.exp(by_score[name]) for name in drawn.passages)
        assert drawn.gates == pytest.approx([math.exp(by_score[name]) / total for name in drawn.passages])
        counts[len(drawn.passages)] += 1
        counts.update(drawn.passages)
    assert all(counts[number] > 70 for number in (1, 2, 3))
    assert all(counts[name] > 50 for name in ("n1", "n2", "n3"))


def test_without_enough_negatives_other_examples_lend_their_passages():
    example = TrainingExample("q", "answer3", "own", ("n1",), (1.0, 4.0))
    seen = set()
    for seed in range(200):
        drawn = draw_passages([example, *OTHERS], 0, 4, random.Random(seed))
        assert len({*drawn.passages}) == len(drawn.passages) <= 4
        if len(drawn.passages) > 2:  # what is lent has no score
            assert drawn.gates == pytest.approx([1 / len(drawn.passages)] * len(drawn.passages)), (
                "lent ones lack scores"
            )
        seen.update(drawn.passages)
    assert seen == {"own", "n1", *(other.passage for other in OTHERS)}


def test_what_holds_the_answer_is_no_distractor():
    examples = [TrainingExample("q", "Rome", "own"), TrainingExample("p", "x", "All roads lead to Rome.")]
    for seed in range(20):
        assert draw_passages(examples, 0, 2, random.Random(seed)).passages == ("own",)


def test_the_place_of_the_own_passage_says_nothing_where_gates_are_equal():
    places = Counter(
        draw_passages(OTHERS, 0, 2, random.Random(seed)).passages.index("passage 0") for seed in range(400)
    )
    # Half of the draws have one passage; of the others half begin with it.
    assert 60 < places[1] < 140
