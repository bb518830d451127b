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

# Passages kept to draw random negatives from, however large the files are.
POOL_SIZE = 100_000


@dataclass(frozen=True, slots=True)
class RerankerExample:
    """A query with passage strings that answer it and passage strings that do not, best retrieved first."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    prompt: str = DEFAULT_PROMPT


@dataclass(frozen=True, slots=True)
class RerankerDataCounts:
    """What became of the questions."""

    questions: int
    written: int
    without_positive: int
    too_few_negatives: int


def read_examples(path: str | Path) -> list[RerankerExample]:
    """Read reranker data (.gz too); a line without a prompt has the default one.

    Raises:
        InputError: a line is not such an object (the message names file and line), prompts differ, or there is none.
    """
    examples: list[RerankerExample] = []
    for record, where in read_json_objects(path):
        query, prompt = record.get("query", ""), record.get("prompt", DEFAULT_PROMPT)
        for key, text in (("query", query), ("prompt", prompt)):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f'{where}: "{key}" has to be a string that is not empty')
        for key in ("pos", "neg"):
            texts = record.get(key)
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise InputError(f'{where}: "{key}" has to be a list of at least one passage, strings')
        example = RerankerExample(query, tuple(record["pos"]), tuple(record["neg"]), prompt)
        check_characters("".join([query, prompt, *example.pos, *example.neg]), where)
        if examples and prompt != examples[0].prompt:
            raise InputError(f"{where}: not the prompt of the lines before; a reranker has one prompt")
        examples.append(example)
    if not examples:
        raise InputError(f"{path}: no examples; make some with `genpoe data reranker`")
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
    """Turn retrieval results (files that :func:`read_questions` reads) into reranker data, a question at a time.

    A question's passages with an answer are its positives, the others its negatives, in the retriever's order and
    each text once. Questions without a positive or with fewer than ``min_negatives`` negatives are left out.

    Args:
        negatives: kept per question, at most.
        min_negatives: as many as ``negatives``, where None.
        random_negatives: fill up to ``negatives`` with other questions' passages that do not hold an answer.
        seed: of the random negatives.

    Raises:
        InputError: a file is malformed, or no question can be used; nothing is written then.
    """
    min_negatives = negatives if min_negatives is None else min_negatives
    if not 1 <= min_negatives <= negatives:
        raise InputError(f"{min_negatives} negatives at least and {negatives} at most: must be 1 <= least <= most")
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
                f"{min_negatives} without; retrieve more passages, ask for fewer, or add random negatives"
            )
    return RerankerDataCounts(questions, written, without_positive, too_few_negatives)


def _questions(results: Sequence[str | Path]) -> Iterator[Question]:
    return chain.from_iterable(read_questions(path) for path in results)


def _split(question: Question) -> tuple[list[str], list[str]]:
    """Distinct strings of the passages with an answer and of those without; a text among both is a positive."""
    pos: dict[str, None] = {}
    neg: dict[str, None] = {}
    for retrieved in question.passages:
        answered = retrieved.has_answer
        if answered is None:
            answered = has_answer(retrieved.passage.text, question.answers)
        (pos if answered else neg)[retrieved.passage.string] = None
    return list(pos), [text for text in neg if text not in pos]


def _draw_pool(results: Sequence[str | Path], seed: int) -> list[Passage]:
    """A uniform sample of all passages, at most ``POOL_SIZE`` (reservoir sampling: one pass, bounded memory)."""
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
    """Up to ``count`` passages of ``pool`` that hold no answer to ``question`` and are not ``taken``."""
    drawn: list[str] = []
    # Twice as many draws as wanted, and some: a small pool may not hold enough, and it must end.
    for passage in rng.sample(pool, min(len(pool), 2 * count + 16)):
        if len(drawn) == count:
            break
        if passage.string not in taken and not has_answer(passage.text, question.answers):
            taken.add(passage.string)
            drawn.append(passage.string)
    return drawn
