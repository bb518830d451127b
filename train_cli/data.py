"""``genpoe data``: download data, and convert it to training data."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Download data, and convert it to training data."""


@data.command("list")
def list_() -> None:
    """List the resources that can be downloaded, and advice for those that cannot."""
    from genpoe_plugin.data.resources import RESOURCES, UNAVAILABLE

    rows = [("NAME", "WHAT", "LICENCE"), *((row.name, row.what, row.licence) for row in RESOURCES)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kind = None
    for row, resource in zip(rows, [None, *RESOURCES], strict=True):
        if resource is not None and resource.kind != kind:
            click.echo(f"\n{resource.kind}")
            kind = resource.kind
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("\nnot available")
    for name, advice in UNAVAILABLE.items():
        click.echo(f"{name}: {advice}")


@data.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--out", default="downloads", show_default=True, type=click.Path(path_type=Path), help="Folder.")
def download(names: tuple[str, ...], out: Path) -> None:
    """Download resource NAME, or all resources whose names begin with NAME.

    `genpoe data list` shows the names. Rerun the same command to resume.
    """
    from genpoe_plugin.data.resources import fetch, find, left_out

    resources = {resource.name: resource for name in names for resource in find(name)}
    try:
        for resource in resources.values():
            path, is_new = fetch(resource, out, progress=True)
            state = f"{path.stat().st_size:,} bytes" if is_new else "already downloaded"
            click.echo(f"{path}: {state}; {resource.what}; licence: {resource.licence}")
    except KeyboardInterrupt:
        click.echo("downloaded data is saved; rerun the same command to resume", err=True)
        raise
    for advice in dict.fromkeys(advice for name in names for advice in left_out(name)):
        click.echo(f"not downloaded: {advice}")


@data.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON lines of query, pos, neg and prompt.")
@click.option("--negatives", default=32, show_default=True, help="Maximum passages without an answer per question.")
@click.option("--min-negatives", type=int, help="Leave out questions that have fewer.  [default: --negatives]")
@click.option("--random-negatives", is_flag=True, help="Fill up with random passages of other questions.")
@click.option("--seed", default=0, show_default=True, help="Random seed for the negatives.")
@click.option("--prompt", help="Prompt of the reranker, about query A and passage B.  [default: BGE's]")
def reranker(
    results: tuple[Path, ...],
    out: Path,
    negatives: int,
    min_negatives: int | None,
    random_negatives: bool,
    seed: int,
    prompt: str | None,
) -> None:
    """Convert retrieval RESULTS (DPR's JSON, or JSON lines; .gz too) to training data for the reranker."""
    from genpoe_plugin.selection.reranking import DEFAULT_PROMPT
    from genpoe_plugin.training.reranker_data import write_reranker_data

    least = negatives if min_negatives is None else min_negatives
    counts = write_reranker_data(
        results,
        out,
        negatives=negatives,
        min_negatives=least,
        random_negatives=random_negatives,
        seed=seed,
        prompt=prompt or DEFAULT_PROMPT,
    )
    click.echo(
        f"{out}: {counts.written:,} of {counts.questions:,} questions "
        f"({counts.without_positive:,} have no passage with an answer, "
        f"{counts.too_few_negatives:,} fewer than {least} without)"
    )


@data.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of questions with passages.")
def join(parts: tuple[Path, ...], out: Path) -> None:
    """Join the files of `genpoe rerank --part`, in any order, to the file that one process would have written."""
    from genpoe_plugin.selection.parts import join_parts

    count = join_parts(parts, out)
    click.echo(f"{out}: {count:,} questions of {len(parts)} parts")


@data.command()
@click.option(
    "--questions", required=True, type=click.Path(path_type=Path), help="Questions with passages, any format."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON lines for genpoe_conflict; .gz too.")
@click.option("--seed", default=0, show_default=True, help="Random seed for the new answers.")
def conflicts(questions: Path, out: Path, seed: int) -> None:
    """Replace answers in passages by those of other questions, for the task genpoe_conflict."""
    from genpoe_plugin.data.conflicts import write_conflicts

    counts = write_conflicts(questions, out, seed=seed)
    click.echo(
        f"{out}: {counts.written:,} of {counts.questions:,} questions ({counts.without_answer:,} have no passage with "
        f"an answer that can be replaced, {counts.without_replacement:,} no other answer of their type and popularity)"
    )
