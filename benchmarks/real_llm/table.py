"""The command ``real-llm table``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from benchmarks.real_llm.layers import Shape, read_layers
from benchmarks.real_llm.output import SECTION, write_study
from benchmarks.real_llm.questions import find_files
from benchmarks.real_llm.study import Study
from genpoe_plugin.errors import InputError


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option(
    "--layers-file",
    required=True,
    type=click.Path(path_type=Path),
    help="calibration.csv of a checkpoint, or JSON.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of the study.")
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="Folder with NQ and SQuAD.")
@click.option("--questions", multiple=True, metavar="NAME=FILE", help="File of questions for nq or squad; repeatable.")
@click.option("--limit", default=500, show_default=True, type=click.IntRange(2), help="Questions per data set.")
@click.option(
    "--limit-curve",
    type=click.IntRange(2),
    help="Questions per data set in rows on layers, distractors and retrieval.  [default: --limit]",
)
@click.option(
    "--limit-nats", type=click.IntRange(2), help="Questions per data set for likelihoods.  [default: --limit]"
)
@click.option("--rows", metavar="NAME,...", help="Run only these rows, in this order.  [default: all]")
@click.option(
    "--dtype", default="auto", show_default=True, help="Dtype of the LLM: auto, float32, bfloat16 or float16."
)
@click.option("--device", help="Device of the LLM.  [default: lm_eval's]")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1))
@click.option("--max-tokens", default=16, show_default=True, type=click.IntRange(1), help="Maximum tokens per answer.")
@click.option("--expert-gb", default=2.0, show_default=True, help="Gigabytes of memory for experts.")
@click.option("--store/--no-store", default=True, show_default=True, help="Also store experts on disk.")
@click.option(
    "--heads",
    type=click.Path(path_type=Path, file_okay=False),
    help="Checkpoint of `genpoe experts create --heads`; adds the row genpoe_heads.",
)
def table(
    llm: str,
    layers_file: Path,
    out: Path,
    data: Path | None,
    questions: tuple[str, ...],
    limit: int,
    limit_curve: int | None,
    limit_nats: int | None,
    rows: str | None,
    dtype: str,
    device: str | None,
    batch_size: int,
    max_tokens: int,
    expert_gb: float,
    store: bool,
    heads: Path | None,
) -> None:
    """Evaluate one LLM in every mode, with controls, distractors and sets of layers. Each row is a run of lm_eval.

    Finished rows in --out are not repeated, and the table has all of them. Rerun the same command to resume.
    """
    shape = Shape.of(llm)
    study = Study.from_options(
        llm,
        out,
        files=find_files(data, questions),
        sets=read_layers(layers_file, shape.depth),
        shape=shape,
        limit=limit,
        limit_curve=limit_curve,
        limit_nats=limit_nats,
        dtype=dtype,
        batch_size=batch_size,
        max_tokens=max_tokens,
        device=device,
        expert_gb=expert_gb,
        store=store,
        heads=None if heads is None else heads.resolve(),
    )
    selected = study.select_rows(rows)
    study.prepare()
    failed = []
    for number, row in enumerate(selected, 1):
        click.echo(f"{row.name} ({number} of {len(selected)})")
        try:
            study.run(row)
        except InputError as error:  # the other rows still run
            click.echo(f"failed: {error}", err=True)
            failed.append(row.name)
    write_study(study, _command(study, layers_file))
    click.echo(f"written: {out / SECTION}")
    if failed:
        raise InputError(f"failed: {', '.join(failed)}; rerun the same command to resume")


def _command(study: Study, layers_file: Path) -> str:
    """The command that reproduces the study, with names instead of local paths."""
    words = ["python", "-m", "benchmarks", "real-llm", "table", "--llm", Path(study.llm).name]
    words += ["--layers-file", layers_file.name, "--data", "DATA", "--out", study.out.name]
    words += [] if study.heads is None else ["--heads", study.heads.name]
    words += ["--limit", str(study.limit), "--limit-curve", str(study.limit_curve)]
    words += ["--limit-nats", str(study.limit_nats), "--dtype", study.dtype]
    words += ["--batch-size", str(study.batch_size), "--max-tokens", str(study.max_tokens)]
    return shlex.join(words + (["--device", study.device] if study.device else []))
