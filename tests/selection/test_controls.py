from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection import controls


def passage(name: str, text: str | None = None, **fields) -> RetrievedPassage:
    return RetrievedPassage(Passage(name, "", text or f"text of {name}"), 1.0, 1, **fields)


def questions(count: int) -> list[Question]:
    return [Question(f"who is {i}", (f"answer{i}",), (passage(f"p{i}", f"says answer{i} here"),)) for i in range(count)]


@given(st.integers(2, 30), st.integers(0, 5), st.randoms())
def test_shuffled_is_a_derangement_in_any_order(count, seed, order):
    asked = questions(count)
    given_to = controls.shuffled(asked, seed)
    assert sorted(given_to, key=repr) == sorted((q.passages for q in asked), key=repr), "every set is used once"
    assert all(passages != question.passages for question, passages in zip(asked, given_to, strict=True))
    mixed = list(range(count))
    order.shuffle(mixed)
    assert controls.shuffled([asked[i] for i in mixed], seed) == [given_to[i] for i in mixed]


def test_shuffled_depends_on_the_seed():
    asked = questions(30)
    assert controls.shuffled(asked, 0) != controls.shuffled(asked, 1)


def test_shuffled_never_gives_an_answer_while_there_are_others():
    asked = questions(6)
    leaky = (passage("leak", " ".join(f"answer{i}" for i in range(5))),)
    asked[5] = Question("who is 5", ("answer5",), leaky)
    for seed in range(10):
        for question, passages in zip(asked[:5], controls.shuffled(asked, seed)[:5], strict=True):
            assert passages != leaky and passages != question.passages


def test_shuffled_knows_copies_of_a_question():
    """Neither a second copy nor another question with the same passage lends what is one's own."""
    one, two, three = questions(3)
    asked = [one, Question("Who is 0?", ("other",), one.passages), Question("again", (), one.passages), two, three]
    for seed in range(10):
        given_to = controls.shuffled(asked, seed)
        assert given_to[0] == given_to[1]
        assert all(one.passages != passages for passages in given_to[:3])


def test_shuffled_leaves_questions_without_passages_alone():
    asked = [*questions(3), Question("bare", ("x",))]
    given_to = controls.shuffled(asked, 0)
    assert given_to[3] == ()
    assert all(given_to[:3])


def test_shuffled_needs_another_question():
    asked = questions(1)
    with pytest.raises(InputError, match="two different questions"):
        controls.shuffled(asked * 2, 0)


def test_gold_keeps_only_passages_with_an_answer_in_order():
    a, b, c = passage("a", has_answer=True), passage("b", has_answer=False), passage("c", has_answer=True)
    assert controls.gold([c, b, a]) == (c, a)
    assert controls.gold([b, passage("d")]) == ()


@given(st.integers(1, 4), st.integers(0, 3))
def test_drawn_passages_differ_and_lack_the_answer(count, seed):
    pool = [Passage(str(i), "", "right" if i % 3 == 0 else f"wrong {i}") for i in range(60)]
    question = Question("who", ("right",))
    found = controls.random_passages(question, pool, count, seed)
    assert [entry.rank for entry in found] == list(range(1, count + 1))
    assert len({entry.passage.id for entry in found}) == count
    assert all(entry.passage.text != "right" for entry in found)
    assert controls.random_passages(question, pool, count, seed) == found, "whatever was drawn before"


def test_drawn_passages_depend_on_question_and_seed():
    pool = [Passage(str(i), "", f"text {i}") for i in range(1000)]
    draws = {controls.random_passages(Question(name, ()), pool, 4, seed) for name in ("who", "what") for seed in (0, 1)}
    assert len(draws) == 4


def test_a_pool_of_answers_only_gives_nothing():
    pool = [Passage(str(i), "", "right") for i in range(5)]
    assert controls.random_passages(Question("who", ("right",)), pool, 2, 0) == ()


def test_one_constant_passage():
    pool = [Passage(str(i), "", f"text {i}") for i in range(100)]
    (entry,) = controls.constant(pool, 3)
    assert entry.passage in pool
    random.random()
    assert controls.constant(pool, 3) == (entry,)
    assert len({controls.constant(pool, seed) for seed in range(10)}) > 1
