"""``genpoe rerank``."""

from __future__ import annotations

from pathlib import Path

import click

from genpoe_plugin.data.questions import read_header
from genpoe_plugin.files import file_digest
from train_cli.result_options import count_questions, load_reranker, make_file, reranking_options, result_options


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--reranker", required=True, help="Directory or hub name.")
@reranking_options
@result_options
def rerank(
    results: Path,
    reranker: str,
    reranker_format: str | None,
    llm: str | None,
    gguf_file: str | None,
    out: Path,
    form: str,
    device: str,
) -> None:
    """Rerank the passages of RESULTS, and print recall and MRR before and after.

    RESULTS are files of `genpoe retrieve` or of DPR, also as .gz. Rerun the same command to resume.
    """
    total = count_questions(results, with_passages=True)
    work, reranker_fields = load_reranker(reranker, reranker_format, llm, gguf_file, device)
    header = read_header(results) | {"results_sha256": file_digest(results)} | reranker_fields
    make_file(results, total, out, form, work, header)
