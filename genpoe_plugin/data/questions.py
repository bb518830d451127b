"""Questions with answers and retrieved passages, and readers and writers for their files."""

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

FORMATS = ("genpoe", "dpr", "trec")  # output formats of retrieval results
HEADER_LIMIT = 1 << 16  # characters; a longer first line is a question or a whole JSON list


@dataclass(frozen=True, slots=True)
class RetrievedPassage:
    """A passage with the scores and ranks of retriever and reranker.

    Attributes:
        passage: the passage.
        score: retrieval score.
        rank: rank in the retriever's order, from 1.
        rerank_score: the reranker's score, if it was reranked.
        rerank_rank: rank in the reranker's order, from 1, if it was reranked.
        has_answer: whether it contains an answer to its question; None if unknown.
    """

    passage: Passage
    score: float
    rank: int
    rerank_score: float | None = None
    rerank_rank: int | None = None
    has_answer: bool | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question.

    Attributes:
        question: the question.
        answers: all accepted answers.
        passages: its passages, best first.
        case: name that all wordings of one question share, or empty. The case counts as answered if one wording is
            answered.
        id: id in its file, or empty.
        original_answers: in a conflict set, the answers that its passages do not state any more; else empty.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[RetrievedPassage, ...] = ()
    case: str = ""
    id: str = ""
    original_answers: tuple[str, ...] = ()


def read_questions(path: str | Path, *, need_answers: bool = True) -> Iterator[Question]:
    """Read questions one by one, in file order, from any of these formats, each also as ``.gz``.

    - DPR results, as one JSON list or as JSON Lines: ``{"question", "answers", "ctxs": [...]}``;
    - files of `write_questions`;
    - DPR's ``*.qas.csv`` or ``.tsv``: ``question<TAB>['answer', ...]``;
    - nq_open: JSON Lines of ``{"question", "answer": [...]}``;
    - DPR's training data for retrievers, a JSON list of ``{"question", "answers", "positive_ctxs": [...],
      "negative_ctxs": [...], "hard_negative_ctxs": [...]}``: positives first, then the hard negatives;
    - DPR's gold passages, ``{"data": [{"question", "short_answers", "example_id", "title", "context"}]}``; a question
      may have no passage (an empty ``context``), and questions without a short answer are skipped;
    - the authors' files of SQuAD (v1.1, v2.0), HotpotQA, 2WikiMultihopQA and MQuAKE (JSON) and of PopQA (TSV), with
      their passages, if any (`genpoe_plugin.data.question_forms`);
    - BEIR's ``queries.jsonl``: ``{"_id", "text"}``, which have no answers;
    - rows of the hub's data sets (`genpoe_plugin.data.hub_questions`), as JSON Lines or as a Parquet file;
    - the authors' folder of NarrativeQA (a clone of deepmind/narrativeqa): the test questions, with the summaries.

    The format is detected from the content. Questions are read one at a time.

    Args:
        path: the file or folder.
        need_answers: whether a question without answers is an error.

    Raises:
        InputError: a line is malformed, a question has no text or no answers, or the file has another version.
    """
    for record, where in _records(path):
        yield from questions_from_record(record, where, need_answers=need_answers)


def questions_from_record(record: Mapping[str, Any], where: str, *, need_answers: bool = True) -> Iterator[Question]:
    """The questions of one JSON object in any form of `read_questions`.

    Args:
        record: the JSON object.
        where: location of the object, for error messages.
        need_answers: whether a question without answers is an error.

    Raises:
        InputError: a question has no text, no answers, or malformed passages.
    """
    for item in to_dpr(record, where):
        answers = next((item[field] for field in ("answers", "answer", "short_answers") if field in item), None)
        if answers == [] and "short_answers" in item:
            continue  # not every question of NQ has a short answer
        case, identifier = item.get("case"), item.get("id")
        check_characters("".join(name for name in (case, identifier) if isinstance(name, str)), where)
        yield Question(
            _question(item.get("question"), where),
            () if not answers and not need_answers else _answers(answers, where),
            passages_from_ctxs(_ctxs(item, where), where),
            case if isinstance(case, str) else "",
            str(identifier) if isinstance(identifier, str | int) else "",
            _answers(originals, where) if (originals := item.get("original_answers")) else (),
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
    """The rows of DPR's questions, or of PopQA, whose first line has the column names."""
    columns: list[str] | None = None
    for number, (row, where) in enumerate(read_tsv_rows(path)):
        if number == 0 and {"question", "possible_answers"} <= {*row}:
            columns = row
        elif columns is not None:
            if len(row) != len(columns):
                raise InputError(f"{where}: {len(row)} fields, but the first line has {len(columns)} columns")
            yield dict(zip(columns, row, strict=True)), where
        elif len(row) != 2:
            raise InputError(f"{where}: {len(row)} fields; a line must be question<TAB>['answer', ...]")
        else:
            try:
                answers = ast.literal_eval(row[1])
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise InputError(f"{where}: answers must be a list of strings, as in ['answer', ...]") from error
            yield {"question": row[0], "answers": answers}, where


def write_questions(path: str | Path, questions: Iterable[Question], /, **header: Any) -> None:
    """Write questions as JSON Lines that `read_questions` reads.

    The first line is a header with format, version and ``header``. Each other line is a question in DPR's result form;
    its passages keep their order and have rank and, if known, rerank score, rerank rank and has_answer.

    Args:
        path: the file; a name that ends in ``.gz`` compresses it.
        questions: the questions.
        header: further fields of the header line.
    """
    with replacing(path) as file:
        file.write(header_line(header))
        for question in questions:
            file.write(question_line(question))


def write_dpr_results(path: str | Path, questions: Iterable[Question]) -> None:
    """Write questions as a JSON list in the form of DPR's result files, which `read_questions` reads.

    A passage has ``id, title, text, score`` (a string) and ``has_answer``. It also has ``rank`` if its position is not
    its rank, and ``rerank_score`` and ``rerank_rank`` if it was reranked; readers of DPR's files ignore these fields. A
    name that ends in ``.gz`` compresses the file.
    """
    with replacing(path) as file:
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
    """The header of our result files, without format and version; empty for other files."""
    with open_text(path) as file:
        try:
            header = json.loads(file.readline(HEADER_LIMIT))
        except (ValueError, RecursionError):
            return {}
    if not isinstance(header, dict) or header.pop("format", None) != RESULTS_FORMAT:
        return {}
    header.pop("version", None)
    return header


@contextmanager
def replacing(path: str | Path) -> Iterator[TextIO]:
    """Open a text file for atomic writing, compressed if its name ends in ``.gz``."""
    with atomic_file(path) as temporary:
        opener = gzip.open if Path(path).suffix == ".gz" else open
        with cast(TextIO, opener(temporary, "wt", encoding="utf-8")) as file:
            yield file


def by_rerank_score(passages: tuple[RetrievedPassage, ...]) -> tuple[RetrievedPassage, ...]:
    """Sort passages by rerank score, best first, and set their rerank ranks; ties keep their order.

    If one of the passages has no score, all are returned unchanged.
    """
    scores = [passage.rerank_score for passage in passages]
    if None in scores:
        return passages
    order = sorted(passages, key=lambda passage: -(passage.rerank_score or 0.0))
    return tuple(replace(passage, rerank_rank=rank) for rank, passage in enumerate(order, 1))


def passages_from_ctxs(ctxs: Sequence[Mapping[str, Any]], where: str) -> tuple[RetrievedPassage, ...]:
    """The passages of a DPR ``ctxs`` list, in its order.

    A missing rank is the position in the list; a missing score is 0.

    Args:
        ctxs: the list.
        where: location of the list, for error messages.

    Raises:
        InputError: it is not a list of passages, or a score or rank is not a number.
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
    """The passages in the record of one question, in the form of DPR's ``ctxs``."""
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
        raise InputError(f'{where}: a question must be a non-empty string, under "question" in JSON')
    check_characters(question, where)
    return question


def _answers(answers: Any, where: str) -> tuple[str, ...]:
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list | tuple) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f'{where}: a question needs a list of answer strings, under "answers" or "answer" in JSON')
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
        raise InputError(f'{where}: "{field}" must be a number, not {value!r}')
    return number


def _rank(ctx: Mapping[str, Any], field: str, where: str) -> int | None:
    number = _number(ctx, field, where)
    if number is not None and (number < 1 or number != int(number)):
        raise InputError(f'{where}: "{field}" must be a whole number from 1 on, not {ctx[field]!r}')
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
    more = {"case": question.case, "original_answers": list(question.original_answers)}
    more = {key: value for key, value in more.items() if value}
    identifier = {"id": question.id} if question.id else {}
    return {**identifier, "question": question.question, "answers": list(question.answers), **more, "ctxs": ctxs}
