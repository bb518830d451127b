"""``python -m benchmarks NAME [--quick] [--out DIR] [--json FILE]``, and ``python -m benchmarks real-llm COMMAND``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

from benchmarks.options import Options
from benchmarks.real_llm.main import real_llm
from benchmarks.row import Row, table, write
from genpoe_plugin.errors import InputError

ALL = ("training", "retrieval", "experts", "evaluation", "compare")
ON_REQUEST = ("forms", "real-retrieval", "vllm")
"""Not among `all`: trainings that take a night, data that the user has to name, an environment with vLLM."""


@click.command()
@click.argument("name", type=click.Choice([*ALL, *ON_REQUEST, "all"]))
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows, the machine and the command.")
@click.option("--quick", is_flag=True, help="A size for a few minutes; what it says is no more than that it runs.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep what is made here, and use what is there.")
@click.option("--data", type=click.Path(path_type=Path), help="real-retrieval: folder of NQ gold passages or SQuAD.")
@click.option("--reranker", help="real-retrieval: directory or hub name of a trained reranker.")
def main(name: str, path: Path | None, quick: bool, out: Path | None, data: Path | None, reranker: str | None) -> None:
    """Measure NAME and print its rows, each with its aim."""
    options = Options(quick, out, data, reranker)
    rows: list[Row] = []
    for chosen in ALL if name == "all" else (name,):
        try:
            rows += import_module(f"benchmarks.{chosen.replace('-', '_')}").measure(options)
        except InputError as error:
            raise click.ClickException(str(error)) from error
    click.echo(table(rows))
    if path is not None:
        write(rows, path)
        click.echo(f"rows: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["real-llm"]:
        real_llm(sys.argv[2:], prog_name="python -m benchmarks real-llm")
    main(prog_name="python -m benchmarks")
