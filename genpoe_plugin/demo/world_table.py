"""The table of `genpoe demo world`: one row per lm_eval run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genpoe_plugin.comparison.runs import Run
from genpoe_plugin.comparison.settings import settings_of
from genpoe_plugin.comparison.statistics import mcnemar, wins_and_losses
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.retrieval.measures import recall_at
from genpoe_plugin.selection.result_files import Quality


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        em, f1: scores from 0 to 1, with their standard errors.
        recall_at_1, recall_at_5, recall_at_20: share of questions whose passage the retriever ranks that high; None for
            runs without retrieval.
        reranked_recall_at_1, reranked_recall_at_5: the same after reranking.
        em_gold_present: EM over the questions whose passage is among those that the LLM reads.
    """

    mode: str
    passages: str
    n: int
    em: float
    em_stderr: float
    f1: float
    f1_stderr: float
    questions_per_second: float
    recall_at_1: float | None = None
    recall_at_5: float | None = None
    recall_at_20: float | None = None
    reranked_recall_at_1: float | None = None
    reranked_recall_at_5: float | None = None
    em_gold_present: float | None = None


def read_row(run: Run, questions: Path) -> Row:
    """Make the row of a run.

    Args:
        run: a run of the genpoe model.
        questions: file of the evaluated questions with their passages, which marks the passage of each question.
    """
    scores, settings = run.report["results"][run.task], settings_of(run)
    row = Row(
        mode=settings["mode"],
        passages=settings["passages"],
        n=len(run.questions),
        **{
            f"{metric}{suffix}": scores[f"{metric}{suffix},none"]
            for metric in ("em", "f1")
            for suffix in ("", "_stderr")
        },
        questions_per_second=run.config["genpoe"]["questions_per_second"],
    )
    if row.passages in ("none", "random", "constant"):
        return row
    quality = Quality()
    for question in read_questions(questions):
        quality.add(question)
    recall: dict[str, Any] = {f"recall_at_{k}": recall_at(k, quality.retrieved) for k in (1, 5, 20)}
    recall |= {f"reranked_recall_at_{k}": recall_at(k, quality.reranked) for k in (1, 5)}
    row = replace(row, **recall)
    if row.passages != "retrieved":
        return row
    present = run.scores["em"][(run.ranks >= 1) & (run.ranks <= settings["num_passages"])]
    return replace(row, em_gold_present=float(present.mean()) if len(present) else None)


def paired_p_value(first: Run, second: Run) -> float:
    """The p-value of McNemar's exact test of EM on the same questions."""
    exact, _ = mcnemar(*wins_and_losses(np.stack([first.scores["em"], second.scores["em"]], 1), np.array([[0, 1]])))
    return float(exact[0])


def render(rows: Sequence[Row]) -> str:
    """Format the rows as a table for a terminal, with scores in percent."""
    header = (
        *("mode", "passages", "n", "EM ± se", "F1 ± se", "questions/s"),
        *("R@1", "R@5", "R@20", "reranked R@1", "R@5", "EM gold in K"),
    )
    lines = [
        (
            row.mode,
            row.passages,
            str(row.n),
            f"{100 * row.em:.1f} ± {100 * row.em_stderr:.1f}",
            f"{100 * row.f1:.1f} ± {100 * row.f1_stderr:.1f}",
            f"{row.questions_per_second:.0f}",
            *(
                "-" if share is None else f"{100 * share:.1f}"
                for share in (
                    row.recall_at_1, row.recall_at_5, row.recall_at_20,
                    row.reranked_recall_at_1, row.reranked_recall_at_5, row.em_gold_present,
                )
            ),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]

    def join(line: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        return "  ".join(left + right)

    return "\n".join([join(header), "  ".join("-" * width for width in widths), *map(join, lines)])
