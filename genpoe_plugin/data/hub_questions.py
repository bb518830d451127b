"""Read questions from data sets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from genpoe_plugin.data.questions import Question, questions_from_record
from genpoe_plugin.errors import InputError

NQ_OPEN, TRIVIA_QA = "google-research-datasets/nq_open", "mandarjoshi/trivia_qa"
SQUAD, NARRATIVE_QA, POP_QA = "rajpurkar/squad", "deepmind/narrativeqa", "akariasai/PopQA"
SQUAD_2, NQ_SWAP = "rajpurkar/squad_v2", "pminervini/NQ-Swap"
HOTPOT_QA, TWO_WIKI = "hotpotqa/hotpot_qa", "framolfese/2WikiMultihopQA"
MQUAKE = "henryzhongsc/MQuAKE-Remastered"


class _Source(NamedTuple):
    config: str | None = None
    files: str | None = None  # files of one split, if the other splits have gigabytes


_SOURCES = {
    NQ_OPEN: _Source(),
    TRIVIA_QA: _Source("unfiltered.nocontext"),
    SQUAD: _Source(),
    NARRATIVE_QA: _Source(files="data/{split}-*"),
    POP_QA: _Source(),
    HOTPOT_QA: _Source("distractor"),
    TWO_WIKI: _Source(),
    MQUAKE: _Source(),
    SQUAD_2: _Source(),
    NQ_SWAP: _Source(),
}


def read_hub_questions(name: str, split: str, *, need_answers: bool = True) -> Iterator[Question]:
    """The questions of one split, with any passages in the data set, and without duplicate answers.

    The hub's cache serves later runs.

    Args:
        name: a data set of `_SOURCES`.
        split: name of the split.
        need_answers: whether a question without answers is an error.

    Raises:
        InputError: the data set is neither reachable nor in the cache, or has changed its form.
    """
    import datasets  # here, because the import takes seconds

    source = _SOURCES[name]
    files = {"data_files": {split: source.files.format(split=split)}} if source.files else {}
    try:
        rows = datasets.load_dataset(name, source.config, split=split, **files)
    # The data set is unreachable, missing, not in the cache while offline, or damaged.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).split("\n", 1)[0]
        raise InputError(f"cannot load {name} from the hub ({reason})") from error
    for number, row in enumerate(rows, 1):
        for question in questions_from_record(row, f"{name}, {split}, row {number}", need_answers=need_answers):
            yield replace(question, answers=tuple(dict.fromkeys(question.answers)))
