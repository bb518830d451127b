"""``python -m benchmarks real-llm router``: the share of the router's mass on the passage with the answer."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from benchmarks.real_llm.measures import mean
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.model import GenPoEModel


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, help="Checkpoint of experts in the LLM's attention.")
@click.option(
    "--questions",
    "files",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="File of questions; repeatable.",
)
@click.option("--num-passages", default=4, show_default=True, type=click.IntRange(2), help="Passages per question.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="Questions per file.")
@click.option("--device", default="cpu", show_default=True, help="Device of the LLM.")
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the LLM.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the shares of all questions to this file.")
def router(
    llm: str,
    hypernetwork: str,
    files: tuple[Path, ...],
    num_passages: int,
    limit: int,
    device: str,
    dtype: str,
    out: Path | None,
) -> None:
    """Measure how much of the attention on experts goes to the passage with the answer.

    All passages have equal gates, so only the LLM's attention tells them apart. Only questions with exactly one passage
    marked `has_answer` are used.
    """
    model = GenPoEModel.from_pretrained(llm, hypernetwork, device=device, dtype=dtype)
    right, experts, first = [], [], []
    for file in files:
        questions = [question for question, _ in zip(read_questions(file), range(limit), strict=False)]
        for question in tqdm(questions, desc=f"Weighing {file.name}"):
            passages = question.passages[:num_passages]
            marks = [bool(entry.has_answer) for entry in passages]
            if len(marks) < num_passages or sum(marks) != 1:
                continue
            (masses,) = model.router_mass([question.question], [[entry.passage.string for entry in passages]])
            own = masses[marks.index(True)]
            right.append(own / sum(masses))
            experts.append(sum(masses))
            first.append(own == max(masses))
    if not right:
        raise InputError(
            f"none of the questions has {num_passages} passages of which exactly one is marked `has_answer`"
        )
    share = mean(np.array(right), share=False)
    click.echo(
        f"{len(right)} questions, {num_passages} passages: the passage with the answer has {share.value:.3f} "
        f"({share.low:.3f} to {share.high:.3f}) of the attention on experts, by chance {1 / num_passages:.3f}, and the "
        f"largest share in {np.mean(first):.1%} of the questions. Experts have {np.mean(experts):.3f} of the softmax."
    )
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps({"right": right, "experts": experts}) + "\n", encoding="utf-8")
