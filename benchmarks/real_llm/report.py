"""``real-llm report``: the studies of several LLMs as one document."""

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

Made by `python -m benchmarks real-llm table` for each LLM, and `real-llm report`. No LLM was changed, and nothing was
trained: a passage's experts are the keys and values of its tokens in some of the LLM's own attention layers.

- **Questions** are a sample of NQ-open and of SQuAD v1.1, each with one passage that has the answer. Distractors are
  the {DISTRACTORS} passages that MiniLM finds first among those of the whole data set that have no answer.
- **EM, F1, contains** are of the answer that the LLM writes, in %. **nats** is minus the log-likelihood of the first
  accepted answer, for each of its tokens: less is better. Brackets have 95 % intervals; n is the number of questions.
- **recovered** is how much of what the passage in the prompt gains the experts gain as well,
  (row - closed_book) / (rag - closed_book): 0 is the LLM alone, 1 the passage in the prompt. It is not known where the
  prompt itself does not gain for certain.
- **Differences** are over the same questions in both rows: points of EM and F1, and nats.
- **Layers**: all sets of layers over the same questions. Bytes are those of keys and values in 16 bits.

| row | what it is given |
|---|---|
"""


@click.command()
@click.argument("studies", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The Markdown file.")
def report(studies: tuple[Path, ...], out: Path) -> None:
    """Join STUDIES, folders that `real-llm table` wrote; pictures go into the folder `real` beside the file."""
    found = [_read(folder) for folder in studies]
    names = [study["llm"] + (", trained" if "lora_rank" in study else "") for study in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two studies of {twice[0]}; give one")
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
        raise InputError(f"{folder}: no study ({name} cannot be read); `real-llm table` makes one") from error
