"""``genpoe retrieve``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from genpoe_plugin.questions import Question

RECALL_AT = (1, 5, 20)


@click.command()
@click.option("--index", required=True, type=click.Path(path_type=Path), help="Directory that `genpoe index` wrote.")
@click.option("--questions", required=True, type=click.Path(path_type=Path), help="DPR results or qas, nq_open; .gz.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON lines of questions with passages.")
@click.option("--num-retrieved", default=20, show_default=True, type=click.IntRange(1), help="Passages per question.")
@click.option("--reranker", help="Decoder-LLM reranker that puts them in order: directory or hub name.")
@click.option("--encoder", help="The index's encoder, where it has moved since.")
@click.option("--device", default="cpu", show_default=True)
def retrieve(
    index: Path,
    questions: Path,
    out: Path,
    num_retrieved: int,
    reranker: str | None,
    encoder: str | None,
    device: str,
) -> None:
    """Retrieve passages for QUESTIONS, ahead of time, and say how many questions find an answer."""
    from genpoe_plugin.answers import has_answer
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.questions import read_questions, write_questions
    from genpoe_plugin.retrieval.retriever import Retriever

    asked = list(read_questions(questions))
    if not asked:
        raise InputError(f"{questions}: no questions")
    retriever = Retriever.load(index, device=device, encoder=encoder)
    found = retriever.retrieve([question.question for question in asked], num_retrieved, progress=True)
    results = [
        replace(
            question,
            passages=tuple(replace(item, has_answer=has_answer(item.passage.text, question.answers)) for item in items),
        )
        for question, items in zip(asked, found, strict=True)
    ]
    click.echo(_recall("retrieved", results, num_retrieved))
    header = {"index": retriever.fingerprint, "encoder": retriever.encoder.name, "num_retrieved": num_retrieved}
    if reranker:
        from genpoe_plugin.reranking import Reranker, rerank

        model = Reranker.load(reranker, device=device)
        results = rerank(results, model, progress=True)
        click.echo(_recall("reranked", results, num_retrieved))
        header |= {"reranker": reranker, "reranker_fingerprint": model.fingerprint}
    write_questions(out, results, **header)
    click.echo(f"{out}: {len(results):,} questions")


def _recall(name: str, questions: list[Question], num_retrieved: int) -> str:
    """The share of questions with an answer among their first k passages, for each k that was looked at."""
    shares = []
    for k in (k for k in RECALL_AT if k <= num_retrieved):
        hits = sum(any(item.has_answer for item in question.passages[:k]) for question in questions)
        shares.append(f"recall@{k} {hits / len(questions):.4f}")
    return f"{name:<10} {'  '.join(shares)}"
