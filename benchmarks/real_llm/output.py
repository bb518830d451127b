"""Output files of a study: ``table.csv``, ``differences.csv``, ``table.json``, ``section.md`` and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.real_llm.pictures import draw_curve
from benchmarks.real_llm.questions import file_of
from benchmarks.real_llm.results import COMPARED, RECOVERED, Record, curve, records
from benchmarks.real_llm.scores import MEASURES
from benchmarks.real_llm.section import PICTURES, picture_name, section
from benchmarks.real_llm.study import SETTINGS, Study
from benchmarks.row import machine
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.files import atomic_file
from genpoe_plugin.llm.language_model import load_tokenizer
from genpoe_plugin.prompts import cut_passages

TABLE, SECTION, FOLDER = "table.json", "section.md", "real"
_ENDS = ("value", "low", "high")


def write_study(study: Study, command: str) -> None:
    """Write all output files of a study, with its finished rows, to its folder."""
    scores, names = study.scores(), list(study.files)
    found = {
        "llm": Path(study.llm).name,
        "settings": json.loads((study.out / SETTINGS).read_text(encoding="utf-8")),
        "depth": study.shape.depth,
        "layers": study.main,
        "passage_tokens": passage_tokens(study),
        "retrieved": {name: _answered(file_of(study.out, name, "retrieved")) for name in names},
        "command": command,
        "machine": machine(),
        "records": records(study.rows, scores, names),
        "curve": curve(study.rows, scores, names, study.shape, study.limit_curve),
    }
    for name, text in (
        (TABLE, json.dumps(found, indent=1) + "\n"),
        (SECTION, section(found)),
    ):
        with atomic_file(study.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    _write_csv(study.out / "table.csv", _table_lines(found["records"]))
    _write_csv(study.out / "differences.csv", _difference_lines(found["records"]))
    _draw(found, study.out / FOLDER)


def passage_tokens(study: Study) -> float:
    """Mean number of tokens of the right passages, cut as for experts."""
    tokenizer = load_tokenizer(study.llm)
    strings = [
        entry.passage.string
        for name in study.files
        for question in read_questions(file_of(study.out, name, "gold"))
        for entry in question.passages
    ]
    cut = cut_passages(strings, tokenizer)
    return fmean(len(ids) for ids in tokenizer(cut, add_special_tokens=False)["input_ids"])


def _answered(path: Path) -> float:
    """Share of questions whose passage has an answer."""
    return fmean(bool(question.passages[0].has_answer) for question in read_questions(path))


def _draw(found: dict[str, Any], folder: Path) -> None:
    points = [point for point in found["curve"] if point["whole"]]
    if not points:
        return
    places = {
        "layers": ([point["number"] for point in points], f"layers with experts (of {found['depth']})"),
        "bytes": (
            [point["bytes"] * found["passage_tokens"] / 1000 for point in points],
            "KB per passage, in 16 bits",
        ),
    }
    for kind in PICTURES:
        at, axis = places[kind]
        draw_curve(points, at, folder / picture_name(found["llm"], kind), title=found["llm"], axis=axis)


def _table_lines(found: Sequence[Record]) -> Iterable[list[Any]]:
    columns = [*MEASURES, *(f"recovered_{measure}" for measure in RECOVERED)]
    yield ["row", "questions", "layers", "n", "n_nats", *(f"{name}_{end}" for name in columns for end in _ENDS)]
    for record in found:
        shares = record.get("recovered") or {}
        intervals = [record[measure] for measure in MEASURES] + [shares.get(measure) for measure in RECOVERED]
        values = [interval[end] if interval else "" for interval in intervals for end in _ENDS]
        yield [record["row"], record["questions"], record["layers"], record["n"], record["n_nats"], *values]


def _difference_lines(found: Sequence[Record]) -> Iterable[list[Any]]:
    yield ["row", "against", "questions", "n", *(f"{name}_{end}" for name in COMPARED for end in _ENDS)]
    for record in found:
        for other, one in record["differences"].items():
            values = [one[measure][end] for measure in COMPARED for end in _ENDS]
            yield [record["row"], other, record["questions"], one["n"], *values]


def _write_csv(path: Path, lines: Iterable[list[Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
