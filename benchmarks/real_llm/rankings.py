"""``python -m benchmarks real-llm rankings``: MRR of several rankings of the same questions, and their differences."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from genpoe_plugin.comparison.statistics import bootstrap_means, paired_bootstrap
from genpoe_plugin.data.questions import Question, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.measures import Judged, mean_reciprocal_rank


class NamedFile(click.ParamType):
    """A file with a name before it: ``NAME=FILE``."""

    name = "name=file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            self.fail(f"{value!r} is not NAME=FILE, such as bm25=nq-bm25.jsonl", param, ctx)
        return name, Path(path)


@click.command()
@click.argument("files", nargs=-1, required=True, type=NamedFile())
@click.option("--at", default=10, show_default=True, type=click.IntRange(1), help="Number of passages that count.")
def rankings(files: tuple[tuple[str, Path], ...], at: int) -> None:
    """Compute MRR of rankings of the same questions, each NAME=FILE.

    A FILE is a result of `genpoe retrieve` or `genpoe rerank`. Files of the same name are joined, such as those of two
    data sets. A passage is relevant if it is marked `has_answer`. The last ranking is compared with each other one by a
    paired bootstrap over questions. Its best possible order puts a relevant passage first wherever it has one.
    """
    ranks: dict[str, list[float]] = {}
    asked: dict[str, list[str]] = {}
    for name, path in files:
        for question in read_questions(path):
            ranks.setdefault(name, []).append(reciprocal_rank(question, at, path))
            asked.setdefault(name, []).append(question.question)
    names = list(dict.fromkeys(name for name, _ in files))
    texts = asked.get(names[0], [])
    if different := [name for name in names if asked.get(name, []) != texts]:
        raise InputError(f"{different[0]}: has other questions than {names[0]}, or another order")
    if not texts:
        raise InputError("no questions in the files")
    scores = np.array([ranks[name] for name in names]).T
    last = len(names) - 1
    means = scores.mean(0)
    compared = paired_bootstrap(
        means,
        bootstrap_means(scores),
        np.array([(last, other) for other in range(last)], int).reshape(-1, 2),
        len(texts),
    )
    click.echo(f"| ranking | MRR@{at} of {len(texts)} questions | {names[last]} minus it | p |")
    click.echo("| --- | --- | --- | --- |")
    for column, name in enumerate(names[:last]):
        low, high = compared.low[column], compared.high[column]
        difference = f"{compared.difference[column]:+.3f} ({low:+.3f} to {high:+.3f})"
        click.echo(f"| {name} | {means[column]:.3f} | {difference} | {compared.p[column]:.3f} |")
    click.echo(f"| {names[last]} | {means[last]:.3f} | | |")
    click.echo(f"| {names[last]}, best possible order | {np.mean(scores[:, last] > 0):.3f} | | |")


def reciprocal_rank(question: Question, at: int, path: Path) -> float:
    """1 / rank of the first passage with an answer; 0 if none of the first ``at`` has one.

    Raises:
        InputError: a passage is not marked.
    """
    marks = [entry.has_answer for entry in question.passages[:at]]
    if None in marks:
        raise InputError(f"{path}: {question.question!r} has passages without has_answer; `genpoe retrieve` marks them")
    return mean_reciprocal_rank([Judged.by_answers(marks)])
