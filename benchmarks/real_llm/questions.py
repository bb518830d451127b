"""The questions of a study with their passages: one file per data set and purpose."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from benchmarks.real_retrieval import BM25, NQ, SQUAD, encoder_name, index_of
from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import normalise_question
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.encoder import load_encoder

SETS = {"nq": NQ, "squad": SQUAD}
"""File pattern of each data set in the data folder."""
PURPOSES = ("gold", "hard", "wrong_first", "retrieved", "ranked")
DISTRACTORS = 3
RANKED = 8
"""Passages per question for the purpose ``ranked``."""
LESS = -math.log(7)
"""Rerank score of all passages but the first, whose score is 0: their gates are a seventh of its gate."""
NEGATIVES = 7
"""Passages without an answer per training question."""
_NEGATIVES_AMONG = 30
_DEPTH = 200  # retrieved passages to take distractors from


def find_files(data: Path | None, entries: Sequence[str]) -> dict[str, Path]:
    """The file of each data set, in the folder ``data`` or named by ``entries`` (``nq=FILE``), which take precedence.

    Raises:
        InputError: there are no files, or an entry names no data set.
    """
    files = {}
    for name, pattern in SETS.items():
        if data is not None and (found := sorted(data.rglob(pattern))):
            files[name] = found[0]
    for entry in entries:
        name, _, file = entry.partition("=")
        if name not in SETS or not file:
            raise InputError(f"--questions {entry}: give {' or '.join(f'{known}=FILE' for known in SETS)}")
        files[name] = Path(file)
    if not files:
        raise InputError(f"no questions; give --data FOLDER with {' or '.join(SETS.values())}, or --questions nq=FILE")
    return files


def with_gold(questions: Iterable[Question]) -> list[Question]:
    """The distinct questions that bring a passage with an answer, each with the first such passage only."""
    found: dict[str, Question] = {}
    for question in questions:
        gold = next((entry for entry in question.passages if entry.has_answer is not False), None)
        if gold is not None:
            only = replace(gold, rank=1, rerank_score=None, rerank_rank=None, has_answer=True)
            found.setdefault(normalise_question(question.question).casefold(), replace(question, passages=(only,)))
    return list(found.values())


def with_hard_negatives(questions: Sequence[Question]) -> list[Question]:
    """Questions with one passage each, extended by BM25's best `NEGATIVES` passages without an answer."""
    corpus = list({entry.passage.string: entry.passage for q in questions for entry in q.passages}.values())
    ranked = BM25(corpus).retrieve([question.question for question in questions], _NEGATIVES_AMONG)
    return [
        replace(question, passages=(*question.passages, *_negatives(question, entries)))
        for question, entries in zip(questions, ranked, strict=True)
    ]


def _negatives(question: Question, ranked: Sequence[RetrievedPassage]) -> list[RetrievedPassage]:
    wrong = (entry for entry in ranked if not has_answer(entry.passage.text, question.answers))
    return [replace(entry, rank=rank, has_answer=False) for rank, entry in enumerate(islice(wrong, NEGATIVES), 2)]


def sample(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """A random sample of ``count`` questions. A smaller sample is the beginning of a larger one."""
    order = random.Random(seed).sample(range(len(questions)), len(questions))
    return [questions[number] for number in order[:count]]


def distractors(question: Question, ranked: Sequence[RetrievedPassage]) -> tuple[RetrievedPassage, ...]:
    """The best `DISTRACTORS` retrieved passages that are not the question's own and have no answer.

    Raises:
        InputError: there are fewer.
    """
    own = {entry.passage.string for entry in question.passages}
    wrong = [
        replace(entry, has_answer=False)
        for entry in ranked
        if entry.passage.string not in own and not has_answer(entry.passage.text, question.answers)
    ]
    if len(wrong) < DISTRACTORS:
        raise InputError(
            f"{question.question!r}: only {len(wrong)} of {len(ranked)} retrieved passages have no answer, "
            f"but {DISTRACTORS} are needed; give a file with more passages"
        )
    return tuple(wrong[:DISTRACTORS])


def purposes(question: Question, ranked: Sequence[RetrievedPassage]) -> dict[str, Question]:
    """The question with the passages of each purpose.

    - gold: its own passage
    - hard: its own passage, then distractors
    - wrong_first: the same four, with a distractor in first place, which has the largest gate
    - retrieved: the first retrieved passage
    - ranked: the first `RANKED` retrieved passages
    """
    gold, wrong = question.passages, distractors(question, ranked)
    best = tuple(
        replace(entry, rank=rank, has_answer=has_answer(entry.passage.text, question.answers))
        for rank, entry in enumerate(ranked[:RANKED], 1)
    )
    passages = {
        "gold": gold,
        "hard": _scored(gold + wrong),
        "wrong_first": _scored((wrong[0], *gold, *wrong[1:])),
        "retrieved": best[:1],
        "ranked": best,
    }
    return {purpose: replace(question, passages=passages[purpose]) for purpose in PURPOSES}


def _scored(passages: Sequence[RetrievedPassage]) -> tuple[RetrievedPassage, ...]:
    return tuple(
        replace(entry, rank=rank, rerank_score=0.0 if rank == 1 else LESS, rerank_rank=rank)
        for rank, entry in enumerate(passages, 1)
    )


def file_of(out: Path, name: str, purpose: str) -> Path:
    return out / "questions" / f"{name}-{purpose}.jsonl"


def write_files(files: Mapping[str, Path], out: Path, count: int, seed: int) -> None:
    """Write the missing files of every data set, with ``count`` questions each.

    MiniLM retrieves from the passages of all questions of the data set.

    Raises:
        InputError: a file has too few questions, or too few passages without an answer.
    """
    for name, source in files.items():
        if all(file_of(out, name, purpose).is_file() for purpose in PURPOSES):
            continue
        questions = with_gold(read_questions(source))
        sampled = sample(questions, count, seed)
        if len(sampled) < count:
            raise InputError(f"{source}: {len(sampled)} distinct questions with a passage, but --limit is {count}")
        corpus = list({entry.passage.string: entry.passage for q in questions for entry in q.passages}.values())
        encoder = load_encoder(encoder_name())
        retriever = DenseRetriever(index_of(corpus, encoder, out / "indexes" / name), encoder)
        ranked = retriever.retrieve([q.question for q in sampled], min(_DEPTH, len(corpus)), progress=True)
        variants = [purposes(*pair) for pair in zip(sampled, ranked, strict=True)]
        for purpose in PURPOSES:
            write_questions(file_of(out, name, purpose), (one[purpose] for one in variants), purpose=purpose)
