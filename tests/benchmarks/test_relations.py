"""The world of relations: only word order decides an answer, and no name of the test side is in training."""

from __future__ import annotations

import re

from benchmarks.relations import related_questions, surnames


def test_only_the_first_passage_states_the_answer_and_only_by_word_order():
    questions = related_questions("test", 12, 0)
    assert len(questions) == 4 * 12 and len({question.question for question in questions}) == len(questions)
    for question in questions:
        first, *others = (item.passage for item in question.passages)
        (answer,) = question.answers
        asked = first.title.split()[-1]
        verb = "employ" if "employ" in question.question else "teach"
        passive = question.question.startswith("Whom")
        sentence = rf"{asked} {verb}(?:s|es) {answer}\." if passive else rf"{answer} {verb}(?:s|es) {asked}\."
        assert re.search(sentence, first.text)
        # The same words in another order would answer the opposite question.
        assert sorted(first.text.split()).count(f"{asked}.") == 1 and first.text.split().count(asked) == 1
        assert len(others) == 3 and all(answer not in other.text for other in others)
        assert others[0].title == first.title and others[0].text != first.text


def test_no_surname_is_on_both_sides():
    train, test = set(surnames("train")), set(surnames("test"))
    assert train and test and not train & test
    words = {
        word.strip(".") for q in related_questions("test", 12, 0) for i in q.passages for word in i.passage.text.split()
    }
    assert words - {"employs", "teaches"} <= test


def test_a_world_depends_on_its_seed():
    assert related_questions("train", 5, 1) == related_questions("train", 5, 1) != related_questions("train", 5, 2)
