"""``real-llm study``: the command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.real_llm.ladder import LADDER, Ladder, cells, write_ladder
from benchmarks.real_llm.layers import Layers, Shape
from benchmarks.real_llm.questions import find_files
from benchmarks.real_llm.study import Study
from genpoe_plugin.errors import InputError
from genpoe_plugin.training.arguments import HypernetworkTraining
from train_cli.layers import Layers as LayersType

TRAINING = ("nq_qed.train*.jsonl*", "squad_v1_train_44articles.train*.jsonl*")
"""Of the folder of data; none of their questions or articles is in the files of `table`."""


class Seeds(click.ParamType):
    """Whole numbers with commas between them."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        numbers = str(value).split(",")
        if not all(number.isdecimal() for number in numbers):
            self.fail(f"{value!r} is not a list of seeds such as 0,1,2", param, ctx)
        return tuple(map(int, numbers))


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--layers", required=True, type=LayersType(), help="Of the experts, such as 5,11,12.")
@click.option("--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="NQ and SQuAD.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of the study.")
@click.option("--cells", "names", metavar="NAME,...", help="Only these trainings now, in this order.  [default: all]")
@click.option("--seeds", default="0", show_default=True, type=Seeds(), help="One training for each.")
@click.option("--steps", default=200, show_default=True, type=click.IntRange(1))
@click.option("--train-batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions a step.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--lora-rank", default=16, show_default=True, type=click.IntRange(1), help="Of RAG's adapter.")
@click.option("--limit", default=500, show_default=True, type=click.IntRange(2), help="Questions of each data set.")
@click.option("--limit-controls", type=click.IntRange(2), help="In controls.  [default: all]")
@click.option("--limit-nats", type=click.IntRange(2), help="Where likelihoods are scored.  [default: all]")
@click.option("--dtype", default="float32", show_default=True, help="Of the LLM.")
@click.option("--device", default="cpu", show_default=True, help="Of the LLM.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions asked at a time.")
@click.option("--max-tokens", default=16, show_default=True, type=click.IntRange(1), help="Of an answer.")
def study(
    llm: str,
    layers: Layers,
    data: Path,
    out: Path,
    names: str | None,
    seeds: tuple[int, ...],
    steps: int,
    train_batch_size: int,
    learning_rate: float,
    lora_rank: int,
    limit: int,
    limit_controls: int | None,
    limit_nats: int | None,
    dtype: str,
    device: str,
    batch_size: int,
    max_tokens: int,
) -> None:
    """Train experts of an LLM in several forms, and an adapter of RAG, and ask all of them the same questions.

    Trainings and rows that --out has already are not run again.
    """
    training = tuple(found[0] for pattern in TRAINING if (found := sorted(data.rglob(pattern))))
    if not training:
        raise InputError(f"{data}: none of {' and '.join(TRAINING)} to train on")
    base = Study.asked(
        llm,
        out,
        files=find_files(data, ()),
        sets={len(layers): layers},
        shape=Shape.of(llm),
        limit=limit,
        limit_curve=limit_controls,
        limit_nats=limit_nats,
        dtype=dtype,
        batch_size=batch_size,
        max_tokens=max_tokens,
        device=device,
    )
    arguments = HypernetworkTraining(max_steps=steps, batch_size=train_batch_size, learning_rate=learning_rate)
    ladder = Ladder(base, layers, training, arguments, lora_rank)
    known = {cell.name: cell for cell in cells(layers)}
    wanted = list(known) if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"--cells {unknown[0]}: not one of {', '.join(known)}")
    base.prepare()
    ladder.write_data()
    failed = []
    for row in ladder.base_rows():
        base.run(row)
    for seed in seeds:
        for name in wanted:
            click.echo(f"{name}, seed {seed}")
            try:
                ladder.train(known[name], seed)
                for row in ladder.rows(known[name], seed):
                    base.run(row)
            except InputError as error:  # it keeps no other cell from being run
                click.echo(f"failed: {error}", err=True)
                failed.append(name)
            write_ladder(ladder, _command(ladder, seeds))
    click.echo(f"written: {out / LADDER}")
    if failed:
        raise InputError(f"failed: {', '.join(failed)}; the same command goes on with what is missing")


def _command(ladder: Ladder, seeds: Sequence[int]) -> str:
    study, arguments = ladder.study, ladder.arguments
    words = ["python", "-m", "benchmarks", "real-llm", "study", "--llm", Path(study.llm).name, "--data", "DATA"]
    words += ["--layers", ",".join(map(str, ladder.layers)), "--out", study.out.name]
    words += ["--seeds", ",".join(map(str, seeds)), "--steps", str(arguments.max_steps)]
    words += ["--train-batch-size", str(arguments.batch_size), "--learning-rate", str(arguments.learning_rate)]
    words += ["--lora-rank", str(ladder.lora_rank), "--dtype", study.dtype, "--device", str(study.device)]
    words += [
        "--batch-size",
        str(study.batch_size),
        "--limit",
        str(study.limit),
        "--limit-controls",
        str(study.limit_curve),
    ]
    return shlex.join([*words, "--limit-nats", str(study.limit_nats), "--max-tokens", str(study.max_tokens)])
