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
ABSTENTIONS = (
    *("unanswerable", "not answerable", "no answer", "cannot answer", "cannot be answered", "cannot be determined"),
    *("unknown", "not known", "not sure", "I don't know", "I do not know", "no information", "not enough information"),
    *("insufficient information", "not mentioned", "not stated", "not specified", "not given", "not provided"),
    *("does not say", "doesn't say", "does not mention", "doesn't mention", "none", "N/A"),
)
"""Phrases of a prediction that abstains from an answer."""
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


def abstains(prediction: str) -> float:
    """1.0 if ``prediction`` has no words or contains a phrase of `ABSTENTIONS`, both after normalisation, else 0.0."""
    straight = prediction.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return float(not normalize_answer(straight) or contains(straight, ABSTENTIONS))


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


def answer_spans(text: str, answers: Iterable[str]) -> list[tuple[int, int]]:
    """Where ``text`` contains ``answers`` as runs of whole tokens, as `has_answer` compares them.

    Spans do not overlap; at each place the longest answer is taken.

    Returns:
        First and last character of each span, the last one exclusive, from left to right.
    """
    wanted = {tuple(tokens) for answer in answers if (tokens := dpr_tokens(answer))}
    lengths = sorted({len(tokens) for tokens in wanted}, reverse=True)
    # Tokens of the text as it is, since NFD would move the characters.
    found = [
        (match.start(), match.end(), unicodedata.normalize("NFD", match[0]).lower()) for match in _WORDS.finditer(text)
    ]
    tokens = [token for _, _, token in found]
    spans, at = [], 0
    while at < len(found):
        runs = (tuple(tokens[at : at + length]) for length in lengths)
        length = next((len(run) for run in runs if run in wanted), 0)
        if length:
            spans.append((found[at][0], found[at + length - 1][1]))
        at += length or 1
    return spans


def dpr_tokens(text: str) -> list[str]:
    """The tokens that `has_answer` compares."""
    return _tokens(text).split(_SEPARATOR)[1:-1]


def _tokens(text: str) -> str:
    tokens = _WORDS.findall(unicodedata.normalize("NFD", text))
    return _SEPARATOR + _SEPARATOR.join(tokens).lower() + _SEPARATOR if tokens else ""


# Cached, because a question's answers are searched in each of its passages; passages seldom recur.
_answer_tokens = lru_cache(maxsize=4096)(_tokens)
