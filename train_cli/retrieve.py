"""``genpoe retrieve``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from genpoe_plugin.data.questions import Question
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import file_digest
from train_cli.result_options import count_questions, load_reranker, make_file, reranking_options, result_options


@click.command()
@click.option("--index", required=True, type=click.Path(path_type=Path), help="Directory that `genpoe index` wrote.")
@click.option("--questions", required=True, type=click.Path(path_type=Path), help="DPR results or qas, nq_open; .gz.")
@click.option("--num-retrieved", default=20, show_default=True, type=click.IntRange(1), help="Passages per question.")
@click.option("--reranker", help="Reranker for the passages: directory or hub name.")
@click.option("--encoder", help="Encoder of the index, if its path has changed.")
@reranking_options
@result_options
def retrieve(
    index: Path,
    questions: Path,
    num_retrieved: int,
    reranker: str | None,
    encoder: str | None,
    reranker_format: str | None,
    llm: str | None,
    gguf_file: str | None,
    out: Path,
    form: str,
    device: str,
) -> None:
    """Retrieve passages for QUESTIONS ahead of time, and print recall and MRR.

    Rerun the same command to resume.
    """
    from genpoe_plugin.retrieval.retriever import Retriever
    from genpoe_plugin.selection.result_files import retrieve_all

    if reranker_format and not reranker:
        raise InputError("--reranker-format: there is no reranker; give --reranker as well")
    if (llm or gguf_file) and not reranker:
        raise InputError(
            f"{'--llm' if llm else '--gguf-file'}: passages are cut for a reranker; give --reranker as well"
        )
    total = count_questions(questions, with_passages=False)
    retriever = Retriever.load(index, device=device, encoder=encoder)
    rerank, reranker_fields = (
        load_reranker(reranker, reranker_format, llm, gguf_file, device) if reranker else (None, {})
    )

    def work(remaining: Iterator[Question]) -> Iterator[Question]:
        retrieved = retrieve_all(remaining, retriever, num_retrieved)
        return rerank(retrieved) if rerank else retrieved

    header = {
        "questions_sha256": file_digest(questions),
        "index": retriever.fingerprint,
        "encoder": retriever.encoder.name,
        "num_retrieved": num_retrieved,
        **reranker_fields,
    }
    make_file(questions, total, out, form, work, header)
