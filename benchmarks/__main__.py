"""``python -m benchmarks NAME [--quick] [--out DIR] [--json FILE]``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from benchmarks.options import Options
from benchmarks.row import Row, table, write

NAMES = ("training", "forms")


@click.command()
@click.argument("name", type=click.Choice([*NAMES, "all"]))
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows, the machine and the command.")
@click.option("--quick", is_flag=True, help="A size for a few minutes; what it says is no more than that it runs.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep what is made here, and use what is there.")
def main(name: str, path: Path | None, quick: bool, out: Path | None) -> None:
    """Measure NAME and print its rows, each with its aim."""
    rows: list[Row] = []
    for module in NAMES if name == "all" else (name,):
        rows += import_module(f"benchmarks.{module}").measure(Options(quick, out))
    click.echo(table(rows))
    if path is not None:
        write(rows, path)
        click.echo(f"rows: {path}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
