"""``python -m experiments.demo_models``."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.demo_models import models


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the LLM and the encoder.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def main(out: Path, seed: int) -> None:
    """Train the LLM and the encoder of the demo's world again (they come with the package): about half an hour."""
    models.pretrain_llm(out / "llm", seed)
    models.pretrain_encoder(out / "encoder", out / "llm", seed)
    click.echo(f"{out}: pretrained LLM and encoder")


if __name__ == "__main__":
    main(prog_name="python -m experiments.demo_models")
