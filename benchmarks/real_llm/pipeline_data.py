"""The corpus of the pipeline study, its questions, and the passages that are retrieved for them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.real_llm.commands import run_genpoe
from benchmarks.real_llm.questions import sample
from benchmarks.real_retrieval import NQ, SQUAD, encoder_name
from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage, passage_from_ctx, read_json_objects, read_passages
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.prompts import normalise_question

RETRIEVED = 20
"""Retrieved passages per question."""
RETRIEVERS = ("dense", "bm25", "hybrid")
SEED = 0
PARAGRAPHS = "wikipedia_paragraphs*.jsonl*"
WITH_PASSAGES = (
    *(NQ, SQUAD, "nq_qed.train*.jsonl*", "squad_v1_train_44articles.train*.jsonl*"),
    *("hotpotqa_distractor.dev*.jsonl*", "2wiki.dev*.jsonl*", "musique_hipporag.train*.jsonl*"),
    *("hotpotqa_amor100.train*.jsonl*", "hotpotqa_hipporag.train*.jsonl*", "2wiki_migres.train*.jsonl*"),
)
"""Files of the data folder whose questions have passages. All these passages go into the corpus."""


@dataclass(frozen=True)
class DataSet:
    """A data set of the study.

    Attributes:
        task: its task in lm_eval.
        pattern: pattern of its file in the data folder.
        max_questions: maximum number of questions to retrieve for.
        answerable: evaluate only questions with an answer among the retrieved passages, because the corpus was not
            made for this data set.
        hops: a question needs two passages, which its file marks.
    """

    task: str
    pattern: str
    max_questions: int
    answerable: bool = False
    hops: bool = False


DATA_SETS = {
    "nq": DataSet("genpoe_nq", NQ, 1_000),
    "squad": DataSet("genpoe_squad", SQUAD, 1_000),
    "tqa": DataSet("genpoe_tqa", "dpr-trivia.dev*", 4_000, answerable=True),
    "hotpotqa": DataSet("genpoe_hotpotqa", "hotpotqa_distractor.dev*.jsonl*", 600, hops=True),
    "2wiki": DataSet("genpoe_2wiki", "2wiki.dev*.jsonl*", 300, hops=True),
}


def file_in(data: Path, pattern: str) -> Path:
    """The first file of that pattern in a folder.

    Raises:
        InputError: there is none.
    """
    found = sorted(data.rglob(pattern))
    if not found:
        raise InputError(f"{data}: no {pattern} in it")
    return found[0]


def write_corpus(data: Path, path: Path) -> None:
    """All different passages of the folder, as TSV like DPR's psgs_w100, unless the file is there."""
    if path.is_file():
        return
    seen: dict[tuple[str, str], None] = {}
    for pattern in WITH_PASSAGES:
        for question in read_questions(file_in(data, pattern)):
            for entry in question.passages:
                seen.setdefault((_line(entry.passage.title), _line(entry.passage.text)))
    for passage in read_passages(file_in(data, PARAGRAPHS)):
        seen.setdefault((_line(passage.title), _line(passage.text)))
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", "text", "title"))
        writer.writerows((number, text, title) for number, (title, text) in enumerate(seen, 1))


def _line(text: str) -> str:
    return " ".join(text.split())


def retrieve(data: Path, out: Path, retriever: str, names: Sequence[str], encoder: str | None, device: str) -> None:
    """Build the index over the corpus and retrieve for all questions, by the commands that users have.

    Args:
        data: data folder.
        out: folder of the corpus, the indexes and the retrieved passages.
        retriever: one of `RETRIEVERS`.
        names: data sets.
        encoder: directory of the sentence encoder of ``dense``; all-MiniLM-L6-v2 by default.
        device: device of the encoder.
    """
    corpus, places = out / "corpus.tsv", {"dense": out / "index", "bm25": out / "bm25"}
    write_corpus(data, corpus)
    parts = ("dense", "bm25") if retriever == "hybrid" else (retriever,)
    for part in parts:
        if places[part].is_dir():
            continue
        build = ("index", "build", "--passages", corpus, "--out", places[part])
        if part == "dense":
            options = ("--encoder", encoder or encoder_name(), "--shards", out / "shards", "--factory", "Flat")
            run_genpoe(*build, *options, "--device", device)
        else:
            run_genpoe(*build, "--retriever", part)
    index = "+".join(str(places[part]) for part in parts)
    for name in names:
        data_set = DATA_SETS[name]
        source, found = out / f"{name}.questions.jsonl", retrieved_file(out, name, retriever)
        if not source.is_file():
            write_questions(source, _bare(read_questions(file_in(data, data_set.pattern)), data_set.max_questions))
        if not found.is_file():
            command = ("retrieve", "--index", index, "--questions", source, "--out", found)
            run_genpoe(*command, "--num-retrieved", str(RETRIEVED), "--device", device)


def retrieved_file(out: Path, name: str, retriever: str) -> Path:
    """The file of the questions of a data set with the passages that ``retriever`` found."""
    return out / f"{name}.{retriever}.jsonl"


def _bare(questions: Iterator[Question], count: int) -> list[Question]:
    """``count`` distinct questions at most, sampled with `SEED`, without passages."""
    distinct = {normalise_question(question.question).casefold(): question for question in questions}
    return [Question(question.question, question.answers) for question in sample(list(distinct.values()), count, SEED)]


def rerank(out: Path, names: Sequence[str], reranker: str, format: str | None, device: str) -> dict[str, Path]:
    """Rerank the retrieved passages of the evaluated questions, by the command that users have.

    Args:
        out: folder that `write_evaluated` wrote.
        names: data sets.
        reranker: directory or hub name.
        format: its format; None if its checkpoint says it.
        device: device of the reranker.

    Returns:
        The file of each data set that has questions.
    """
    files = {}
    for name in names:
        source, found = (evaluated_file(out, name, kind) for kind in ("retrieved", "reranked"))
        if not source.is_file():
            continue
        command = ("rerank", source, "--reranker", reranker, "--out", found, "--device", device)
        run_genpoe(*command, *(("--reranker-format", format) if format else ()))
        files[name] = found
    return files


def evaluated_file(out: Path, name: str, purpose: str) -> Path:
    """The file of the questions of a data set that lm_eval reads."""
    return out / "questions" / f"{name}.{purpose}.jsonl"


def write_evaluated(
    data: Path,
    retrieval: Path,
    out: Path,
    retriever: str,
    names: Sequence[str],
    limit: int,
    num_retrieved: int = RETRIEVED,
) -> None:
    """Write the files that lm_eval reads, with at most ``limit`` questions of each data set.

    The files of ``retrieved`` have the retrieved passages. Those of ``hops`` and ``reversed`` have multi-hop questions
    with the two passages that they need, in the order of the data set and in the other one.

    Args:
        data: data folder.
        retrieval: folder that `retrieve` wrote.
        out: folder of the runs. Files of other data sets or of another limit in it are replaced.
        retriever: one of `RETRIEVERS`.
        names: data sets to evaluate.
        limit: maximum number of questions of each data set.
        num_retrieved: passages of each question.
    """
    for name, data_set in DATA_SETS.items():
        questions = [
            replace(question, passages=question.passages[:num_retrieved])
            for question in (read_questions(retrieved_file(retrieval, name, retriever)) if name in names else ())
            if not data_set.answerable or any(entry.has_answer for entry in question.passages)
        ][:limit]
        _write(evaluated_file(out, name, "retrieved"), questions)
        if data_set.hops:
            needed = needed_passages(file_in(data, data_set.pattern))
            pairs = [(question, needed.get(question.question, ())) for question in questions]
            both = [(question, passages) for question, passages in pairs if len(passages) == 2]
            _write(evaluated_file(out, name, "hops"), [_with(*pair) for pair in both])
            _write(evaluated_file(out, name, "reversed"), [_with(question, pair[::-1]) for question, pair in both])


def _write(path: Path, questions: Sequence[Question]) -> None:
    path.unlink(missing_ok=True)
    if questions:  # lm_eval refuses a task without questions
        path.parent.mkdir(parents=True, exist_ok=True)
        write_questions(path, questions)


def needed_passages(path: Path) -> dict[str, tuple[Passage, ...]]:
    """The passages that a file marks as ``gold``, by question."""
    return {
        row["question"]: tuple(passage_from_ctx(ctx, where) for ctx in row["ctxs"] if ctx.get("gold"))
        for row, where in read_json_objects(path)
    }


def _with(question: Question, passages: Sequence[Passage]) -> Question:
    entries = tuple(
        RetrievedPassage(passage, 0.0, rank, has_answer=has_answer(passage.text, question.answers))
        for rank, passage in enumerate(passages, 1)
    )
    return replace(question, passages=entries)
