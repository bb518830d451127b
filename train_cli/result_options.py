"""Options and steps that ``genpoe retrieve`` and ``genpoe rerank`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from genpoe_plugin.data.questions import FORMATS, Question, read_questions
from genpoe_plugin.data.trec import identified, read_qrels, read_run
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import file_digest

Read = Callable[[], Iterator[Question]]  # reads the questions from the beginning
Rerank = Callable[[Iterator[Question]], Iterator[Question]]


@dataclass(frozen=True)
class Output:
    """What is written and measured.

    Attributes:
        out: the result file.
        form: its format.
        qrels: file with the relevant passages, if not answers decide.
        write_qrels: file to write qrels to.
    """

    out: Path
    form: str
    qrels: Path | None
    write_qrels: Path | None


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for output and device."""
    form = "Our JSON Lines or DPR's JSON list, which the tasks read; or a TREC run."
    qrels = "The relevant passages of each question, as TREC or BEIR write them; they count in place of answers."
    written = "Also write which passages have an answer, as TREC's qrels."
    for option in (
        click.option("--write-qrels", type=click.Path(path_type=Path), help=written),
        click.option("--qrels", type=click.Path(path_type=Path), help=qrels),
        click.option("--device", default="cpu", show_default=True),
        click.option("--format", "form", default="genpoe", show_default=True, type=click.Choice(FORMATS), help=form),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="File of questions with passages."),
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option for the texts of a TREC run."""
    return click.option(
        "--passages", type=click.Path(path_type=Path), help="File with the passages of a TREC run, if not in --index."
    )(command)


def read_file(questions: Path, output: Output) -> Read:
    """A function that reads a file of questions, which need no answers.

    They get ids where those are looked up or written.
    """
    if output.qrels is None and output.write_qrels is None and output.form != "trec":
        return lambda: read_questions(questions, need_answers=False)
    return lambda: identified(read_questions(questions, need_answers=False))


def read_with_run(
    questions: Path, run: Path, index: str | None, passages: Path | None, limit: int | None = None
) -> Read:
    """A function that reads a file of questions with the passages of a TREC run.

    Args:
        questions: the file of questions.
        run: the run.
        index: index with the texts of the passages.
        passages: file with the texts of the passages, in place of an index.
        limit: the largest number of passages per question.

    Raises:
        InputError: a file is malformed, the run has other passages, or there are two sources of texts or none.
    """
    from genpoe_plugin.retrieval.loading import open_passages
    from genpoe_plugin.selection.run_passages import passages_of_run, with_run

    found = read_run(run)
    if index is not None and passages is None:
        texts = passages_of_run(found, open_passages(index), limit)
    elif passages is not None and index is None:
        texts = passages_of_run(found, passages, limit)
    else:
        raise InputError(f"{run}: a run has no texts; give the passages that were searched, by --passages or --index")
    return lambda: with_run(identified(read_questions(questions, need_answers=False)), found, texts, limit)


def count_questions(read: Read, path: Path, with_passages: bool) -> int:
    """Count the questions, and find malformed lines before the long work.

    Raises:
        InputError: the file is malformed, or has no questions (or, if required, no passages).
    """
    questions = passages = 0
    for question in read():
        questions += 1
        passages += len(question.passages)
    if not questions:
        raise InputError(f"{path}: no questions")
    if with_passages and not passages:
        raise InputError(f"{path}: no question has passages; add them with `genpoe retrieve`")
    return questions


def reranking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the reranker: how it reads a pair, and how passages are cut for it."""
    format_help = (
        "Format of a decoder-LLM reranker whose checkpoint does not say it: bge, qwen3, likelihood, or a template file."
    )
    llm_help = "Cut passages for the reranker at 256 tokens of this LLM, as its evaluations do: directory or hub name."
    gguf = click.option(
        "--gguf-file", help="Read the tokenizer from this GGUF file in the LLM's directory or repository."
    )
    return click.option("--reranker-format", help=format_help)(click.option("--llm", help=llm_help)(gguf(command)))


def load_reranker(
    name: str, reranker_format: str | None, llm: str | None, gguf_file: str | None, device: str
) -> tuple[Rerank, dict[str, Any]]:
    """Load a reranker.

    Returns:
        A function that reranks the passages of questions, and the fields that describe it in the results' header.
    """
    from genpoe_plugin.llm.language_model import load_tokenizer
    from genpoe_plugin.selection import rerankers
    from genpoe_plugin.selection.result_files import rerank_all

    if gguf_file is not None and llm is None:
        raise InputError("--gguf-file: the file belongs to the LLM that passages are cut for; give --llm as well")
    tokenizer = None if llm is None else load_tokenizer(llm, gguf_file=gguf_file)
    model = rerankers.load_reranker(name, format=reranker_format, device=device)
    optional = {"reranker_format": reranker_format, "llm": llm, "gguf_file": gguf_file}
    fields = {"reranker": name, "reranker_fingerprint": model.fingerprint}
    fields |= {key: value for key, value in optional.items() if value is not None}
    return lambda questions: rerank_all(questions, model, tokenizer), fields


def make_file(read: Read, total: int, output: Output, work: Rerank, header: dict[str, Any]) -> None:
    """Process the questions with ``work``, write the results, and print recall, MRR and nDCG."""
    from genpoe_plugin.selection.result_files import make_results

    qrels = None
    if output.qrels is not None:
        qrels = read_qrels(output.qrels)
        header = header | {"qrels_sha256": file_digest(output.qrels)}
    quality = make_results(
        output.out,
        read(),
        work,
        header,
        reranks="reranker" in header,
        form=output.form,
        qrels=qrels,
        write_qrels_to=output.write_qrels,
        total=total,
        progress=True,
    )
    click.echo(quality.table(reranked="reranker" in header))
    click.echo(f"{output.out}: {total:,} questions")
