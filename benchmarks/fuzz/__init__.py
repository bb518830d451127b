"""``python -m benchmarks fuzz``: damaged files for every reader; each must be read, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.row import Row, missed, table, write


@click.command()
@click.option("--seconds", default=30.0, show_default=True, help="Time, shared by the readers.")
@click.option("--reader", "names", multiple=True, help="Only this reader; repeatable.  [default: all]")
@click.option("--seed", type=click.IntRange(0), help="Repeat the one input of --reader that has this seed.")
@click.option("--first", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first input.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write rows, machine and command here.")
@click.pass_context
def fuzz(
    ctx: click.Context, seconds: float, names: tuple[str, ...], seed: int | None, first: int, path: Path | None
) -> None:
    """Damage valid files of every kind that is read, at random, and read them.

    Expected is a result, or an error of one line. Every other input is printed with its reader and seed, and the exit
    status is 1.
    """
    import torch

    from benchmarks.fuzz.readers import READERS
    from benchmarks.fuzz.runs import fuzz as fuzz_reader

    if unknown := [name for name in names if name not in READERS]:
        raise click.BadParameter(f"{unknown[0]}: not one of {', '.join(READERS)}", param_hint="--reader")
    if seed is not None and len(names) != 1:
        raise click.UsageError("--seed is of one reader; give one --reader")
    torch.set_num_threads(1)  # children are forked
    names = names or tuple(READERS)
    inputs = unexpected = 0
    for name in names:
        count = 0
        if seed is None:
            results = fuzz_reader(name, first=first, seconds=seconds / len(names))
        else:
            results = fuzz_reader(name, first=seed, inputs=1)
        for _, finding in results:
            count += 1
            if finding is not None:
                unexpected += 1
                click.echo(str(finding))
        click.echo(f"{name}: {count:,} inputs")
        inputs += count
    rows = [Row("fuzz.inputs", inputs, "inputs"), Row("fuzz.unexpected", unexpected, "inputs", "<= 0")]
    click.echo(table(rows))
    if path is not None:
        write(rows, path)
        click.echo(f"rows: {path}")
    ctx.exit(1 if missed(rows) else 0)
