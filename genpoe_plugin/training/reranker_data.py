"""Training data of the reranker: JSON lines ``{"query", "pos", "neg", "prompt"}``, made from retrieval results."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage, check_characters, read_json_objects
from genpoe_plugin.data.questions import Question, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.selection.reranking import DEFAULT_PROMPT

# Largest number of passages to draw random negatives from, whatever the size of the files.
POOL_SIZE = 100_000


@dataclass(frozen=True, slots=True)
class RerankerExample:
    """A query with positive and negative passage strings.

    Attributes:
        query: the query.
        pos: strings of passages with an answer, in the retriever's order.
        neg: strings of passages without an answer, in the retriever's order.
        prompt: the reranker's prompt.
    """

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    prompt: str = DEFAULT_PROMPT


@dataclass(frozen=True, slots=True)
class RerankerDataCounts:
    """Counts of the questions that were read, written and left out."""

    questions: int
    written: int
    without_positive: int
    too_few_negatives: int


def read_examples(path: str | Path) -> list[RerankerExample]:
    """Read reranker data, also from ``.gz``; a line without a prompt gets the default prompt.

    Raises:
        InputError: a line is malformed (the message names file and line), prompts differ, or there are no examples.
    """
    examples: list[RerankerExample] = []
    for record, where in read_json_objects(path):
        query, prompt = record.get("query", ""), record.get("prompt", DEFAULT_PROMPT)
        for key, text in (("query", query), ("prompt", prompt)):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f'{where}: "{key}" must be a non-empty string')
        for key in ("pos", "neg"):
            texts = record.get(key)
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise InputError(f'{where}: "{key}" must be a list of at least one passage string')
        example = RerankerExample(query, tuple(record["pos"]), tuple(record["neg"]), prompt)
        check_characters("".join([query, prompt, *example.pos, *example.neg]), where)
        if examples and prompt != examples[0].prompt:
            raise InputError(f"{where}: the prompt differs from earlier lines; a reranker has one prompt")
        examples.append(example)
    if not examples:
        raise InputError(f"{path}: no examples; create them with `genpoe data reranker`")
    return examples


def write_reranker_data(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    negatives: int = 32,
    min_negatives: int | None = None,
    random_negatives: bool = False,
    seed: int = 0,
    prompt: str = DEFAULT_PROMPT,
) -> RerankerDataCounts:
    """Convert retrieval results to reranker data, question by question.

    A question's passages with an answer are its positives, the others its negatives, in the retriever's order and
    without duplicates. Questions without a positive or with fewer than ``min_negatives`` negatives are left out.

    Args:
        results: files that :func:`read_questions` reads.
        out: the file to write.
        negatives: largest number of negatives per question.
        min_negatives: smallest number of negatives per question; ``negatives`` by default.
        random_negatives: fill up to ``negatives`` with passages of other questions that contain no answer.
        seed: seed of the random negatives.
        prompt: the reranker's prompt.

    Returns:
        Counts of the questions.

    Raises:
        InputError: a file is malformed, or no question can be used; nothing is written.
    """
    min_negatives = negatives if min_negatives is None else min_negatives
    if not 1 <= min_negatives <= negatives:
        raise InputError(
            f"min_negatives is {min_negatives}, negatives is {negatives}; must be 1 <= min_negatives <= negatives"
        )
    pool = _draw_pool(results, seed) if random_negatives else []
    questions = written = without_positive = too_few_negatives = 0
    with atomic_file(out) as temporary:
        opener = gzip.open if Path(out).suffix == ".gz" else open
        with opener(temporary, "wt", encoding="utf-8") as file:
            for question in _questions(results):
                questions += 1
                pos, neg = _split(question)
                neg = neg[:negatives]
                if pos and pool:
                    rng = random.Random(f"{seed}-{questions}")
                    neg += _random_negatives(question, {*pos, *neg}, pool, negatives - len(neg), rng)
                if not pos:
                    without_positive += 1
                elif len(neg) < min_negatives:
                    too_few_negatives += 1
                else:
                    example = RerankerExample(question.question, tuple(pos), tuple(neg), prompt)
                    file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
                    written += 1
        if not written:
            raise InputError(
                f"{results[0]}: none of {questions} questions has a passage with an answer and at least "
                f"{min_negatives} without; retrieve more passages, lower min_negatives, or add random negatives"
            )
    return RerankerDataCounts(questions, written, without_positive, too_few_negatives)


def _questions(results: Sequence[str | Path]) -> Iterator[Question]:
    return chain.from_iterable(read_questions(path) for path in results)


def _split(question: Question) -> tuple[list[str], list[str]]:
    """Distinct strings of the passages with and without an answer; a string in both lists is a positive."""
    pos: dict[str, None] = {}
    neg: dict[str, None] = {}
    for retrieved in question.passages:
        answered = retrieved.has_answer
        if answered is None:
            answered = has_answer(retrieved.passage.text, question.answers)
        (pos if answered else neg)[retrieved.passage.string] = None
    return list(pos), [text for text in neg if text not in pos]


def _draw_pool(results: Sequence[str | Path], seed: int) -> list[Passage]:
    """A uniform sample of at most ``POOL_SIZE`` passages, by reservoir sampling: one pass, bounded memory."""
    rng = random.Random(f"pool-{seed}")
    pool: list[Passage] = []
    passages = (retrieved.passage for question in _questions(results) for retrieved in question.passages)
    for count, passage in enumerate(passages):
        if count < POOL_SIZE:
            pool.append(passage)
        elif (slot := rng.randrange(count + 1)) < POOL_SIZE:
            pool[slot] = passage
    return pool


def _random_negatives(
    question: Question, taken: set[str], pool: Sequence[Passage], count: int, rng: random.Random
) -> list[str]:
    """Up to ``count`` strings of passages in ``pool`` that contain no answer to ``question`` and are not ``taken``."""
    drawn: list[str] = []
    # The number of draws is bounded, because a small pool may not contain enough passages.
    for passage in rng.sample(pool, min(len(pool), 2 * count + 16)):
        if len(drawn) == count:
            break
        if passage.string not in taken and not has_answer(passage.text, question.answers):
            taken.add(passage.string)
            drawn.append(passage.string)
    return drawn
