"""``genpoe data``: making training data."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Make training data."""


@data.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON lines of query, pos, neg and prompt.")
@click.option("--negatives", default=32, show_default=True, help="Passages without an answer, at most, per question.")
@click.option("--min-negatives", default=1, show_default=True, help="Leave out questions that have fewer.")
@click.option("--random-negatives", is_flag=True, help="Fill up with passages of other questions.")
@click.option("--seed", default=0, show_default=True, help="Of the random negatives.")
@click.option("--prompt", help="Question that the reranker is asked about query A and passage B.  [default: BGE's]")
def reranker(
    results: tuple[Path, ...],
    out: Path,
    negatives: int,
    min_negatives: int,
    random_negatives: bool,
    seed: int,
    prompt: str | None,
) -> None:
    """Turn retrieval RESULTS (DPR's JSON, or JSON lines; .gz too) into training data for the reranker."""
    from genpoe_plugin.reranking import DEFAULT_PROMPT
    from genpoe_plugin.training.reranker_data import write_reranker_data

    counts = write_reranker_data(
        results,
        out,
        negatives=negatives,
        min_negatives=min_negatives,
        random_negatives=random_negatives,
        seed=seed,
        prompt=prompt or DEFAULT_PROMPT,
    )
    click.echo(
        f"{out}: {counts.written:,} of {counts.questions:,} questions "
        f"({counts.without_positive:,} have no passage with an answer, "
        f"{counts.too_few_negatives:,} fewer than {min_negatives} without)"
    )
