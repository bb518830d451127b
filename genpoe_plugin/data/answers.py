"""Comparing an answer with the accepted ones (SQuAD v1.1, PopQA, ROUGE-L), and finding an answer in a passage (DPR)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
# No token holds a control character, so tokens joined by one match as a substring exactly where they match as a run.
_SEPARATOR = "\n"


def normalize_answer(text: str) -> str:
    """The official SQuAD v1.1 normalisation: lower case, without ASCII punctuation, articles and spare white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def first_line(generation: str) -> str:
    """The first line that is not empty: some LLMs begin their answer on a new line. Empty if there is none."""
    return generation.strip().partition("\n")[0].strip()


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the normalised ``prediction`` equals any of the normalised ``answers``, else 0.0."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The best F1, over ``answers``, of the bags of normalised words; in [0, 1]."""
    words = normalize_answer(prediction).split()
    return max((_bag_f1(words, normalize_answer(answer).split()) for answer in answers), default=0.0)


def _bag_f1(predicted: list[str], gold: list[str]) -> float:
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def contains(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the normalised words of any of ``answers`` stand in a row in those of ``prediction``, else 0.0.

    An answer that has no word left after normalisation is not looked for.
    """
    words = f" {normalize_answer(prediction)} "
    return float(any(f" {normalized} " in words for answer in answers if (normalized := normalize_answer(answer))))


def popqa_accuracy(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if ``prediction`` has any of ``answers`` in it, as a substring, else 0.0.

    An answer is looked for as it is, in lower case, and with the first letter alone in upper case. An empty one is not
    looked for.
    """
    return float(any(form in prediction for a in answers if a for form in (a, a.lower(), a.capitalize())))


def rouge_l(prediction: str, answers: Iterable[str]) -> float:
    """The best ROUGE-L F-measure, over ``answers``, of stemmed words, as the rouge-score package has it; in [0, 1]."""
    return max((_rouge().score(answer, prediction)["rougeL"].fmeasure for answer in answers), default=0.0)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second

    return RougeScorer(["rougeL"], use_stemmer=True)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether any of ``answers`` occurs in ``text`` as a run of whole tokens, in DPR's sense.

    Tokens are runs of letters, digits and marks, or single other characters, after NFD and in lower case. An answer
    without any token matches nothing.
    """
    needles = [needle for answer in answers if (needle := _answer_tokens(answer))]
    if not needles:
        return False
    haystack = _tokens(text)
    return any(needle in haystack for needle in needles)


def _tokens(text: str) -> str:
    tokens = _WORDS.findall(unicodedata.normalize("NFD", text))
    return _SEPARATOR + _SEPARATOR.join(tokens).lower() + _SEPARATOR if tokens else ""


# One question's answers are looked for in each of its passages; the passages themselves seldom recur.
_answer_tokens = lru_cache(maxsize=4096)(_tokens)
