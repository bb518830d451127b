"""TREC's files, by which retrieval is exchanged and scored: runs (what was found) and qrels (what is relevant)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from genpoe_plugin.data.questions import Question, replacing
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import numbered_lines

TAG = "genpoe"  # name of the run, its last column

Run = dict[str, dict[str, float]]
"""Scores by question id and passage id, best first."""
Qrels = dict[str, dict[str, int]]
"""Grades by question id and passage id; those above 0 are relevant."""


def read_run(path: str | Path) -> Run:
    """Read a run: lines of ``question Q0 passage rank score tag``; also as ``.gz``.

    The score decides the order, as in trec_eval; the order of the file breaks ties.

    Raises:
        InputError: a line is malformed, a passage is named twice for a question, or there are no lines.
    """
    run: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for fields, where in _lines(path):
        if len(fields) != 6:
            raise InputError(f"{where}: {len(fields)} fields; a line of a run is question Q0 passage rank score tag")
        question, _, passage, _, score, _ = fields
        if passage in run[question]:
            raise InputError(f"{where}: passage {passage!r} is named twice for question {question!r}")
        run[question][passage] = _number(score, where)
    if not run:
        raise InputError(f"{path}: the file is empty; give a run")
    return {question: dict(sorted(scores.items(), key=lambda item: -item[1])) for question, scores in run.items()}


def read_qrels(path: str | Path) -> Qrels:
    """Read qrels: lines of ``question 0 passage grade``, or of BEIR's ``query-id corpus-id score``; also as ``.gz``.

    Raises:
        InputError: a line is malformed, or there are no lines.
    """
    qrels: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for number, (fields, where) in enumerate(_lines(path)):
        if number == 0 and fields == ["query-id", "corpus-id", "score"]:
            continue
        if len(fields) not in (3, 4):
            raise InputError(
                f"{where}: {len(fields)} fields; a line of qrels is question 0 passage grade, or BEIR's three"
            )
        grade = _number(fields[-1], where)
        if grade != int(grade):
            raise InputError(f"{where}: the grade must be a whole number, not {fields[-1]!r}")
        qrels[fields[0]][fields[-2]] = int(grade)
    if not qrels:
        raise InputError(f"{path}: no judgements; give a file of qrels")
    return dict(qrels)


def write_run(path: str | Path, questions: Iterable[Question]) -> None:
    """Write the passages of questions, in their order, as a run that `read_run` and trec_eval read.

    The score is that of the reranker, or else of the retriever. trec_eval sorts by it, in 32 bits and with an order of
    ties of its own, so a score that is not below the one before it is written as the next smaller number.

    Raises:
        InputError: an id has white space, or two questions have the same id.
    """
    with replacing(path) as file:
        for question in identified(questions):
            last = np.float32(np.inf)
            for rank, entry in enumerate(question.passages, 1):
                score = np.float32(entry.score if entry.rerank_score is None else entry.rerank_score)
                last = score if score < last else np.nextafter(last, np.float32(-np.inf))
                file.write(f"{_word(question.id)} Q0 {_word(entry.passage.id)} {rank} {last} {TAG}\n")


def write_qrels(path: str | Path, questions: Iterable[Question]) -> None:
    """Write which passages of questions have an answer (grade 1) and which have none (0), as qrels.

    Raises:
        InputError: an id has white space, or two questions have the same id.
    """
    with replacing(path) as file:
        for question in identified(questions):
            for entry in question.passages:
                file.write(f"{_word(question.id)} 0 {_word(entry.passage.id)} {int(bool(entry.has_answer))}\n")


def identified(questions: Iterable[Question]) -> Iterator[Question]:
    """Yield the questions with an id each: their own, or their number in the file, from 1.

    Raises:
        InputError: two questions have the same id.
    """
    seen: set[str] = set()
    for number, question in enumerate(questions, 1):
        identifier = question.id or str(number)
        if identifier in seen:
            raise InputError(f"question {number}: another question has the id {identifier!r} too; ids must be unique")
        seen.add(identifier)
        yield replace(question, id=identifier)


def _lines(path: str | Path) -> Iterator[tuple[list[str], str]]:
    """The fields of each line that is not blank, with its ``file:line``."""
    for number, line in numbered_lines(path):
        if fields := line.split():
            yield fields, f"{path}:{number}"


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {text!r} is not a number")
    return number


def _word(identifier: str) -> str:
    if not identifier or len(identifier.split()) != 1 or identifier != identifier.strip():
        raise InputError(f"id {identifier!r}: TREC's files are split at white space, so ids cannot have any")
    return identifier
