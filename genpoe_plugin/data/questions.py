"""Questions with their answers and retrieved passages, and the files that they come from and go to."""

from __future__ import annotations

import ast
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, cast

from genpoe_plugin.data.narrativeqa import read_narrativeqa
from genpoe_plugin.data.parquet import is_parquet, read_parquet_rows
from genpoe_plugin.data.passages import (
    RESULTS_FORMAT,
    RESULTS_VERSION,
    Passage,
    beginning,
    check_characters,
    json_objects,
    passage_from_ctx,
    read_json_objects,
    read_tsv_rows,
)
from genpoe_plugin.data.question_forms import to_dpr
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, open_text

FORMATS = ("genpoe", "dpr")  # that retrieval results are written in
HEADER_LIMIT = 1 << 16  # characters; a longer first line is a question's, or a whole JSON list


@dataclass(frozen=True, slots=True)
class RetrievedPassage:
    """A passage with what retriever and reranker said of it; ranks count from 1."""

    passage: Passage
    score: float
    rank: int
    rerank_score: float | None = None
    rerank_rank: int | None = None
    has_answer: bool | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question, all accepted answers, and its passages, best first.

    ``case`` is empty, or names what several questions are wordings of: the case counts as answered if one of them is.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[RetrievedPassage, ...] = ()
    case: str = ""


def read_questions(path: str | Path) -> Iterator[Question]:
    """Read questions one by one, in file order, from any of these files, each also as ``.gz``.

    - DPR results, as one JSON list or as JSON Lines: ``{"question", "answers", "ctxs": [...]}``;
    - what `write_questions` wrote;
    - DPR's ``*.qas.csv`` or ``.tsv``: ``question<TAB>['answer', ...]``;
    - nq_open: JSON Lines of ``{"question", "answer": [...]}``;
    - DPR's training data of retrievers, a JSON list of ``{"question", "answers", "positive_ctxs": [...],
      "negative_ctxs": [...], "hard_negative_ctxs": [...]}``: positives first, then the hard negatives;
    - DPR's gold passages, ``{"data": [{"question", "short_answers", "example_id", "title", "context"}]}``, where a
      question may have no passage (an empty ``context``); those without a short answer are passed over;
    - SQuAD v1.1, HotpotQA, 2WikiMultihopQA, MQuAKE and PopQA as their authors have them (JSON, PopQA a TSV), each with
      the passages that it brings along (`genpoe_plugin.data.question_forms`);
    - rows of the hub's data sets (`genpoe_plugin.data.hub_questions`), as JSON Lines or as a Parquet file;
    - the folder of NarrativeQA's authors (a clone of deepmind/narrativeqa): the test questions, with the summaries.

    The kind of file is seen from its content. One question at a time is in memory.

    Raises:
        InputError: a line is malformed, a question has no text or no answers, or the file is of a newer version.
    """
    for record, where in _records(path):
        yield from questions_from_record(record, where)


def questions_from_record(record: Mapping[str, Any], where: str) -> Iterator[Question]:
    """The questions of one JSON object of any of the forms of `read_questions`; ``where`` begins error messages."""
    for asked in to_dpr(record, where):
        answers = next((asked[field] for field in ("answers", "answer", "short_answers") if field in asked), None)
        if answers == [] and "short_answers" in asked:
            continue  # not every question of NQ has a short answer
        case = asked.get("case")
        yield Question(
            _question(asked.get("question"), where),
            _answers(answers, where),
            passages_from_ctxs(_ctxs(asked, where), where),
            case if isinstance(case, str) else "",
        )


def _records(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if Path(path).is_dir():
        return read_narrativeqa(path)
    if is_parquet(path):
        return read_parquet_rows(path)
    if not (start := beginning(path)):
        raise InputError(f"{path}: the file is empty; give a file of questions")
    return read_json_objects(path) if start[0] in "{[" else _tsv_records(path)


def _tsv_records(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Rows of DPR's questions, or of PopQA, whose first line names its columns."""
    columns: list[str] | None = None
    for number, (row, where) in enumerate(read_tsv_rows(path)):
        if number == 0 and {"question", "possible_answers"} <= {*row}:
            columns = row
        elif columns is not None:
            if len(row) != len(columns):
                raise InputError(f"{where}: {len(row)} fields, where the first line names {len(columns)} columns")
            yield dict(zip(columns, row, strict=True)), where
        elif len(row) != 2:
            raise InputError(f"{where}: {len(row)} fields; a line is question<TAB>['answer', ...]")
        else:
            try:
                answers = ast.literal_eval(row[1])
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise InputError(f"{where}: answers have to be a list of strings, as in ['answer', ...]") from error
            yield {"question": row[0], "answers": answers}, where


def write_questions(path: str | Path, questions: Iterable[Question], /, **header: Any) -> None:
    """Write JSON Lines that `read_questions` reads back: a line with format, version and ``header``, then one object
    a question in DPR's result form, its passages in the order given, with rank and, where there are any, rerank score,
    rerank rank and has_answer. ``.gz`` at the end of the name compresses."""
    with _replacing(path) as file:
        file.write(header_line(header))
        for question in questions:
            file.write(question_line(question))


def write_dpr_results(path: str | Path, questions: Iterable[Question]) -> None:
    """Write one JSON list in the form of DPR's result files, question by question; `read_questions` reads it back.

    A passage has ``id, title, text, score`` (a string) and ``has_answer``, and no more if it is where the retriever
    put it and was not reranked; else it has ``rank``, ``rerank_score`` and ``rerank_rank`` as well, which readers of
    DPR's files pass over. ``.gz`` at the end of the name compresses.
    """
    with _replacing(path) as file:
        separator = "[\n"
        for question in questions:
            record = _record(question)
            for position, ctx in enumerate(record["ctxs"], 1):
                ctx["score"] = str(ctx["score"])
                if ctx["rank"] == position:
                    del ctx["rank"]
            file.write(separator + json.dumps(record, ensure_ascii=False))
            separator = ",\n"
        file.write("\n]\n" if separator[0] == "," else "[]\n")


def header_line(header: Mapping[str, Any]) -> str:
    """The first line of a result file: format, version, and ``header``."""
    return json.dumps({"format": RESULTS_FORMAT, "version": RESULTS_VERSION, **header}) + "\n"


def question_line(question: Question) -> str:
    """The line of one question in a result file."""
    return json.dumps(_record(question), ensure_ascii=False) + "\n"


def read_header(path: str | Path) -> dict[str, Any]:
    """What the first line of a result file of ours says beside format and version; nothing of any other file."""
    with open_text(path) as file:
        try:
            header = json.loads(file.readline(HEADER_LIMIT))
        except (json.JSONDecodeError, RecursionError):
            return {}
    if not isinstance(header, dict) or header.pop("format", None) != RESULTS_FORMAT:
        return {}
    header.pop("version", None)
    return header


@contextmanager
def _replacing(path: str | Path) -> Iterator[TextIO]:
    """A text file, compressed if its name ends in ``.gz``, that is there once it is whole."""
    with atomic_file(path) as temporary:
        opener = gzip.open if Path(path).suffix == ".gz" else open
        with cast(TextIO, opener(temporary, "wt", encoding="utf-8")) as file:
            yield file


def by_rerank_score(passages: tuple[RetrievedPassage, ...]) -> tuple[RetrievedPassage, ...]:
    """Passages with their rerank ranks, best first; ties keep their order, as do passages of which one has no score."""
    scores = [passage.rerank_score for passage in passages]
    if None in scores:
        return passages
    order = sorted(passages, key=lambda passage: -(passage.rerank_score or 0.0))
    return tuple(replace(passage, rerank_rank=rank) for rank, passage in enumerate(order, 1))


def passages_from_ctxs(ctxs: Sequence[Mapping[str, Any]], where: str) -> tuple[RetrievedPassage, ...]:
    """The passages of a DPR ``ctxs`` list, in its order, which is their rank where they do not carry one; score 0 where
    there is none.

    Raises:
        InputError: not a list of passages, or a score or rank that is not a number; ``where`` begins the message.
    """
    return tuple(
        RetrievedPassage(
            passage=passage_from_ctx(ctx, ctx_where),
            score=_number(ctx, "score", ctx_where) or 0.0,
            rank=_rank(ctx, "rank", ctx_where) or position,
            rerank_score=_number(ctx, "rerank_score", ctx_where),
            rerank_rank=_rank(ctx, "rerank_rank", ctx_where),
            has_answer=None if ctx.get("has_answer") is None else bool(ctx["has_answer"]),
        )
        for position, (ctx, ctx_where) in enumerate(json_objects(ctxs, f'{where}, "ctxs"'), 1)
    )


def _ctxs(record: Mapping[str, Any], where: str) -> Any:
    """The passages of one question's record, in the form of DPR's ``ctxs``."""
    if "positive_ctxs" in record:
        pools = (("positive_ctxs", True), ("hard_negative_ctxs", False), ("negative_ctxs", None))
        return [
            {**ctx, "has_answer": flag}
            for pool, flag in pools
            for ctx, _ in json_objects(record.get(pool) or (), f'{where}, "{pool}"')
        ]
    if "short_answers" in record and record.get("context"):
        return [{"id": record.get("example_id"), "title": record.get("title"), "text": record["context"]}]
    return record.get("ctxs") or ()


def _question(question: Any, where: str) -> str:
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{where}: a question has to be a string that is not empty, under "question" in JSON')
    check_characters(question, where)
    return question


def _answers(answers: Any, where: str) -> tuple[str, ...]:
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list | tuple) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f'{where}: a question needs a list of answers, strings, under "answers" or "answer" in JSON')
    check_characters("".join(answers), where)
    return tuple(answers)


def _number(ctx: Mapping[str, Any], field: str, where: str) -> float | None:
    value = ctx.get(field)  # DPR writes scores as strings
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f'{where}: "{field}" has to be a number, not {value!r}')
    return number


def _rank(ctx: Mapping[str, Any], field: str, where: str) -> int | None:
    number = _number(ctx, field, where)
    if number is not None and (number < 1 or number != int(number)):
        raise InputError(f'{where}: "{field}" has to be a whole number from 1 up, not {ctx[field]!r}')
    return None if number is None else int(number)


def _record(question: Question) -> dict[str, Any]:
    ctxs = []
    for retrieved in question.passages:
        passage = retrieved.passage
        ctx = {
            "id": passage.id,
            "title": passage.title,
            "text": passage.text,
            "score": retrieved.score,
            "rank": retrieved.rank,
            "rerank_score": retrieved.rerank_score,
            "rerank_rank": retrieved.rerank_rank,
            "has_answer": retrieved.has_answer,
        }
        ctxs.append({key: value for key, value in ctx.items() if value is not None})
    case = {"case": question.case} if question.case else {}
    return {"question": question.question, "answers": list(question.answers), **case, "ctxs": ctxs}
