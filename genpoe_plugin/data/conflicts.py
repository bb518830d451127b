"""Conflict sets: questions whose passages state another answer than the original one.

`conflicts_of` replaces the answer of a question in its passages by the answer of another question:

1. A question's own answer is the first accepted one that its passages contain, as they write it; answers are found by
   DPR's rule (`genpoe_plugin.data.answers.answer_spans`). Its type is the first that fits (`answer_type`).
2. The popularity of an answer is its number of occurrences in all distinct passages of the file.
3. The new answer is drawn from the own answers of other questions that have the same type and a popularity between half
   and twice that of the question's own (`FACTOR`). It contains no accepted answer and is contained in none, and neither
   the question nor its passages contain it.
4. Every occurrence of every accepted answer in titles and texts is replaced, the longest one first.
5. If an accepted answer is still found, or the new answer is not, the next one is drawn, `TRIES` times at most.

Mentions in other words than the accepted answers stay, such as a surname where only the full name is accepted.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from genpoe_plugin.data.answers import answer_spans, dpr_tokens, has_answer, normalize_answer
from genpoe_plugin.data.passages import Passage, content_id
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.errors import InputError

FACTOR = 2
TRIES = 100

_YEAR = re.compile(r"(1\d|20)\d\d")
_MONTH = re.compile(
    r"\b(january|february|march|april|may|june|july|august|september|october|november|december)\b", re.IGNORECASE
)
_DIGITS = re.compile(r"[$€£]?\d[\d.,]*%?")
_NUMBER_WORDS = {
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty"),
    *("fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million", "billion"),
}
_WORD = re.compile(r"\w[\w'\u2019.]*")
_SMALL_WORDS = {
    *("a", "an", "the", "and", "of", "in", "on", "at", "for", "to"),
    *("de", "da", "di", "la", "le", "du", "van", "von", "der"),
}
_Tokens = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConflictCounts:
    """Counts of the questions that were read, written and left out."""

    questions: int
    written: int
    without_answer: int
    without_replacement: int


def write_conflicts(questions: str | Path, out: str | Path, *, seed: int = 0) -> ConflictCounts:
    """Read a file of questions with passages, and write its conflict set for `read_questions`.

    Args:
        questions: a file that `read_questions` reads.
        out: the file to write; a name that ends in ``.gz`` compresses it.
        seed: seed of the new answers.

    Returns:
        Counts of the questions.

    Raises:
        InputError: a question is malformed, or the set would be empty; nothing is written.
    """
    conflicts, counts = conflicts_of(list(read_questions(questions)), seed)
    if not conflicts:
        raise InputError(
            f"{questions}: none of {counts.questions} questions can be changed ({counts.without_answer} have no "
            f"passage with an answer that can be replaced, {counts.without_replacement} no other answer of their type "
            "and popularity); give more questions with passages"
        )
    write_questions(out, conflicts, conflicts_of=Path(questions).name, seed=seed)
    return counts


def conflicts_of(questions: Sequence[Question], seed: int) -> tuple[list[Question], ConflictCounts]:
    """The questions with another answer in their passages; see the module for the procedure.

    Args:
        questions: questions with passages.
        seed: seed of the new answers.

    Returns:
        The questions for which a new answer was found, and counts. ``answers`` of a question has the new answer, and
        ``original_answers`` the accepted ones. ``has_answer`` marks the passages with the new answer, which have new
        ids.
    """
    own_answers = [_own_answer(question) for question in questions]
    spellings: dict[_Tokens, str] = {}
    for answer in own_answers:
        if answer is not None:
            spellings.setdefault(_key(answer), answer)
    popularity = _popularity(questions, spellings)
    pools: defaultdict[str, _Pool] = defaultdict(_Pool)
    for key, answer in sorted(spellings.items(), key=lambda item: (popularity[item[0]], item)):
        pools[answer_type(answer)].add(answer, popularity[key])
    conflicts = []
    for number, (question, answer) in enumerate(zip(questions, own_answers, strict=True)):
        if answer is not None:
            near = pools[answer_type(answer)].near(popularity[_key(answer)])
            rng = random.Random(f"{seed}-{number}")
            conflict = _conflict(question, rng.sample(near, min(len(near), TRIES)))
            conflicts += [] if conflict is None else [conflict]
    written, without_answer = len(conflicts), own_answers.count(None)
    left = len(questions) - written - without_answer
    return conflicts, ConflictCounts(len(questions), written, without_answer, left)


def answer_type(answer: str) -> str:
    """The coarse type of an answer, the first that fits.

    - ``year``: a number from 1000 to 2099;
    - ``date``: the name of a month and a digit;
    - ``number``: nothing but digits and words of numbers, with signs of currency and per cent;
    - ``name``: every word begins with a capital letter or a digit, except articles, prepositions and the like, and the
      first letter is a capital one;
    - ``other``.
    """
    answer = answer.strip()
    if _YEAR.fullmatch(answer):
        return "year"
    if _MONTH.search(answer) and any(character.isdigit() for character in answer):
        return "date"
    if all(_DIGITS.fullmatch(word) or word.lower() in _NUMBER_WORDS for word in re.split(r"[\s-]+", answer)):
        return "number"
    words = [word for word in _WORD.findall(answer) if word not in _SMALL_WORDS]
    if words and words[0][0].isupper() and all(word[0].isupper() or word[0].isdigit() for word in words):
        return "name"
    return "other"


@dataclass(frozen=True, slots=True)
class _Pool:
    """The answers of one type, by ascending popularity."""

    answers: list[str] = field(default_factory=list)
    popularity: list[int] = field(default_factory=list)

    def add(self, answer: str, popularity: int) -> None:
        """Add an answer that is at least as popular as the earlier ones."""
        self.answers.append(answer)
        self.popularity.append(popularity)

    def near(self, popularity: int) -> list[str]:
        """The answers of like popularity."""
        first, last = popularity / FACTOR, popularity * FACTOR
        return self.answers[bisect_left(self.popularity, first) : bisect_right(self.popularity, last)]


def _key(answer: str) -> _Tokens:
    return tuple(dpr_tokens(answer))


def _own_answer(question: Question) -> str | None:
    """The first accepted answer that the passages contain, as they write it.

    None if there is none, or if an accepted answer is nothing but articles and punctuation, which no passage can lack.
    """
    if not all(normalize_answer(answer) for answer in question.answers):
        return None
    for answer in question.answers:
        for retrieved in question.passages:
            for text in (retrieved.passage.text, retrieved.passage.title):
                for start, end in answer_spans(text, [answer]):
                    return text[start:end]
    return None


def _popularity(questions: Sequence[Question], answers: Iterable[_Tokens]) -> Counter[_Tokens]:
    """The number of occurrences of each answer in all distinct passages."""
    counts = Counter(dict.fromkeys(answers, 0))
    lengths: defaultdict[str, set[int]] = defaultdict(set)  # of the answers that begin with a token
    for answer in counts:
        lengths[answer[0]].add(len(answer))
    passages = {(one.passage.title, one.passage.text) for question in questions for one in question.passages}
    for passage in passages:
        for tokens in map(dpr_tokens, passage):
            for at, token in enumerate(tokens):
                for length in lengths.get(token, ()):
                    answer = tuple(tokens[at : at + length])
                    if answer in counts:
                        counts[answer] += 1
    return counts


def _conflict(question: Question, new_answers: Iterable[str]) -> Question | None:
    """The question with the first of the new answers that fits; None if none does."""
    texts = [question.question, *(one.passage.string for one in question.passages)]
    for new in new_answers:
        if has_answer(new, question.answers) or any(has_answer(text, [new]) for text in [*question.answers, *texts]):
            continue
        passages = tuple(_with_answer(one, question.answers, new) for one in question.passages)
        if any(has_answer(one.passage.string, question.answers) for one in passages):
            continue
        if any(one.has_answer for one in passages):
            return replace(question, answers=(new,), passages=passages, original_answers=question.answers)
    return None


def _with_answer(retrieved: RetrievedPassage, answers: Sequence[str], new: str) -> RetrievedPassage:
    old = retrieved.passage
    title, text = (_replaced(part, answers, new) for part in (old.title, old.text))
    passage = old if (title, text) == (old.title, old.text) else Passage(content_id(title, text), title, text)
    return replace(retrieved, passage=passage, has_answer=has_answer(passage.string, [new]))


def _replaced(text: str, answers: Sequence[str], new: str) -> str:
    parts, at = [], 0
    for start, end in answer_spans(text, answers):
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])
