"""``genpoe retrieve``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from genpoe_plugin.data.questions import Question
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import file_digest
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


@click.command()
@click.option("--index", help="Directory that `genpoe index` wrote, or several as A+B.")
@click.option(
    "--run", type=click.Path(path_type=Path), help="TREC run with the passages of the questions, instead of a search."
)
@run_options
@click.option(
    "--questions", required=True, type=click.Path(path_type=Path), help="DPR results or qas, nq_open, BEIR; .gz."
)
@click.option("--num-retrieved", default=20, show_default=True, type=click.IntRange(1), help="Passages per question.")
@click.option("--reranker", help="Reranker for the passages: directory or hub name.")
@click.option("--encoder", help="Encoder of the index, if its path has changed.")
@reranking_options
@result_options
def retrieve(
    index: str | None,
    run: Path | None,
    passages: Path | None,
    questions: Path,
    num_retrieved: int,
    reranker: str | None,
    encoder: str | None,
    reranker_format: str | None,
    llm: str | None,
    gguf_file: str | None,
    out: Path,
    form: str,
    qrels: Path | None,
    write_qrels: Path | None,
    device: str,
) -> None:
    """Retrieve passages for QUESTIONS ahead of time, and print recall, MRR and nDCG.

    Rerun the same command to resume.
    """
    from genpoe_plugin.selection.result_files import labelled, retrieve_all

    if reranker_format and not reranker:
        raise InputError("--reranker-format: there is no reranker; give --reranker as well")
    if (llm or gguf_file) and not reranker:
        raise InputError(
            f"{'--llm' if llm else '--gguf-file'}: passages are cut for a reranker; give --reranker as well"
        )
    output = Output(out, form, qrels, write_qrels)
    header = {"questions_sha256": file_digest(questions), "num_retrieved": num_retrieved}
    if run is not None:
        if encoder is not None:
            raise InputError("--encoder: nothing is encoded for a --run; leave it out")
        read = read_with_run(questions, run, index, passages, num_retrieved)
        total = count_questions(read, questions, with_passages=True)
        header |= {"run_sha256": file_digest(run)}

        def found(remaining: Iterator[Question]) -> Iterator[Question]:
            return map(labelled, remaining)
    else:
        from genpoe_plugin.retrieval.loading import load_retriever

        if index is None:
            raise InputError("give --index to search, or --run with the passages that another system found")
        if passages is not None:
            raise InputError("--passages: for the texts of a --run; an index has its own")
        read = read_file(questions, output)
        total = count_questions(read, questions, with_passages=False)
        retriever = load_retriever(index, device=device, encoder=encoder)
        header |= {"index": retriever.fingerprint, "retriever": retriever.name}

        def found(remaining: Iterator[Question]) -> Iterator[Question]:
            return retrieve_all(remaining, retriever, num_retrieved)

    rerank, reranker_fields = (
        load_reranker(reranker, reranker_format, llm, gguf_file, device) if reranker else (None, {})
    )

    def work(remaining: Iterator[Question]) -> Iterator[Question]:
        return rerank(found(remaining)) if rerank else found(remaining)

    make_file(read, total, output, work, header | reranker_fields)
