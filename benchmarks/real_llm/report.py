"""``real-llm report``: join the studies of several LLMs into one document."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from benchmarks.real_llm.ladder import LADDER
from benchmarks.real_llm.ladder_section import ladder_section
from benchmarks.real_llm.output import FOLDER, TABLE
from benchmarks.real_llm.questions import DISTRACTORS
from benchmarks.real_llm.rows import MEANINGS
from benchmarks.real_llm.section import section
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file

INTRODUCTION = f"""# Experts in real LLMs

Made by `python -m benchmarks real-llm table` and `real-llm study` for each LLM, and joined by `real-llm report`. The
LLMs are frozen, except in rows with a LoRA adapter. Experts are untrained unless a section says otherwise: they are the
keys and values of a passage's tokens in some of the LLM's own attention layers.

- **Questions** are samples of NQ-open and SQuAD v1.1, each with one passage that has the answer. Distractors are the
  {DISTRACTORS} passages without an answer that MiniLM ranks first, among the passages of the whole data set.
- **EM, F1, contains** score the generated answer, in %. **nats** is minus the log-likelihood of the first accepted
  answer, per token: lower is better. 95 % intervals are in brackets; n is the number of questions.
- **recovered** is the recovered fraction, (row - closed_book) / (rag - closed_book): 0 is closed-book answering, 1 is
  the passage in the prompt. It is "not known" where the interval of the prompt's own gain contains 0.
- **Differences** are paired, over the questions of both rows: points of EM and F1, and nats.
- **Layers** compares all sets of layers over the same questions. Bytes are those of keys and values in 16 bits.

| row | meaning |
|---|---|
"""


@click.command()
@click.argument("studies", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The Markdown file.")
def report(studies: tuple[Path, ...], out: Path) -> None:
    """Join STUDIES, the folders of `real-llm table` and `real-llm study`.

    Plots are copied to the folder `real` beside the file.
    """
    found = [_read(folder) for folder in studies]
    names = [study["llm"] + (", trained" if "lora_rank" in study else "") for study in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two studies of {twice[0]}; give only one of them")
    for folder in studies:
        for picture in sorted((folder / FOLDER).glob("*.png")):
            with atomic_file(out.parent / FOLDER / picture.name) as temporary:
                shutil.copyfile(picture, temporary)
    meanings = "".join(f"| {name} | {meaning} |\n" for name, meaning in MEANINGS.items())
    with atomic_file(out) as temporary:
        temporary.write_text("\n".join([INTRODUCTION + meanings, *map(_section, found)]), encoding="utf-8")
    click.echo(f"written: {out}")


def _section(study: dict) -> str:
    return ladder_section(study) if "lora_rank" in study else section(study)


def _read(folder: Path) -> dict:
    name = LADDER if (folder / LADDER).is_file() else TABLE
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no study ({name} cannot be read); run `real-llm table` to make one") from error
