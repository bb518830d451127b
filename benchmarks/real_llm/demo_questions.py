"""``python -m benchmarks real-llm demo-questions``: the questions of `genpoe demo`, taken from a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.real_llm.questions import SETS, file_of
from genpoe_plugin.data.questions import Question, read_questions, write_questions

RETRIEVED = 4
"""Passages per question, besides the question's own passage if none of them has an answer."""


@click.command("demo-questions")
@click.option("--study", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of a study.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON Lines file to write.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="Questions of each data set.")
def demo_questions(study: Path, out: Path, limit: int) -> None:
    """Write the first questions of each data set of a study, with their retrieved passages."""
    questions = []
    for name in SETS:
        gold, ranked = (list(read_questions(file_of(study, name, purpose)))[:limit] for purpose in ("gold", "ranked"))
        questions += [with_own(*pair) for pair in zip(ranked, gold, strict=True)]
    write_questions(out, questions)
    click.echo(f"{out}: {len(questions)} questions")


def with_own(ranked: Question, gold: Question) -> Question:
    """The first retrieved passages, followed by the question's own passage if none of them has an answer."""
    first = ranked.passages[:RETRIEVED]
    if any(entry.has_answer for entry in first):
        return replace(ranked, passages=first)
    return replace(ranked, passages=(*first, replace(gold.passages[0], rank=RETRIEVED + 1, score=None)))
