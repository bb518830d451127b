"""The demo's table: one row an lm_eval run, read from lm_eval's own result files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.errors import InputError

RECALL_AT = (1, 5, 20)


@dataclass(frozen=True)
class Row:
    """Scores of one run (``em`` and ``f1`` from 0 to 1, with standard errors), its speed, and its retrieval.

    Recall is the share of questions whose own passage is among the first so many that the retriever found
    (``recall_at_*``) or that the reranker put first (``reranked_recall_at_*``); None for runs that retrieve nothing.
    ``em_gold_present`` is EM over the questions whose own passage is among those that the LLM was given.
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


def read_row(directory: Path, mode: str, passages: str, questions: Path) -> Row:
    """The row of the lm_eval run whose ``--output_path`` was ``directory``.

    Args:
        questions: what was asked, with the passages found; each marks the one that answers its question.

    Raises:
        InputError: there are no results.
    """
    report = _report(directory)
    (scores,) = report["results"].values()
    (counts,) = report["n-samples"].values()
    row = Row(
        mode=mode,
        passages=passages,
        n=counts["effective"],
        **{
            f"{metric}{suffix}": scores[f"{metric}{suffix},none"]
            for metric in ("em", "f1")
            for suffix in ("", "_stderr")
        },
        questions_per_second=report["config"]["genpoe"]["questions_per_second"],
    )
    if passages in ("none", "random", "constant"):
        return row
    ranks = [_answer_ranks(question.passages) for question in read_questions(questions)]
    recall: dict[str, Any] = {f"recall_at_{k}": sum(first <= k for first, _ in ranks) / len(ranks) for k in RECALL_AT}
    recall |= {f"reranked_recall_at_{k}": sum(second <= k for _, second in ranks) / len(ranks) for k in RECALL_AT[:2]}
    row = replace(row, **recall)
    if passages != "retrieved":
        return row
    kept = report["config"]["genpoe"]["arguments"]["num_passages"]
    present = [match for match, (_, rank) in zip(exact_matches(directory), ranks, strict=True) if rank <= kept]
    return replace(row, em_gold_present=sum(present) / len(present) if present else None)


def _answer_ranks(passages: Sequence[Any]) -> tuple[float, float]:
    """The best rank, before and after reranking, of a passage that answers; infinite if there is none."""
    answering = [passage for passage in passages if passage.has_answer]
    return (
        min((passage.rank for passage in answering), default=math.inf),
        min((passage.rerank_rank for passage in answering), default=math.inf),
    )


def _report(directory: Path) -> dict[str, Any]:
    reports = sorted(directory.rglob("results_*.json"))
    if not reports:
        raise InputError(f"{directory}: no lm_eval results; run `genpoe demo` again")
    return json.loads(reports[-1].read_text(encoding="utf-8"))


def exact_matches(directory: Path) -> list[bool]:
    """Whether each question was answered exactly, in the order of the questions."""
    samples = sorted(directory.rglob("samples_*.jsonl"))[-1]
    records = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return [record["em"] == 1.0 for record in sorted(records, key=lambda record: record["doc_id"])]


def paired_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: how likely so lopsided a split of the questions that only one run got right is."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def render(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal; scores in percent."""
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
