from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from genpoe_plugin.demo.table import Row, exact_matches, paired_p_value, read_row, render
from genpoe_plugin.errors import InputError

FIELDS = {"em,none": 0.25, "em_stderr,none": 0.05, "f1,none": 0.5, "f1_stderr,none": 0.06}
# Of each question's passages: (retriever's rank, reranker's rank, whether it is the one that answers).
RANKS = [
    [(1, 2, True), (2, 1, False)],
    [(1, 1, False), (4, 2, True)],
    [(17, 6, True), (1, 1, False)],
    [(1, 1, False)],
]


def write_results(directory: Path, name: str = "results_2026-01-02.json", **scores: float) -> Path:
    """A result file as lm_eval writes it, as far as the table reads it."""
    (directory / "model").mkdir(parents=True, exist_ok=True)
    report = {
        "results": {"genpoe_demo": {"alias": "genpoe_demo", **FIELDS, **scores}},
        "n-samples": {"genpoe_demo": {"original": 9, "effective": 4}},
        "config": {"genpoe": {"questions_per_second": 12.5, "arguments": {"num_passages": 4}}},
    }
    (directory / "model" / name).write_text(json.dumps(report))
    samples = [json.dumps({"doc_id": number, "em": float(number == 1)}) for number in range(4)]
    (directory / "model" / "samples_genpoe_demo_2026-01-02.jsonl").write_text("\n".join(samples))
    return directory


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    with path.open("w") as file:
        for number, ranks in enumerate(RANKS):
            ctxs = [
                {"id": f"{n}", "title": "", "text": "t", "rank": rank, "rerank_rank": reranked, "has_answer": answers}
                for n, (rank, reranked, answers) in enumerate(ranks)
            ]
            file.write(json.dumps({"question": f"q{number}", "answers": ["a"], "ctxs": ctxs}) + "\n")
    return path


def test_paired_p_value_equals_enumeration():
    """Every way in which nine undecided questions can fall, counted."""
    first, second = [True] * 7 + [False] * 2 + [True] * 5, [False] * 7 + [True] * 2 + [True] * 5
    splits = [sum(way) for way in product((0, 1), repeat=9)]
    expected = sum(abs(split - 4.5) >= 2.5 for split in splits) / len(splits)
    assert paired_p_value(first, second) == pytest.approx(expected)
    assert paired_p_value(second, first) == pytest.approx(expected)
    assert paired_p_value(first, first) == 1.0


def test_the_table_shows_percent_and_a_dash_where_nothing_was_retrieved():
    row = Row("closed_book", "none", 480, 0.05, 0.01, 0.1, 0.02, 123.4)
    line = render([row]).splitlines()[-1]
    assert "5.0 ± 1.0" in line
    assert line.split()[-6:] == ["-"] * 6


def test_a_row_is_what_lm_eval_wrote_and_the_recall_of_its_questions(tmp_path, questions):
    row = read_row(write_results(tmp_path / "run"), "genpoe", "retrieved", questions)
    assert row == Row("genpoe", "retrieved", 4, 0.25, 0.05, 0.5, 0.06, 12.5, 0.25, 0.5, 0.75, 0.0, 0.5, 0.5)


@pytest.mark.parametrize("passages", ["none", "random", "constant"])
def test_runs_that_retrieve_nothing_have_no_recall(tmp_path, passages):
    row = read_row(write_results(tmp_path / "run"), "genpoe", passages, tmp_path / "not even read")
    assert row == Row("genpoe", passages, 4, 0.25, 0.05, 0.5, 0.06, 12.5)


def test_the_latest_results_count(tmp_path, questions):
    write_results(tmp_path / "run", "results_2026-01-03.json", **{"em,none": 0.75})
    write_results(tmp_path / "run", "results_2026-01-01.json", **{"em,none": 0.0})
    assert read_row(tmp_path / "run", "rag", "retrieved", questions).em == 0.75


def test_no_results_are_said_in_one_line(tmp_path, questions):
    with pytest.raises(InputError, match="run: no lm_eval results; run `genpoe demo` again"):
        read_row(tmp_path / "run", "rag", "retrieved", questions)


def test_exact_matches_come_in_the_order_of_the_questions(tmp_path):
    lines = [json.dumps({"doc_id": number, "em": float(number in (0, 3))}) for number in (2, 0, 3, 1)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "samples_genpoe_demo_2026-01-02.jsonl").write_text("\n".join(lines))
    assert exact_matches(tmp_path) == [True, False, False, True]


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
