"""Compare predictions with accepted answers (SQuAD v1.1, PopQA, ROUGE-L), and find answers in passages (DPR)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
# Tokens contain no control character, so in texts joined by one, a substring is always a run of whole tokens.
_SEPARATOR = "\n"


def normalize_answer(text: str) -> str:
    """The official SQuAD v1.1 normalisation: lower case; no ASCII punctuation, articles or extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def first_line(generation: str) -> str:
    """The first non-empty line of a generation (some LLMs begin the answer on a new line); "" if there is none."""
    return generation.strip().partition("\n")[0].strip()


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the normalised ``prediction`` equals any of the normalised ``answers``, else 0.0."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(answer) for answer in answers))


class TokenScores(NamedTuple):
    """F1, precision and recall of a prediction's normalised words against those of one answer, each in [0, 1]."""

    f1: float
    precision: float
    recall: float


def token_scores(prediction: str, answers: Iterable[str]) -> TokenScores:
    """The scores against the answer with the highest F1, the first of several; zeros if no word is shared."""
    words = normalize_answer(prediction).split()
    scores = (_token_scores(words, normalize_answer(answer).split()) for answer in answers)
    return max(scores, key=lambda score: score.f1, default=TokenScores(0.0, 0.0, 0.0))


def _token_scores(predicted: list[str], gold: list[str]) -> TokenScores:
    shared = (Counter(predicted) & Counter(gold)).total()
    if not shared:
        return TokenScores(0.0, 0.0, 0.0)
    return TokenScores(2 * shared / (len(predicted) + len(gold)), shared / len(predicted), shared / len(gold))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The highest F1 of normalised words over ``answers``, in [0, 1]."""
    return token_scores(prediction, answers).f1


def contains(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if ``prediction`` contains the words of any of ``answers`` in a row, after normalisation, else 0.0.

    Answers without words after normalisation are ignored. FlashRAG's ``acc`` and BERGEN's ``Match`` are less strict: an
    answer may also begin or end within a word ("cat" in "catalogue"), and an empty one is always contained.
    """
    words = f" {normalize_answer(prediction)} "
    return float(any(f" {normalized} " in words for answer in answers if (normalized := normalize_answer(answer))))


def popqa_accuracy(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if any of ``answers`` is a substring of ``prediction``, else 0.0.

    Each answer is tried unchanged, in lower case, and capitalised. Empty answers are ignored.
    """
    return float(any(form in prediction for a in answers if a for form in (a, a.lower(), a.capitalize())))


def rouge_l(prediction: str, answers: Iterable[str]) -> float:
    """The highest ROUGE-L F-measure of stemmed words over ``answers``, by the rouge-score package, in [0, 1]."""
    return max((_rouge().score(answer, prediction)["rougeL"].fmeasure for answer in answers), default=0.0)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # here, because the import takes a second

    return RougeScorer(["rougeL"], use_stemmer=True)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether ``text`` contains any of ``answers`` as a run of whole tokens: DPR's rule.

    Tokens are runs of letters, digits and marks, or single other characters, after NFD normalisation and in lower case.
    Answers without tokens are ignored.
    """
    needles = [needle for answer in answers if (needle := _answer_tokens(answer))]
    if not needles:
        return False
    haystack = _tokens(text)
    return any(needle in haystack for needle in needles)


def _tokens(text: str) -> str:
    tokens = _WORDS.findall(unicodedata.normalize("NFD", text))
    return _SEPARATOR + _SEPARATOR.join(tokens).lower() + _SEPARATOR if tokens else ""


# Cached, because a question's answers are searched in each of its passages; passages seldom recur.
_answer_tokens = lru_cache(maxsize=4096)(_tokens)
