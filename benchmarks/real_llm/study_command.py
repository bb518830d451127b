"""The command ``real-llm study``."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import click

from benchmarks.real_llm.ladder import LADDER, Cell, Ladder, write_ladder
from benchmarks.real_llm.layers import Layers, Shape
from benchmarks.real_llm.questions import find_files
from benchmarks.real_llm.rows import StudyRow
from benchmarks.real_llm.study import Study
from genpoe_plugin.errors import InputError
from genpoe_plugin.training.training_arguments import HypernetworkTraining
from train_cli.layers import Layers as LayersType

TRAINING = ("nq_qed.train*.jsonl*", "squad_v1_train_44articles.train*.jsonl*")
"""Files of training questions in the data folder. They share no questions and no articles with the files of `table`."""

PASSAGES = "wikipedia_paragraphs*.jsonl*"
"""File of passages in the data folder, for pretraining."""


class Seeds(click.ParamType):
    """Comma-separated integers."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        numbers = str(value).split(",")
        if not all(number.isdecimal() for number in numbers):
            self.fail(f"{value!r} is not a list of seeds such as 0,1,2", param, ctx)
        return tuple(map(int, numbers))


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--layers", required=True, type=LayersType(), help="Layers with experts, such as 5,11,12.")
@click.option("--more-layers", type=LayersType(), help="Layers of additional cells with more layers.")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder with NQ and SQuAD."
)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of the study.")
@click.option("--cells", "names", metavar="NAME,...", help="Run only these trainings, in this order.  [default: all]")
@click.option(
    "--seeds", default="0", show_default=True, type=Seeds(), help="Seeds; each cell is trained once per seed."
)
@click.option("--steps", default=200, show_default=True, type=click.IntRange(1))
@click.option("--train-batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions per step.")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--lora-rank", default=16, show_default=True, type=click.IntRange(1), help="Rank of RAG's adapter.")
@click.option("--limit", default=500, show_default=True, type=click.IntRange(2), help="Questions per data set.")
@click.option(
    "--limit-controls", type=click.IntRange(2), help="Questions per data set in controls.  [default: --limit]"
)
@click.option(
    "--limit-nats", type=click.IntRange(2), help="Questions per data set for likelihoods.  [default: --limit]"
)
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the LLM.")
@click.option("--device", default="cpu", show_default=True, help="Device of the LLM.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Batch size of evaluations.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Trainings and rows in parallel.")
@click.option("--store/--no-store", default=True, show_default=True, help="Also store experts on disk.")
@click.option("--max-tokens", default=16, show_default=True, type=click.IntRange(1), help="Maximum tokens per answer.")
def study(
    llm: str,
    layers: Layers,
    more_layers: Layers | None,
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
    jobs: int,
    store: bool,
    max_tokens: int,
) -> None:
    """Train experts of several forms and an adapter for RAG, and evaluate them on the same questions.

    Finished trainings and rows in --out are not repeated. Rerun the same command to resume.
    """
    training = tuple(found[0] for pattern in TRAINING if (found := sorted(data.rglob(pattern))))
    if not training:
        raise InputError(f"{data}: no training questions; put {' or '.join(TRAINING)} there")
    base = Study.from_options(
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
        store=store,
        device=device,
    )
    arguments = HypernetworkTraining(max_steps=steps, batch_size=train_batch_size, learning_rate=learning_rate)
    passages = sorted(data.rglob(PASSAGES))
    ladder = Ladder(
        base, layers, training, arguments, lora_rank, more_layers, passages[0] if passages else None, jobs=jobs
    )
    known = {cell.name: cell for cell in ladder.cells}
    wanted = list(known) if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"--cells {unknown[0]}: not one of {', '.join(known)}")
    base.prepare()
    ladder.write_data()
    base.create()
    failed = run_ladder(ladder, [(known[name], seed) for seed in seeds for name in wanted])
    write_ladder(ladder, _command(ladder, seeds))
    click.echo(f"written: {out / LADDER}")
    if failed:
        raise InputError(f"failed: {', '.join(failed)}; rerun the same command to resume")


def run_ladder(ladder: Ladder, trainings: Sequence[tuple[Cell, int]]) -> list[str]:
    """Run trainings and rows, ``ladder.jobs`` in parallel. The rows of a training start when it has ended.

    Trainings start first, since they take longest. The others continue when one fails.

    Returns:
        The names of failed trainings and rows.
    """
    ready: deque[StudyRow | tuple[Cell, int]] = deque([*trainings, *ladder.base_rows()])
    running: dict[Future, StudyRow | tuple[Cell, int]] = {}
    failed = []
    with ThreadPoolExecutor(ladder.jobs) as pool:
        try:
            while ready or running:
                while ready and len(running) < ladder.jobs:
                    job = ready.popleft()
                    click.echo(_name(job))
                    if isinstance(job, StudyRow):
                        running[pool.submit(ladder.study.run, job, ladder.jobs)] = job
                    else:
                        running[pool.submit(ladder.train, *job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        future.result()
                    except InputError as error:
                        click.echo(f"failed: {error}", err=True)
                        failed.append(_name(job))
                        continue
                    if not isinstance(job, StudyRow):
                        ready.extendleft(reversed(ladder.rows(*job)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _name(job: StudyRow | tuple[Cell, int]) -> str:
    return job.name if isinstance(job, StudyRow) else f"{job[0].name}-{job[1]}, training"


def _command(ladder: Ladder, seeds: Sequence[int]) -> str:
    study, arguments = ladder.study, ladder.arguments
    words = ["python", "-m", "benchmarks", "real-llm", "study", "--llm", Path(study.llm).name, "--data", "DATA"]
    words += ["--layers", ",".join(map(str, ladder.layers)), "--out", study.out.name]
    if ladder.more_layers is not None:
        words += ["--more-layers", ",".join(map(str, ladder.more_layers))]
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
