"""``python -m benchmarks NAME [--json FILE]``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from benchmarks.row import Row, table, write

NAMES = ("training",)


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "all"]))
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows, the machine and the command.")
def main(name: str, path: Path | None) -> None:
    """Measure NAME and print its rows, each with its aim."""
    rows: list[Row] = []
    for module in NAMES if name == "all" else (name,):
        rows += import_module(f"benchmarks.{module}").measure()
    click.echo(table(rows))
    if path is not None:
        write(rows, path)
        click.echo(f"rows: {path}")


main(prog_name="python -m benchmarks")
