"""Options and steps that ``genpoe retrieve`` and ``genpoe rerank`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from genpoe_plugin.data.questions import FORMATS, Question, read_questions
from genpoe_plugin.errors import InputError

Rerank = Callable[[Iterator[Question]], Iterator[Question]]


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for output and device."""
    form = "Our JSON Lines, or DPR's JSON list; the tasks read both."
    for option in (
        click.option("--device", default="cpu", show_default=True),
        click.option("--format", "form", default="genpoe", show_default=True, type=click.Choice(FORMATS), help=form),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="File of questions with passages."),
    ):
        command = option(command)
    return command


def count_questions(path: Path, with_passages: bool) -> int:
    """Count the questions of a file, and find malformed lines before the long work.

    Raises:
        InputError: the file is malformed, or has no questions (or, if required, no passages).
    """
    questions = passages = 0
    for question in read_questions(path):
        questions += 1
        passages += len(question.passages)
    if not questions:
        raise InputError(f"{path}: no questions")
    if with_passages and not passages:
        raise InputError(f"{path}: no question has passages; add them with `genpoe retrieve`")
    return questions


def reranking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the reranker: how it reads a pair, and how passages are cut for it."""
    format_help = "Format of a decoder-LLM reranker whose checkpoint does not say it: bge, qwen3, or a template file."
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


def make_file(
    questions: Path,
    total: int,
    out: Path,
    form: str,
    work: Rerank,
    header: dict[str, Any],
) -> None:
    """Process the questions of a file with ``work``, write the results to ``out``, and print recall and MRR."""
    from genpoe_plugin.selection.result_files import make_results

    quality = make_results(out, read_questions(questions), work, header, form=form, total=total, progress=True)
    click.echo(quality.table(reranked="reranker" in header))
    click.echo(f"{out}: {total:,} questions")
