"""``genpoe index``: building and describing passage indexes."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def index() -> None:
    """Build or describe a passage index."""


@index.command()
@click.option("--passages", required=True, type=click.Path(path_type=Path), help="TSV, JSON lines or DPR results; .gz.")
@click.option(
    "--encoder",
    required=True,
    help="sentence-transformers model, or a DPR pair as QUESTION_ENCODER,CONTEXT_ENCODER; directories or hub names.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the index.")
@click.option("--factory", default="Flat", show_default=True, help="FAISS factory string; Flat is exact search.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Passages encoded at once.")
@click.option("--device", default="cpu", show_default=True)
def build(passages: Path, encoder: str, out: Path, factory: str, batch_size: int, device: str) -> None:
    """Encode PASSAGES and write an index that can be searched."""
    from genpoe_plugin.passages import read_passages
    from genpoe_plugin.retrieval.encoder import load_encoder
    from genpoe_plugin.retrieval.index import PassageIndex

    # Read once before the long work: it finds malformed lines, and how much there is to do.
    total = sum(1 for _ in read_passages(passages))
    model = load_encoder(encoder, device=device, batch_size=batch_size)
    built = PassageIndex.build(read_passages(passages), model, out, factory=factory, total=total)
    click.echo(f"{out}: {len(built):,} passages, {built.dimension} dimensions, {factory}")


@index.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
def info(directory: Path, verify: bool) -> None:
    """Describe the index in DIRECTORY."""
    from genpoe_plugin.retrieval.index import PassageIndex

    opened = PassageIndex.load(directory)
    if verify:
        opened.verify()
    click.echo(f"passages     {len(opened):,}")
    click.echo(f"dimensions   {opened.dimension}")
    click.echo(f"factory      {opened.manifest['factory']}")
    click.echo(f"encoder      {opened.encoder_name}")
    click.echo(f"fingerprint  {opened.encoder_fingerprint}")
    for name, file in opened.manifest["files"].items():
        click.echo(f"{name:<16} {file['bytes']:,} bytes{', verified' if verify else ''}")
