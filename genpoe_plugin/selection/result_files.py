"""Result files, written question by question, so that an interrupted run can resume."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.questions import (
    Question,
    RetrievedPassage,
    header_line,
    question_line,
    read_questions,
    write_dpr_results,
    write_questions,
)
from genpoe_plugin.data.trec import Qrels, write_qrels, write_run
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import only_writer
from genpoe_plugin.json_text import parse_json
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.retrieval.measures import Judged, quality_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genpoe_plugin.retrieval.retriever import Retriever
    from genpoe_plugin.selection.reranking import Scorer


SEARCH_BLOCK = 256  # questions searched at a time
SCORE_BLOCK = 512  # passages scored at a time; more if one question has more


@dataclass
class Quality:
    """The judged rankings of questions, before and after reranking. Questions without answers or qrels are left out.

    Attributes:
        qrels: grades of passages; without them, passages with an answer are relevant.
        passages: the largest number of passages of a question.
        retrieved: the retriever's order.
        reranked: the order of the passages, which is the reranker's after reranking.
    """

    qrels: Qrels | None = None
    passages: int = 0
    retrieved: list[Judged] = field(default_factory=list)
    reranked: list[Judged] = field(default_factory=list)

    def add(self, question: Question) -> None:
        if self.qrels is None and not question.answers and all(p.has_answer is None for p in question.passages):
            return
        if self.qrels is not None and question.id not in self.qrels:
            return
        self.passages = max(self.passages, len(question.passages))
        self.retrieved.append(self._judged(question, sorted(question.passages, key=lambda passage: passage.rank)))
        self.reranked.append(self._judged(question, question.passages))

    def _judged(self, question: Question, passages: Sequence[RetrievedPassage]) -> Judged:
        if self.qrels is None:
            return Judged.by_answers(passage.has_answer for passage in passages)
        return Judged.by_qrels((passage.passage.id for passage in passages), self.qrels[question.id])

    def table(self, reranked: bool) -> str:
        """Recall, MRR and nDCG before and, if ``reranked``, after reranking."""
        if not self.retrieved:
            return "nothing to measure: no question has answers, or judgements in --qrels"
        rankings = {"retrieved": self.retrieved} | ({"reranked": self.reranked} if reranked else {})
        return quality_table(rankings, self.passages)


def retrieve_all(questions: Iterable[Question], retriever: Retriever, k: int) -> Iterator[Question]:
    """Yield the questions with their ``k`` retrieved passages, which replace any passages that they had."""
    for block in _blocks(questions, lambda _: 1, SEARCH_BLOCK):
        retrieved = retriever.retrieve([question.question for question in block], k)
        for question, passages in zip(block, retrieved, strict=True):
            yield labelled(replace(question, passages=passages))


def rerank_all(
    questions: Iterable[Question], reranker: Scorer, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Question]:
    """Yield the questions with their passages in the reranker's order; the retriever's rank breaks ties.

    Args:
        questions: questions with passages.
        reranker: scores the passages.
        tokenizer: tokenizer of an LLM, to cut passages as in its evaluations; without one, passages are read whole.
    """
    from genpoe_plugin.selection.reranking import rerank  # torch

    for block in score_blocks(questions):
        ranked = [
            replace(question, passages=tuple(sorted(question.passages, key=lambda passage: passage.rank)))
            for question in block
        ]
        strings = {}
        if tokenizer is not None:
            whole = list(dict.fromkeys(item.passage.string for question in ranked for item in question.passages))
            strings = dict(zip(whole, cut_passages(whole, tokenizer), strict=True))
        yield from map(labelled, rerank(ranked, reranker, strings=strings))


def make_results(
    out: str | Path,
    questions: Iterable[Question],
    work: Callable[[Iterator[Question]], Iterator[Question]],
    header: Mapping[str, Any],
    *,
    reranks: bool = False,
    form: str = "genpoe",
    qrels: Qrels | None = None,
    write_qrels_to: Path | None = None,
    total: int | None = None,
    progress: bool = False,
) -> Quality:
    """Process the questions in order and write the results atomically to ``out``.

    Finished questions are collected in ``OUT.part``. A later call resumes from this file, whatever stopped the earlier
    one (even in the middle of a line). The file is removed at the end.

    Args:
        out: the result file.
        questions: the questions.
        work: yields the processed questions, in order.
        header: everything that decides the result, as JSON; a ``.part`` file with another header is refused.
        reranks: whether ``work`` is `rerank_all`. A later call then begins with a whole block, because the last digits
            of a score depend on the other pairs of its batch.
        form: output format, one of `questions.FORMATS`; only ours contains the header, and a TREC run no texts.
        qrels: grades of passages by question id, which decide ``has_answer`` and the measures in place of answers.
        write_qrels_to: file for qrels that say which passages have an answer.
        total: number of questions, for the progress bar.
        progress: whether to show a progress bar.

    Returns:
        The quality of the retrieved and reranked passages.

    Raises:
        InputError: ``out`` is a directory, another process writes it, the ``.part`` file belongs to another run, or a
            file cannot be written.
        KeyboardInterrupt: interrupted; the message says what is saved.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: a directory; give the name of a file")
    with only_writer(out):
        return _make_results(out, questions, work, header, reranks, form, qrels, write_qrels_to, total, progress)


def _make_results(
    out: Path,
    questions: Iterable[Question],
    work: Callable[[Iterator[Question]], Iterator[Question]],
    header: Mapping[str, Any],
    reranks: bool,
    form: str,
    qrels: Qrels | None,
    write_qrels_to: Path | None,
    total: int | None,
    progress: bool,
) -> Quality:
    part = out.with_name(f"{out.name}.part")
    with _writing(part):
        done = _begin(part, header)
        if reranks:
            done = _cut_to_whole_blocks(part)
    remaining = iter(questions)
    for number, (question, before) in enumerate(zip_longest(islice(remaining, done), _read(part)), 1):
        if question is None or before is None or question.question != before.question:
            raise InputError(f"{part}: question {number} differs from the input; delete the file to start over")
    bar = tqdm(total=total, initial=done, desc="questions", unit="question", disable=not progress)
    quality = Quality(qrels)
    try:
        with bar, part.open("ab", buffering=0) as file:
            for question in map(_judged(qrels), work(remaining)):
                _append(file, question_line(question))
                done += 1
                bar.update()
        finished = _tallied(_read(part), quality)
        if write_qrels_to is not None:
            with _writing(write_qrels_to):
                write_qrels(write_qrels_to, _read(part))
        with _writing(out):
            if form == "dpr":
                write_dpr_results(out, finished)
            elif form == "trec":
                write_run(out, finished)
            else:
                write_questions(out, finished, **header)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted; {done:,} questions are saved in {part}; rerun the same command to resume"
        ) from interrupt
    part.unlink()
    return quality


def _begin(part: Path, header: Mapping[str, Any]) -> int:
    """Create ``part``, or remove an unfinished last line from it; return the number of questions in it."""
    first = header_line(header).encode()
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    lines = whole = 0
    with part.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if lines == 0 and line != first:
                raise InputError(f"{part}: started with {_difference(line, header)}; delete it, or give another --out")
            lines += 1
            whole += len(line)
        file.truncate(whole)
        if lines == 0:
            file.seek(0)
            file.write(first)
    return max(lines - 1, 0)


def _cut_to_whole_blocks(part: Path) -> int:
    """Remove questions after the last whole block of `rerank_all` from ``part``; return the number of the others."""
    blocks = score_blocks(_read(part))
    # Only the last one can be smaller.
    done = sum(len(block) for block in blocks if sum(map(_passages, block)) >= SCORE_BLOCK)
    with part.open("r+b") as file:
        for _ in range(1 + done):  # the header, too
            file.readline()
        file.truncate(file.tell())
    return done


def _difference(line: bytes, header: Mapping[str, Any]) -> str:
    try:
        begun = parse_json(line.decode())
        name = next(name for name in header if begun.get(name) != header[name])
        return f"{name} {begun.get(name)!r}, not {header[name]!r}"
    except (ValueError, AttributeError, StopIteration):
        return "something else"


def _append(file: io.FileIO, line: str) -> None:
    """Write a line unbuffered, so that a kill loses at most one line and a full disk raises here."""
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
            f"{path}: cannot be written ({error.strerror or error}); "
            "finished questions are saved; rerun the same command to resume"
        ) from error


def _read(part: Path) -> Iterator[Question]:
    return read_questions(part, need_answers=False)


def _judged(qrels: Qrels | None) -> Callable[[Question], Question]:
    """A function that sets ``has_answer`` of a question's passages by their grades, if there are any."""

    def judge(question: Question) -> Question:
        if qrels is None or question.id not in qrels:
            return question
        grades = qrels[question.id]
        passages = (replace(passage, has_answer=grades.get(passage.passage.id, 0) > 0) for passage in question.passages)
        return replace(question, passages=tuple(passages))

    return judge


def _tallied(questions: Iterable[Question], quality: Quality) -> Iterator[Question]:
    for question in questions:
        quality.add(question)
        yield question


def labelled(question: Question) -> Question:
    """Set ``has_answer`` of each passage by DPR's rule, unless the input has set it (gold marks) or has no answers."""
    if not question.answers:
        return question
    passages = (
        replace(passage, has_answer=has_answer(passage.passage.text, question.answers))
        if passage.has_answer is None
        else passage
        for passage in question.passages
    )
    return replace(question, passages=tuple(passages))


def score_blocks(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """The questions whose passages are scored together."""
    return _blocks(questions, _passages, SCORE_BLOCK)


def _passages(question: Question) -> int:
    return len(question.passages)


def _blocks(questions: Iterable[Question], size: Callable[[Question], int], least: int) -> Iterator[list[Question]]:
    """Split the questions into lists whose sizes add up to at least ``least``, with as few questions as possible."""
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
