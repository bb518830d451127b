"""Conflict sets: nothing of the original answers is left, and everything else is as it was."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.data.answers import answer_spans
from genpoe_plugin.data.conflicts import answer_type, conflicts_of, write_conflicts
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions
from genpoe_plugin.errors import InputError
from tests.data.test_answers import dpr_tokens

REAL = Path(__file__).parents[3] / "shared/data/real/nq_qed.train.jsonl.gz"


def question(text: str, answers: list[str], *passages: tuple[str, str]) -> Question:
    ranked = (
        RetrievedPassage(Passage(f"{text}-{number}", *passage), 2.5, number + 1)
        for number, passage in enumerate(passages)
    )
    return Question(text, tuple(answers), tuple(ranked))


def occurs(answer: str, text: str) -> bool:
    wanted, tokens = dpr_tokens(answer), dpr_tokens(text)
    return bool(wanted) and any(tokens[at : at + len(wanted)] == wanted for at in range(len(tokens)))


ROSSINI = question(
    "where was rossini born",
    ["Pesaro", "Pesaro, Italy"],
    ("Pesaro", "Rossini was born in PESARO, Italy. Pesaro's opera honours him; nothing is named Pesaroli."),
    ("Tea", "Tea is a drink."),
)
VERDI = question("where was verdi born", ["Roncole"], ("Verdi", "Verdi was born in Roncole, near Busseto; (Roncole)."))
BACH = question("when was bach born", ["1685"], ("Bach", "Bach was born in 1685 in Eisenach."))


def test_every_occurrence_is_replaced_and_the_rest_stays() -> None:
    (rossini, verdi), counts = conflicts_of([ROSSINI, VERDI, BACH], 0)
    assert rossini.question == ROSSINI.question
    assert rossini.answers == ("Roncole",)
    assert rossini.original_answers == ("Pesaro", "Pesaro, Italy")
    first, second = rossini.passages
    assert first.passage.title == "Roncole"
    assert first.passage.text == "Rossini was born in Roncole. Roncole's opera honours him; nothing is named Pesaroli."
    assert (first.has_answer, first.score, first.rank) == (True, 2.5, 1)
    assert first.passage.id != ROSSINI.passages[0].passage.id
    assert second.passage == ROSSINI.passages[1].passage
    assert second.has_answer is False
    # As the passage writes it.
    assert verdi.answers == ("PESARO",)
    assert verdi.passages[0].passage.text == "Verdi was born in PESARO, near Busseto; (PESARO)."
    # No other answer is a year.
    assert (counts.questions, counts.written, counts.without_answer, counts.without_replacement) == (3, 2, 0, 1)


def test_questions_that_cannot_be_changed_are_counted() -> None:
    nowhere = question("q", ["Como"], ("t", "Nothing is said."))
    article = question("q", ["Milan", "The"], ("t", "The Milan."))
    none, counts = conflicts_of([nowhere, article, question("q", ["Asti"])], 0)
    assert none == []
    assert (counts.questions, counts.without_answer, counts.without_replacement) == (3, 3, 0)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (question("q", ["Pesaro Urbino"], ("", "Pesaro Urbino")), "contains the answer"),
        (question("q", ["Italy"], ("", "Italy")), "is a part of an accepted answer, and in the passage"),
        (question("q", ["Rossini"], ("", "Rossini")), "is in the question"),
        (question("q", ["Tea"], ("", "Tea")), "is in a passage"),
        (question("q", ["1868"], ("", "1868")), "has another type"),
        (question("q", ["Rome"], *(("", f"{number} Rome") for number in range(9))), "is far more popular"),
    ],
)
def test_what_is_no_replacement(other: Question, why: str) -> None:
    conflicts, _ = conflicts_of([ROSSINI, other], 0)
    assert ROSSINI.question not in [conflict.question for conflict in conflicts], why


def test_popularity_is_counted_in_distinct_passages() -> None:
    """Rome occurs nine times in one passage of many questions, and so do not Asti and Como, twice each."""
    shared = ("", "Rome " * 9)
    questions = [question(f"rome {number}", ["Rome"], shared) for number in range(5)]
    asti, como = question("asti", ["Asti"], ("", "Asti, Asti")), question("como", ["Como"], ("", "Como, COMO"))
    conflicts, _ = conflicts_of([*questions, asti, como], 0)
    assert [(conflict.question, conflict.answers) for conflict in conflicts] == [
        ("asti", ("Como",)),
        ("como", ("Asti",)),
    ]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("1999", "year"),
        ("2045", "year"),
        ("999", "number"),
        ("2100", "number"),
        ("May 5, 1821", "date"),
        ("5 may", "date"),
        ("June", "name"),
        ("$1,000.50", "number"),
        ("twenty-five million", "number"),
        ("53 %", "other"),
        ("53%", "number"),
        ("Twelve", "number"),
        ("Jane Austen", "name"),
        ("the Duke of Wellington", "name"),
        ("J.R.R. Tolkien", "name"),
        ("Apollo 11", "name"),
        ("76ers", "other"),
        ("St. Louis Cardinals fan", "other"),
        ("gold", "other"),
        ("the", "other"),
        ("9 km", "other"),
        ("1" * 5000 + "x", "other"),
    ],
)
def test_types(answer: str, kind: str) -> None:
    assert answer_type(answer) == kind


NAMES = st.lists(
    st.sampled_from(["Ann", "Bob", "Cay", "ann", "Ö", "II", "1990", "the", "of", "km"]), min_size=1, max_size=3
)
ANSWERS = NAMES.map(" ".join)
TEXT = st.lists(ANSWERS | st.sampled_from([", ", "'s", ".", "-", "word", "\N{NOT EQUAL TO}", "o\u0308"]), max_size=12)


@st.composite
def question_sets(draw: st.DrawFn) -> list[Question]:
    questions = []
    for number in range(draw(st.integers(1, 6))):
        answers = draw(st.lists(ANSWERS, min_size=1, max_size=3))
        passages = [
            (draw(ANSWERS | st.just("")), " ".join([*draw(TEXT), draw(st.sampled_from([*answers, "x"])), *draw(TEXT)]))
            for _ in range(draw(st.integers(0, 3)))
        ]
        questions.append(question(f"question {number}", answers, *passages))
    return questions


@settings(deadline=None, max_examples=300)
@given(question_sets(), st.integers(0, 3))
def test_no_original_answer_is_left(questions: list[Question], seed: int) -> None:
    conflicts, counts = conflicts_of(questions, seed)
    assert conflicts_of(questions, seed) == (conflicts, counts)
    assert counts.written == len(conflicts)
    assert counts.written + counts.without_answer + counts.without_replacement == counts.questions == len(questions)
    by_text = {one.question: one for one in questions}
    all_answers = {unicodedata.normalize("NFD", answer).lower() for one in questions for answer in one.answers}
    for conflict in conflicts:
        original = by_text[conflict.question]
        (new,) = conflict.answers
        assert conflict.original_answers == original.answers
        assert unicodedata.normalize("NFD", new).lower() in all_answers
        stated = [one for one in conflict.passages if occurs(new, one.passage.string)]
        assert stated
        assert stated == [one for one in conflict.passages if one.has_answer]
        for one, before in zip(conflict.passages, original.passages, strict=True):
            assert not any(occurs(answer, one.passage.string) for answer in original.answers)
            if not one.has_answer:
                assert one.passage == before.passage


@given(st.lists(st.sampled_from(["Ann", "ann", "Bob", "B", ",", " ", "-", "Ö"]), max_size=10).map("".join), st.data())
def test_spans_are_whole_tokens_of_an_answer(text: str, data: st.DataObject) -> None:
    answers = data.draw(st.lists(ANSWERS, max_size=2))
    spans = answer_spans(text, answers)
    wanted = [dpr_tokens(answer) for answer in answers]
    for start, end in spans:
        assert dpr_tokens(text[start:end]) in wanted
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert bool(spans) == any(occurs(answer, text) for answer in answers)
    rest = "\n".join(
        text[start:end] for start, end in zip([0, *(e for _, e in spans)], [*(s for s, _ in spans), None], strict=True)
    )
    tokens = Counter(dpr_tokens(text))
    assert tokens == Counter(dpr_tokens(rest)) + Counter(token for s, e in spans for token in dpr_tokens(text[s:e]))


def test_the_longest_answer_is_taken() -> None:
    text = "In New York City and New York."
    spans = answer_spans(text, ["New York", "new york city", "York City and Ohio"])
    assert [text[start:end] for start, end in spans] == ["New York City", "New York"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_has_both_answers(tmp_path: Path) -> None:
    source, out = tmp_path / "questions.jsonl", tmp_path / "conflicts.jsonl"
    lines = [
        {
            "question": one.question,
            "answers": one.answers,
            "ctxs": [{"title": p.passage.title, "text": p.passage.text} for p in one.passages],
        }
        for one in (ROSSINI, VERDI)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = write_conflicts(source, out, seed=3)
    assert counts.written == 2
    header, first, _ = rows(out)
    assert (header["conflicts_of"], header["seed"]) == ("questions.jsonl", 3)
    assert (first["answers"], first["original_answers"]) == (["Roncole"], ["Pesaro", "Pesaro, Italy"])
    assert [one.original_answers for one in read_questions(out)] == [ROSSINI.answers, VERDI.answers]


def test_nothing_is_written_without_a_conflict(tmp_path: Path) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text(json.dumps({"question": "q", "answers": ["a b"]}))
    with pytest.raises(InputError, match=r"none of 1 questions can be changed \(1 have no passage .*give more"):
        write_conflicts(source, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


def test_real_questions_keep_nothing_and_depend_on_the_seed() -> None:
    if not REAL.exists():
        pytest.skip(f"needs the NQ sample of {REAL}")
    questions = [one for number, one in enumerate(read_questions(REAL)) if number % 8 == 0]
    conflicts, counts = conflicts_of(questions, 1)
    assert counts.written > 0.95 * len(questions)
    for conflict in conflicts:
        for answer in conflict.original_answers:
            assert not any(occurs(answer, one.passage.string) for one in conflict.passages)
    again, _ = conflicts_of(questions, 1)
    other, _ = conflicts_of(questions, 2)
    assert again == conflicts
    assert sum(a.answers != b.answers for a, b in zip(conflicts, other, strict=False)) > len(conflicts) / 2
