"""``genpoe rerank``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from genpoe_plugin.data.questions import read_header
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import file_digest
from genpoe_plugin.selection.parts import Part
from train_cli.result_options import (
    Output,
    count_questions,
    load_reranker,
    make_file,
    read_file,
    read_with_run,
    reranking_options,
    result_options,
    run_options,
)


class PartType(click.ParamType):
    """A part such as ``2/4``."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        if isinstance(value, Part):
            return value
        try:
            return Part.parse(value)
        except ValueError:
            self.fail(f"{value!r} is not a part such as 2/4, the second of four", param, ctx)


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--reranker", required=True, help="Directory or hub name.")
@click.option("--questions", type=click.Path(path_type=Path), help="The questions of RESULTS, if those are a TREC run.")
@click.option("--index", help="Index with the passages of a TREC run.")
@click.option(
    "--part",
    type=PartType(),
    help="Rerank only this part, such as 2/4; `genpoe data join` joins the files of all parts.",
)
@run_options
@reranking_options
@result_options
def rerank(
    results: Path,
    reranker: str,
    questions: Path | None,
    index: str | None,
    part: Part | None,
    passages: Path | None,
    reranker_format: str | None,
    llm: str | None,
    gguf_file: str | None,
    out: Path,
    form: str,
    qrels: Path | None,
    write_qrels: Path | None,
    device: str,
) -> None:
    """Rerank the passages of RESULTS, and print recall, MRR and nDCG before and after.

    RESULTS are files of `genpoe retrieve` or of DPR, or a TREC run, also as .gz. Rerun the same command to resume.
    """
    output = Output(out, form, qrels, write_qrels)
    if part is not None and form != "genpoe":
        raise InputError(f"--part: only files of --format genpoe can be joined, not {form}")
    if part is not None and write_qrels is not None:
        raise InputError("--write-qrels: not with --part, which has a part of the questions alone")
    header: dict[str, Any] = {"results_sha256": file_digest(results)}
    if questions is not None:
        read = read_with_run(questions, results, index, passages)
        header |= {"questions_sha256": file_digest(questions)}
    elif index is not None or passages is not None:
        raise InputError(
            f"{'--passages' if index is None else '--index'}: for the texts of a TREC run; give its --questions as well"
        )
    else:
        read = read_file(results, output)
        header = read_header(results) | header
    total = count_questions(read, results, with_passages=True)
    if part is not None:
        whole, header["part"] = read, str(part)
        total = sum(1 for _ in part.questions(whole))
        read = lambda: part.questions(whole)  # noqa: E731
    work, reranker_fields = load_reranker(reranker, reranker_format, llm, gguf_file, device)
    make_file(read, total, output, work, header | reranker_fields)
