from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic_results import genpoe_facts, write_run
from genpoe_plugin.comparison.runs import QuestionBook, Run, read_runs
from genpoe_plugin.demo.world_table import Row, paired_p_value, read_row, render

FIELDS = {"em_stderr,none": 0.05, "f1_stderr,none": 0.06}
# Of each question's passages: (retriever's rank, reranker's rank, whether it is the one that answers).
RANKS = [
    [(2, 1, False), (1, 2, True)],
    [(1, 1, False), (4, 2, True)],
    [(n, n, False) for n in range(1, 6)] + [(17, 6, True)],
    [(1, 1, False)],
]
DOCS = [
    {
        "question": f"q{number}",
        "answers": ["a"],
        "ctxs": [
            {"id": f"{n}", "title": "", "text": "t", "rank": rank, "rerank_rank": reranked, "has_answer": answers}
            for n, (rank, reranked, answers) in enumerate(ranks)
        ],
    }
    for number, ranks in enumerate(RANKS)
]


def read_written(folder: Path, mode: str, passages: str, em: list[float], docs: Any = DOCS) -> Run:
    """A run as lm_eval and the genpoe model write it, as far as the table reads it."""
    f1 = [0.5 for _ in em]
    facts = genpoe_facts(mode, passages, questions_per_second=12.5)
    file = write_run(folder, {"em": em, "f1": f1}, docs=docs, model="genpoe", genpoe=facts)
    report = json.loads(file.read_text())
    report["results"]["t"] |= FIELDS
    file.write_text(json.dumps(report))
    (run,), _ = read_runs([folder], QuestionBook())
    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return path


def test_paired_p_value_equals_enumeration(tmp_path):
    """Every way in which nine undecided questions can fall, counted."""
    first, second = [True] * 7 + [False] * 2 + [True] * 5, [False] * 7 + [True] * 2 + [True] * 5
    docs = [{"question": f"q{number}", "answers": ["a"]} for number in range(14)]
    book, runs = QuestionBook(), []
    for mode, matches in (("genpoe_rag", first), ("rag", second)):
        read_written(tmp_path / mode, mode, "retrieved", [float(match) for match in matches], docs)
        runs += read_runs([tmp_path / mode], book)[0]
    splits = [sum(way) for way in product((0, 1), repeat=9)]
    expected = sum(abs(split - 4.5) >= 2.5 for split in splits) / len(splits)
    assert paired_p_value(*runs) == pytest.approx(expected)
    assert paired_p_value(*reversed(runs)) == pytest.approx(expected)
    assert paired_p_value(runs[0], runs[0]) == 1.0


def test_the_table_shows_percent_and_a_dash_where_nothing_was_retrieved():
    row = Row("closed_book", "none", 480, 0.05, 0.01, 0.1, 0.02, 123.4)
    line = render([row]).splitlines()[-1]
    assert "5.0 ± 1.0" in line
    assert line.split()[-6:] == ["-"] * 6


def test_a_row_is_what_lm_eval_wrote_and_the_recall_of_its_questions(tmp_path, questions):
    row = read_row(read_written(tmp_path / "run", "genpoe", "retrieved", [0, 1, 0, 0]), questions)
    assert row == Row("genpoe", "retrieved", 4, 0.25, 0.05, 0.5, 0.06, 12.5, 0.25, 0.5, 0.75, 0.0, 0.5, 0.5)


@pytest.mark.parametrize("passages", ["none", "random", "constant"])
def test_runs_that_retrieve_nothing_have_no_recall(tmp_path, passages):
    row = read_row(read_written(tmp_path / "run", "genpoe", passages, [0, 1, 0, 0]), tmp_path / "not even read")
    assert row == Row("genpoe", passages, 4, 0.25, 0.05, 0.5, 0.06, 12.5)


def test_columns_stand_under_their_names():
    """Each cell begins or ends where its column's name does, whatever the rows' widths."""
    rows = [
        Row("genpoe_rag", "retrieved", 480, 0.271, 0.02, 0.312, 0.021, 9.6, 0.996, 1.0, 1.0, 0.362, 0.75, 0.3),
        Row("rag", "none", 3, 1.0, 0.0, 0.0, 0.0, 12345.0),
    ]
    header, rule, *lines = render(rows).splitlines()
    columns = [len(dashes) for dashes in rule.split("  ")]
    assert {len(line) for line in (header, rule, *lines)} == {sum(columns) + 2 * (len(columns) - 1)}

    def cells(line: str) -> list[str]:
        starts = [sum(columns[:n]) + 2 * n for n in range(len(columns))]
        return [line[start : start + width].strip() for start, width in zip(starts, columns, strict=True)]

    names = ["mode", "passages", "n", "EM ± se", "F1 ± se", "questions/s", "R@1", "R@5", "R@20", "reranked R@1", "R@5"]
    names.append("EM gold in K")
    assert cells(header) == names
    assert cells(lines[0]) == [
        *("genpoe_rag", "retrieved", "480", "27.1 ± 2.0", "31.2 ± 2.1", "10"),
        *("99.6", "100.0", "100.0", "36.2", "75.0", "30.0"),
    ]
    assert cells(lines[1]) == ["rag", "none", "3", "100.0 ± 0.0", "0.0 ± 0.0", "12345", *"------"]
