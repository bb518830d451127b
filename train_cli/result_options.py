"""What ``genpoe retrieve`` and ``genpoe rerank`` share: their options, and the way from one file to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from genpoe_plugin.data.questions import FORMATS, Question, read_questions
from genpoe_plugin.errors import InputError

Rerank = Callable[[Iterator[Question]], Iterator[Question]]


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands."""
    form = "Our JSON Lines, or DPR's JSON list; the tasks read both."
    for option in (
        click.option("--device", default="cpu", show_default=True),
        click.option("--format", "form", default="genpoe", show_default=True, type=click.Choice(FORMATS), help=form),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="File of questions with passages."),
    ):
        command = option(command)
    return command


def count_questions(path: Path, with_passages: bool) -> int:
    """Read once before the long work: it finds malformed lines, and how much there is to do."""
    questions = passages = 0
    for question in read_questions(path):
        questions += 1
        passages += len(question.passages)
    if not questions:
        raise InputError(f"{path}: no questions")
    if with_passages and not passages:
        raise InputError(f"{path}: no question has passages; find some with `genpoe retrieve`")
    return questions


def reranking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What else is said of a reranker."""
    told = "Cut passages for the reranker at 256 tokens of this LLM, as its evaluations do: directory or hub name."
    gguf = click.option("--gguf-file", help="The GGUF file, in that directory or repository, that has its tokenizer.")
    return click.option("--llm", help=told)(gguf(command))


def load_reranker(name: str, llm: str | None, gguf_file: str | None, device: str) -> tuple[Rerank, dict[str, Any]]:
    """What puts questions' passages in order, and what the header of the results says of it."""
    from genpoe_plugin.llm.language_model import load_tokenizer
    from genpoe_plugin.selection.reranking import Reranker
    from genpoe_plugin.selection.result_files import rerank_all

    if gguf_file is not None and llm is None:
        raise InputError("--gguf-file: it is a file of the LLM that passages are cut for; give --llm as well")
    tokenizer = None if llm is None else load_tokenizer(llm, gguf_file=gguf_file)
    model = Reranker.load(name, device=device)
    optional = {"llm": llm, "gguf_file": gguf_file}
    said = {"reranker": name, "reranker_fingerprint": model.fingerprint}
    said |= {key: value for key, value in optional.items() if value is not None}
    return lambda questions: rerank_all(questions, model, tokenizer), said


def make_file(
    asked: Path,
    total: int,
    out: Path,
    form: str,
    work: Rerank,
    header: dict[str, Any],
) -> None:
    """Do the work on a file's questions, write what comes out, and print how good it is."""
    from genpoe_plugin.selection.result_files import make_results

    quality = make_results(out, read_questions(asked), work, header, form=form, total=total, progress=True)
    click.echo(quality.table(reranked="reranker" in header))
    click.echo(f"{out}: {total:,} questions")
