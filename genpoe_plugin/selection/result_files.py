"""Result files made question by question: what is done when the work stops is kept and gone on from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.questions import (
    Question,
    header_line,
    question_line,
    read_questions,
    write_dpr_results,
    write_questions,
)
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.retrieval.measures import AnswerRank, answer_rank, quality_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genpoe_plugin.retrieval.retriever import Retriever
    from genpoe_plugin.selection.reranking import Reranker


SEARCHED = 256  # questions searched at a time
SCORED = 512  # passages scored at a time, or those of one question if they are more


@dataclass
class Quality:
    """Where the first passage with an answer was, question by question, as retrieved and, if they were, as reranked."""

    passages: int = 0
    retrieved: list[AnswerRank] = field(default_factory=list)
    reranked: list[AnswerRank] = field(default_factory=list)

    def add(self, question: Question) -> None:
        before = sorted(question.passages, key=lambda passage: passage.rank)
        self.passages = max(self.passages, len(before))
        self.retrieved.append(answer_rank(passage.has_answer for passage in before))
        self.reranked.append(answer_rank(passage.has_answer for passage in question.passages))

    def table(self, reranked: bool) -> str:
        """Recall and MRR before and, if asked, after reranking."""
        rankings = {"retrieved": self.retrieved} | ({"reranked": self.reranked} if reranked else {})
        return quality_table(rankings, self.passages)


def retrieve_all(questions: Iterable[Question], retriever: Retriever, k: int) -> Iterator[Question]:
    """The questions one by one, with the ``k`` passages that are found instead of any that they had."""
    for block in _blocks(questions, lambda _: 1, SEARCHED):
        found = retriever.retrieve([question.question for question in block], k)
        for question, passages in zip(block, found, strict=True):
            yield _labelled(replace(question, passages=passages))


def rerank_all(
    questions: Iterable[Question], reranker: Reranker, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Question]:
    """The questions one by one, their passages put in the reranker's order; ties go by the retriever's rank.

    Args:
        tokenizer: of an LLM, by whose tokens passages are cut as in its evaluations; they are read whole without one.
    """
    from genpoe_plugin.selection.reranking import rerank  # torch

    for block in _blocks(questions, lambda question: len(question.passages), SCORED):
        ranked = [
            replace(question, passages=tuple(sorted(question.passages, key=lambda passage: passage.rank)))
            for question in block
        ]
        strings = {}
        if tokenizer is not None:
            whole = list(dict.fromkeys(item.passage.string for question in ranked for item in question.passages))
            strings = dict(zip(whole, cut_passages(whole, tokenizer), strict=True))
        yield from map(_labelled, rerank(ranked, reranker, strings=strings))


def make_results(
    out: str | Path,
    questions: Iterable[Question],
    work: Callable[[Iterator[Question]], Iterator[Question]],
    header: Mapping[str, Any],
    *,
    form: str = "genpoe",
    total: int | None = None,
    progress: bool = False,
) -> Quality:
    """Write what ``work`` makes of the questions, in their order, to ``out``, whole or not at all.

    Questions that are done are collected in ``OUT.part``. It is gone on from after whatever stopped the work, a kill
    within a line included, and removed in the end.

    Args:
        header: all that decides the result, as JSON; a ``.part`` with another one is not gone on from.
        form: of `questions.FORMATS`; DPR's has no place for the header.
        total: number of questions, for the progress bar.

    Raises:
        InputError: ``out`` is a directory, the ``.part`` is of another run, or it cannot be written.
        KeyboardInterrupt: with a message that says what is kept.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: a directory; give the name of a file")
    part = out.with_name(f"{out.name}.part")
    with _writing(part):
        done = _begin(part, header)
    asked = iter(questions)
    for number, (question, before) in enumerate(zip_longest(islice(asked, done), read_questions(part)), 1):
        if question is None or before is None or question.question != before.question:
            raise InputError(f"{part}: question {number} is another one; delete the file to begin anew")
    bar = tqdm(total=total, initial=done, desc="questions", unit="question", disable=not progress)
    quality = Quality()
    try:
        with bar, part.open("ab", buffering=0) as file:
            for question in work(asked):
                _append(file, question_line(question))
                done += 1
                bar.update()
        finished = _tallied(read_questions(part), quality)
        with _writing(out):
            if form == "dpr":
                write_dpr_results(out, finished)
            else:
                write_questions(out, finished, **header)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted; {done:,} questions are kept in {part}, and the same command goes on from there"
        ) from interrupt
    part.unlink()
    return quality


def _begin(part: Path, header: Mapping[str, Any]) -> int:
    """Begin ``part``, or cut off a line that was not finished; returns the number of questions that it has."""
    first = header_line(header).encode()
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    lines = whole = 0
    with part.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if lines == 0 and line != first:
                raise InputError(f"{part}: begun with {_difference(line, header)}; delete it, or give another --out")
            lines += 1
            whole += len(line)
        file.truncate(whole)
        if lines == 0:
            file.seek(0)
            file.write(first)
    return max(lines - 1, 0)


def _difference(line: bytes, header: Mapping[str, Any]) -> str:
    try:
        begun = json.loads(line)
        name = next(name for name in header if begun.get(name) != header[name])
        return f"{name} {begun.get(name)!r}, not {header[name]!r}"
    except (ValueError, AttributeError, StopIteration):
        return "something else"


def _append(file: io.FileIO, line: str) -> None:
    """Unbuffered, so that a kill loses a line at most, and a full disk is noticed here."""
    rest = memoryview(line.encode())
    with _writing(file.name):
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); what is done is kept, and the same command goes on"
        ) from error


def _tallied(questions: Iterable[Question], quality: Quality) -> Iterator[Question]:
    for question in questions:
        quality.add(question)
        yield question


def _labelled(question: Question) -> Question:
    """Say of each passage whether it has an answer, by DPR's rule, where nobody has said so: gold marks stay."""
    passages = (
        replace(passage, has_answer=has_answer(passage.passage.text, question.answers))
        if passage.has_answer is None
        else passage
        for passage in question.passages
    )
    return replace(question, passages=tuple(passages))


def _blocks(questions: Iterable[Question], size: Callable[[Question], int], least: int) -> Iterator[list[Question]]:
    """The questions in lists whose sizes add up to ``least`` or, by their last question, more."""
    block: list[Question] = []
    filled = 0
    for question in questions:
        block.append(question)
        filled += size(question)
        if filled >= least:
            yield block
            block, filled = [], 0
    if block:
        yield block
