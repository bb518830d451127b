"""Results of a study: one record per row and data set, and the curve over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.real_llm.layers import Shape, named
from benchmarks.real_llm.measures import Interval, Paired, mean
from benchmarks.real_llm.rows import StudyRow
from benchmarks.real_llm.scores import MEASURES, Scores, paired

BOTH = "both"
COMPARED = ("em", "f1", "nats")
RECOVERED = ("f1", "nats")

Record = dict[str, Any]


def sets_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each data set alone and, if there are several, all of them together."""
    alone: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    return {BOTH: tuple(names), **alone} if len(names) > 1 else alone


def records(rows: Sequence[StudyRow], scores: Mapping[str, Scores], names: Sequence[str]) -> list[Record]:
    """Records of all rows with scores, in the order of ``rows``. Comparisons with rows without scores are left out.

    Args:
        scores: scores by name of the row.
        names: names of the data sets.
    """
    return [
        _record(row, label, together, scores)
        for row in rows
        if row.name in scores
        for label, together in sets_of(names).items()
    ]


def _record(row: StudyRow, label: str, together: Sequence[str], scores: Mapping[str, Scores]) -> Record:
    own = {measure: paired([scores[row.name]], together, (measure,))[:, 0] for measure in MEASURES}
    record: Record = {"row": row.name, "questions": label, "n": len(own["f1"]), "n_nats": len(own["nats"])}
    record["layers"] = named(row.layers, row.heads)
    for measure, column in own.items():
        record[measure] = asdict(mean(column, share=measure != "nats"))
    record["differences"] = {}
    for other in row.against:
        if other in scores:
            both = {name: Paired(paired([scores[row.name], scores[other]], together, (name,))) for name in COMPARED}
            differences = {name: asdict(columns.difference(0, 1)) for name, columns in both.items()}
            record["differences"][other] = differences | {"n": len(both["f1"].columns)}
    if row.reads_gold and {"closed_book", "rag"} <= scores.keys():
        record["recovered"] = _recovered(row.name, together, scores)
    return record


def _recovered(
    row: str, together: Sequence[str], scores: Mapping[str, Scores], max_questions: int | None = None
) -> Record:
    three = [scores[name] for name in (row, "closed_book", "rag")]
    found: dict[str, Interval | None] = {
        name: Paired(paired(three, together, (name,), max_questions)).recovered(0, 1, 2) for name in RECOVERED
    }
    return {name: share and asdict(share) for name, share in found.items()}


def curve(
    rows: Sequence[StudyRow], scores: Mapping[str, Scores], names: Sequence[str], shape: Shape, max_questions: int
) -> list[Record]:
    """Recovered fractions of every set of layers, over the first ``max_questions`` of each data set."""
    if not {"closed_book", "rag"} <= scores.keys():
        return []
    reading = sorted((row for row in rows if row.reads_gold and row.name in scores), key=lambda row: len(row.layers))
    return [
        {
            "row": row.name,
            "layers": named(row.layers, row.heads),
            "number": len(row.layers),
            "whole": not row.heads,
            "bytes": shape.bytes(row.layers, row.heads),
            "n": len(paired([scores[row.name]], names, ("f1",), max_questions)),
            "recovered": _recovered(row.name, names, scores, max_questions),
        }
        for row in reading
    ]
