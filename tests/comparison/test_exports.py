"""The formats of other tools, read back."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from lm_eval.utils import make_table

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.comparison.cells import table
from genpoe_plugin.comparison.exports import export
from genpoe_plugin.comparison.latex import latex
from genpoe_plugin.comparison.leaderboard import Comparison, compare
from genpoe_plugin.errors import InputError

N = 40
DOCS = documents(N, passages=2)
SPECIAL = "a&b_c%d#e$f{g}~h^i\\j<k>|l"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    for control, right in (("retrieved", 30), ("shuffled", 5)):
        scores = {"em": [float(n < right) for n in range(N)], "nll": [n / 7 for n in range(N)]}
        stated = [
            {"metric": "em", "aggregation": "mean", "higher_is_better": True},
            {"metric": "nll", "aggregation": "mean", "higher_is_better": False},
        ]
        own = {"genpoe": genpoe_facts("genpoe", control), "model_args": {"pretrained": "someone/llm"}}
        write_run(tmp_path / "runs" / control, scores, docs=DOCS, metric_list=stated, **own)
    write_run(tmp_path / "runs" / "hf", scores, docs=DOCS, metric_list=stated, model_args={"pretrained": SPECIAL})
    return compare([tmp_path / "runs"], draws=100)


def plain(cell: str) -> str:
    """A LaTeX cell as the text that it shows."""
    for command, character in {
        r"\textbackslash{}": "\0",
        r"\textasciitilde{}": "~",
        r"\textasciicircum{}": "^",
        r"$\Delta$": "\u0394",
        "--": "\u2013",
        "$-$": "\u2212",
    }.items():
        cell = cell.replace(command, character)
    return re.sub(r"\$([<>|])\$", r"\1", re.sub(r"\\([#$%&_{}])", r"\1", cell)).replace("\0", "\\")


def test_latex_shows_the_table(comparison: Comparison, tmp_path: Path) -> None:
    (path,) = export(comparison, tmp_path / "table.tex")
    text = path.read_text(encoding="utf-8")
    assert text == latex(comparison)
    begins, ends = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert begins == ["table", "tabular"] and ends == begins[::-1]
    rules = [text.index(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")]
    assert rules == sorted(rules) and text.count(r"\midrule") == 2  # below the header, and above the controls
    lines = [line.removesuffix(r" \\") for line in text.splitlines() if line.endswith(r" \\")]
    header, rows = table(comparison.boards[0])
    assert [[plain(cell) for cell in re.split(r"(?<!\\) & ", line)] for line in lines] == [header, *rows]
    (columns,) = re.findall(r"begin\{tabular\}\{(\w+)\}", text)
    assert len(columns) == len(header)


def test_lm_evals_tables_have_the_cells_of_make_table(comparison: Comparison, tmp_path: Path) -> None:
    (path,) = export(comparison, tmp_path / "tables.md")

    def cells(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    expected: list[list[str]] = []
    for system in comparison.boards[0].systems:
        report = json.loads(system.runs[0].results.read_text())
        for name in ("em", "nll"):
            values = system.runs[0].scores[name].tolist()
            report["results"]["t"][f"{name}_stderr,none"] = statistics.stdev(values) / math.sqrt(N)
        expected += cells(make_table(report))
    found = cells(path.read_text(encoding="utf-8"))
    assert len(found) == 9 and found[0][0] == "Tasks"

    def same(cell: str, other: str) -> bool:
        return cell == other or float(cell) == float(other)  # lm_eval's writer may drop zeros at the end

    for row, other in zip(found, expected, strict=True):
        assert all(same(*pair) for pair in zip(row, other, strict=True)), (row, other)
    for system in comparison.boards[0].systems:
        assert f"t, #{system.number} {system.label}\n" in path.read_text(encoding="utf-8")


TEXTS = ["schema_version", "evaluation_id", "evaluation_timestamp", "retrieved_timestamp"]
SOURCE = {"source_name", "source_type", "source_organization_name", "evaluator_relationship"}


def strings(value: dict[str, Any]) -> bool:
    return all(isinstance(entry, str) for entry in value.values())


def test_every_eval_ever(comparison: Comparison, tmp_path: Path) -> None:
    """The rules of its schema, version 0.3.0, for the fields that are used."""
    paths = export(comparison, tmp_path / "records")
    assert len(set(paths)) == 3 == len(list((tmp_path / "records").rglob("*.json")))
    for path, system in zip(paths, comparison.boards[0].systems, strict=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = {"source_metadata", "eval_library", "model_info", "evaluation_results"}
        assert set(record) == {*TEXTS, *parts}
        assert all(isinstance(record[name], str) for name in TEXTS)
        assert float(record["retrieved_timestamp"]) > 1.7e9
        source = record["source_metadata"]
        assert set(source) == SOURCE and strings(source) and source["source_type"] == "evaluation_run"
        assert record["eval_library"] == {"name": "lm_eval", "version": "0.4.13"}
        model = record["model_info"]
        assert {"deployment_type", "model_availability"} < set(model["additional_details"])
        assert strings(model["additional_details"]) and strings(model["inference_engine"])
        if system.settings["kind"] == "genpoe":
            assert model["id"] == "someone/llm" and path.parent == tmp_path / "records" / "t" / "someone" / "llm"
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", path.stem)
        em, nll = record["evaluation_results"]
        for result, metric in ((em, "em"), (nll, "nll")):
            assert result["evaluation_name"] == "t"
            assert result["source_data"]["source_type"] == "other" and result["source_data"]["dataset_name"]
            scores = system.scores[metric]
            assert result["score_details"]["score"] == pytest.approx(sum(scores) / N)
            assert strings(result["score_details"]["details"])
            uncertainty = result["score_details"]["uncertainty"]
            assert uncertainty["num_samples"] == N and uncertainty["confidence_interval"]["confidence_level"] == 0.95
            ends = uncertainty["confidence_interval"]
            assert ends["lower"] < result["score_details"]["score"] < ends["upper"]
            assert set(result["generation_config"]["generation_args"]) == {"execution_command"}
            assert strings(result["generation_config"]["additional_details"])
        assert em["metric_config"]["score_type"] == "continuous" and not em["metric_config"]["lower_is_better"]
        assert (em["metric_config"]["min_score"], em["metric_config"]["max_score"]) == (0, 1)
        assert "score_type" not in nll["metric_config"] and nll["metric_config"]["lower_is_better"]
    assert export(comparison, tmp_path / "records") == paths


def test_other_targets_are_refused(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--export .*x\.csv: give FILE\.tex"):
        export(comparison, tmp_path / "x.csv")
