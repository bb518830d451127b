"""``python -m benchmarks real-llm gates``: the temperature of the gates with the most likely answers."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from benchmarks.real_llm.measures import Paired, mean
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.model import GenPoEModel


class Temperatures(click.ParamType):
    """Numbers above 0 with commas between them."""

    name = "numbers"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} is not numbers above 0 with commas between them, such as 0.5,1,2", param, ctx)
        return numbers


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, help="Checkpoint of experts for it.")
@click.option(
    "--questions",
    "file",
    required=True,
    type=click.Path(path_type=Path),
    help="Questions with retrieved or reranked passages, which are not those of the evaluation.",
)
@click.option("--num-passages", "count", default=4, show_default=True, type=click.IntRange(2), help="Passages each.")
@click.option("--temperatures", default="0.5,1,2,4", show_default=True, type=Temperatures(), metavar="T,...")
@click.option("--skip", default=0, show_default=True, type=click.IntRange(0), help="Leave out the first questions.")
@click.option("--limit", default=120, show_default=True, type=click.IntRange(2), help="Number of questions.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions per batch.")
@click.option("--device", default="cpu", show_default=True, help="Device of the LLM.")
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the LLM.")
def gates(
    llm: str,
    hypernetwork: str,
    file: Path,
    count: int,
    temperatures: tuple[float, ...],
    skip: int,
    limit: int,
    batch_size: int,
    device: str,
    dtype: str,
) -> None:
    """Compare temperatures of the gates by the likelihood of the right answers.

    Gates are the softmax of the reranker's scores, or else of the retriever's, over each temperature. Rows with one
    passage and with equal gates are for comparison. Use questions of the training side.
    """
    questions = [question for question in read_questions(file) if len(question.passages) >= count][skip:][:limit]
    if not questions:
        raise InputError(f"{file}: no question after the first {skip} has {count} passages")
    model = GenPoEModel.from_pretrained(llm, hypernetwork, device=device, dtype=dtype)
    scores = [
        [entry.score if entry.rerank_score is None else entry.rerank_score for entry in question.passages[:count]]
        for question in questions
    ]
    rows = {"one passage": [(1.0,)] * len(questions), "equal": [(1 / count,) * count] * len(questions)}
    rows |= {f"{temperature:g}": GenPoEModel.gates(scores, temperature) for temperature in temperatures}
    answers = [question.answers[0] for question in questions]
    tokens = [len(model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for answer in answers]
    columns = []
    for row in tqdm(rows.values(), desc="Scoring answers"):
        passages = [[entry.passage.string for entry in q.passages[: len(row[0])]] for q in questions]
        found = model.score([q.question for q in questions], answers, passages, row, batch_size=batch_size)
        columns.append(-np.array(found) / np.array(tokens))
    matrix = Paired(np.stack(columns, axis=1))
    click.echo(
        f"| gates of {count} passages | nats per token of the answer, {len(questions)} questions | minus one passage |"
    )
    click.echo("| --- | --- | --- |")
    for column, name in enumerate(rows):
        value = mean(columns[column], share=False)
        difference = matrix.difference(column, 0)
        against = f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})" if column else ""
        click.echo(f"| {name} | {value.value:.3f} ({value.low:.3f} to {value.high:.3f}) | {against} |")
