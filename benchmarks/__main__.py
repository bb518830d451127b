"""``python -m benchmarks NAME [--quick] [--out DIR] [--json FILE]``, and ``python -m benchmarks real-llm SUB``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from benchmarks.options import Options
from benchmarks.row import Row, table, write
from train_cli.main import LazyCommand, MainGroup

ALL = ("training", "retrieval", "experts", "evaluation", "compare")
ON_REQUEST = ("bm25", "forms", "real-retrieval", "real-size", "vllm")
"""Not among `all`: trainings that take a night, data that the user has to name, a GPU, an environment with vLLM."""


@click.group(
    cls=MainGroup,
    lazy={"real-llm": LazyCommand("benchmarks.real_llm:real_llm", "Small pretrained LLMs that Python packages carry.")},
)
def main() -> None:
    """Measure something and print its rows, each with its aim."""


def _add(name: str, parts: tuple[str, ...], told: str) -> None:
    @main.command(name, help=told)
    @click.option("--json", "path", type=click.Path(path_type=Path), help="Write rows, machine and command.")
    @click.option("--quick", is_flag=True, help="A size for a few minutes; what it says is no more than that it runs.")
    @click.option("--out", type=click.Path(path_type=Path), help="Keep what is made here, and use what is there.")
    @click.option("--data", type=click.Path(path_type=Path), help="real-retrieval: folder of NQ or SQuAD.")
    @click.option("--reranker", help="real-retrieval: directory or hub name of a trained reranker.")
    def measure(path: Path | None, quick: bool, out: Path | None, data: Path | None, reranker: str | None) -> None:
        options = Options(quick, out, data, reranker)
        rows: list[Row] = []
        for part in parts:
            rows += import_module(f"benchmarks.{part.replace('-', '_')}").measure(options)
        click.echo(table(rows))
        if path is not None:
            write(rows, path)
            click.echo(f"rows: {path}")


for _name in (*ALL, *ON_REQUEST):
    _add(_name, (_name,), f"Measure {_name}.")
_add("all", ALL, f"Measure {', '.join(ALL)}.")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
