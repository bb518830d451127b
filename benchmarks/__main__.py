"""``python -m benchmarks NAME [--quick] [--out DIR] [--json FILE]``, and ``python -m benchmarks real-llm SUB``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from benchmarks.options import Options
from benchmarks.row import Row, table, write
from train_cli.main import LazyCommand, MainGroup

ALL = ("training", "retrieval", "experts", "evaluation", "compare")
ON_REQUEST = ("bm25", "forms", "gpu", "real-retrieval", "real-size", "rerankers", "soak", "vllm", "vllm-processes")
"""Not part of `all`: these need hours of training, a data folder, a GPU or vLLM."""


@click.group(
    cls=MainGroup,
    lazy={
        "faults": LazyCommand("benchmarks.faults:faults", "Commands that are killed or interrupted."),
        "fuzz": LazyCommand("benchmarks.fuzz:fuzz", "Damaged files for every reader."),
        "real-llm": LazyCommand("benchmarks.real_llm:real_llm", "Experts in real, pretrained LLMs."),
    },
)
def main() -> None:
    """Run a benchmark and print its rows with their aims."""


def _add(name: str, parts: tuple[str, ...], description: str) -> None:
    @main.command(name, help=description)
    @click.option("--json", "path", type=click.Path(path_type=Path), help="Write rows, machine and command here.")
    @click.option("--quick", is_flag=True, help="A small size, to check that the benchmark runs.")
    @click.option("--out", type=click.Path(path_type=Path), help="Folder to keep intermediate files in, for reuse.")
    @click.option("--data", type=click.Path(path_type=Path), help="real-retrieval: folder with NQ or SQuAD.")
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
