"""What every question of a row scored, read from the samples that lm_eval logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from genpoe_plugin.comparison.runs import QuestionBook, Run, read_runs
from genpoe_plugin.comparison.statistics import Floats
from genpoe_plugin.errors import InputError

GENERATED = ("em", "f1", "contains")
MEASURES = (*GENERATED, "nats")
NATS = "_nats"
"""What the name of a task ends in that scores the likelihood of the answers of another."""

Scores = dict[str, dict[str, Floats]]
"""Data set, then measure, to one value a question, in the order of the file of questions."""
Tokens = Callable[[str, str], int]
"""How many tokens a continuation of a context has."""


def tasks_of(names: Sequence[str], kind: str) -> tuple[str, ...]:
    """The tasks of lm_eval for data sets: those that are answered, or (`NATS`) how likely the right answers are."""
    return tuple(f"genpoe_{name}{kind}" for name in names)


def kinds_of(tasks: Sequence[str]) -> set[str]:
    """The kinds, as of `tasks_of`, that are among ``tasks``."""
    return {NATS if task.endswith(NATS) else "" for task in tasks}


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Counts as lm_eval splits a text: what context and continuation have together beyond the context alone."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return lambda context, continuation: max(1, count(context + continuation) - count(context))


def read_scores(folders: Sequence[Path], names: Sequence[str], tokens: Tokens, *, nats: bool = True) -> Scores:
    """The scores of the row that lm_eval wrote to ``folders``.

    ``nats`` are those of the first accepted answer, divided by its tokens.

    Args:
        nats: whether they have to be there.

    Raises:
        InputError: results of a data set are missing, broken, or not of its first questions.
    """
    runs, left_out = read_runs(folders, QuestionBook())
    if left_out:
        raise InputError(f"{left_out[0].path}: {left_out[0].reason}")
    by_task = {run.task: run for run in runs}
    needed = ("", NATS) if nats else ("",)
    if missing := [task for kind in needed for task in tasks_of(names, kind) if task not in by_task]:
        raise InputError(f"{folders[0]}: no results of {missing[0]}")
    scores: Scores = {}
    for name in names:
        scores[name] = _generated(by_task[f"genpoe_{name}"])
        if scored := by_task.get(f"genpoe_{name}{NATS}"):
            scores[name]["nats"] = _nats(scored, tokens)
    return scores


def _samples(run: Run) -> list[Mapping]:
    """In the order of the file of questions."""
    places = np.argsort(run.doc_ids)
    if run.doc_ids[places].tolist() != list(range(len(places))):
        raise InputError(f"{run.samples}: not the first questions of the file")
    return [run.sample(int(place)) for place in places]


def _generated(run: Run) -> dict[str, Floats]:
    samples = _samples(run)
    return {measure: np.array([sample[measure] for sample in samples], np.float64) for measure in GENERATED}


def _nats(run: Run, tokens: Tokens) -> Floats:
    found = []
    for sample in _samples(run):
        request = sample["arguments"]["gen_args_0"]
        likelihood = float(sample["filtered_resps"][0][0])
        found.append(-likelihood / tokens(request["arg_0"], request["arg_1"]))
    return np.array(found, np.float64)


def paired(rows: Sequence[Scores], names: Sequence[str], measures: Sequence[str], most: int | None = None) -> Floats:
    """Columns of several rows over the questions that all of them were asked: [questions, rows x measures].

    The questions of one data set come after those of another. Of each, a row has the first of the file, so those in
    common are the fewest.

    Args:
        names: data sets.
        most: at most so many questions of each data set.
    """
    parts = []
    for name in names:
        columns = [row[name][measure] for row in rows for measure in measures]
        common = min([len(column) for column in columns] + ([most] if most is not None else []))
        parts.append(np.stack([column[:common] for column in columns], axis=1))
    return np.concatenate(parts)
