"""Scores per question of a row, read from the samples that lm_eval logged."""

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
"""Suffix of the tasks that score the likelihood of answers."""

Scores = dict[str, dict[str, Floats]]
"""Scores by data set and measure: one value per question, in the order of the question file."""
Tokens = Callable[[str, str], int]
"""Counts the tokens of a continuation, given its context."""


def tasks_of(names: Sequence[str], kind: str) -> tuple[str, ...]:
    """lm_eval tasks of the data sets: generated answers (``kind`` is empty) or likelihoods (`NATS`)."""
    return tuple(f"genpoe_{name}{kind}" for name in names)


def kinds_of(tasks: Sequence[str]) -> set[str]:
    """The kinds of ``tasks``, as in `tasks_of`."""
    return {NATS if task.endswith(NATS) else "" for task in tasks}


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Count as lm_eval does: tokens of context and continuation minus tokens of the context."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return lambda context, continuation: max(1, count(context + continuation) - count(context))


def read_scores(folders: Sequence[Path], names: Sequence[str], tokens: Tokens, *, nats: bool = True) -> Scores:
    """Read the scores of the row whose results are in ``folders``.

    ``nats`` are per token of the first accepted answer.

    Args:
        nats: whether results of the likelihood tasks are required.

    Raises:
        InputError: results of a data set are missing or broken, or are not those of its first questions.
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
    """Samples in the order of the question file."""
    places = np.argsort(run.doc_ids)
    if run.doc_ids[places].tolist() != list(range(len(places))):
        raise InputError(f"{run.samples}: the samples are not the first questions of the file")
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


def paired(
    rows: Sequence[Scores], names: Sequence[str], measures: Sequence[str], max_questions: int | None = None
) -> Floats:
    """Scores of several rows over their common questions: [questions, rows x measures].

    Data sets follow each other. Every row has the first questions of each file, so the shortest row sets their number.

    Args:
        names: names of the data sets.
        max_questions: maximum number of questions per data set.
    """
    parts = []
    for name in names:
        columns = [row[name][measure] for row in rows for measure in measures]
        common = min([len(column) for column in columns] + ([max_questions] if max_questions is not None else []))
        parts.append(np.stack([column[:common] for column in columns], axis=1))
    return np.concatenate(parts)
