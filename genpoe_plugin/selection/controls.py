"""Controls: evaluations with other passages than the retrieved ones, to test whether the passages' content matters.

Every control is a pure function of its arguments and a seed, and does not depend on the order of the questions. If a
question's answers are known, every control except ``gold`` avoids passages that contain an answer, as far as there are
others.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import normalise_question

CONTROLS = ("retrieved", "gold", "shuffled", "random", "constant", "none")

_DRAWS = 50


class Pool(Protocol):
    """Passages to draw from, accessed by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Passage: ...


def gold(passages: Sequence[RetrievedPassage]) -> tuple[RetrievedPassage, ...]:
    """The passages that are known to contain an answer, in their order."""
    return tuple(passage for passage in passages if passage.has_answer)


def shuffled(questions: Sequence[Question], seed: int) -> list[tuple[RetrievedPassage, ...]]:
    """Give every question the passages of another question.

    The distinct questions with passages form one cycle, in an order drawn from ``seed``. Each gets the passages of the
    next question (a derangement). A next question is skipped if one of its passages also belongs to the question or
    contains an answer to it, unless that holds for all others. Repeated questions have one place in the cycle, so none
    gets its own passages. A question without passages gets none. Passages keep their scores.

    Args:
        questions: the questions of one task.
        seed: seed of the order.

    Returns:
        The passages of each question, in the order of ``questions``.

    Raises:
        InputError: fewer than two different questions have passages.
    """
    keys = [normalise_question(question.question).casefold() for question in questions]
    passages: dict[str, tuple[RetrievedPassage, ...]] = {}
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for key, question in zip(keys, questions, strict=True):
        if question.passages:
            passages[key] = min(passages.get(key, question.passages), question.passages, key=_strings)
            answers[key].update(question.answers)
    if len(passages) < 2:
        raise InputError("passages=shuffled needs two different questions with passages in a task; raise --limit")
    order = sorted(passages, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())

    def suits(key: str, donor: str) -> bool:
        own_strings = set(_strings(passages[key]))
        return not any(
            passage.passage.string in own_strings or has_answer(passage.passage.text, answers[key])
            for passage in passages[donor]
        )

    assigned = {}
    for place, key in enumerate(order):
        others = order[place + 1 :] + order[:place]
        assigned[key] = passages[next((donor for donor in others if suits(key, donor)), others[0])]
    return [assigned[key] if question.passages else () for key, question in zip(keys, questions, strict=True)]


def random_passages(question: Question, pool: Pool, count: int, seed: int) -> tuple[RetrievedPassage, ...]:
    """``count`` passages from ``pool`` that contain no answer, drawn by ``seed`` and question.

    There are fewer if 50 draws per passage do not yield enough.
    """
    numbers = random.Random(f"{seed}\0{normalise_question(question.question).casefold()}")
    draws = numbers.sample(range(len(pool)), min(len(pool), _DRAWS * count))
    suitable = (passage for draw in draws if not has_answer((passage := pool[draw]).text, question.answers))
    return tuple(RetrievedPassage(passage, 0.0, rank) for rank, passage in enumerate(islice(suitable, count), 1))


def constant(pool: Pool, seed: int) -> tuple[RetrievedPassage, ...]:
    """One passage from ``pool``, drawn by ``seed``, for all questions."""
    return (RetrievedPassage(pool[random.Random(seed).randrange(len(pool))], 0.0, 1),)


def _strings(passages: Sequence[RetrievedPassage]) -> list[str]:
    return [passage.passage.string for passage in passages]
