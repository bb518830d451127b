"""``genpoe data reranker`` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from train_cli.main import main


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Five questions, each with its gold passage only."""
    lines = [
        {
            "question": f"q{i}?",
            "answers": [f"a{i}"],
            "ctxs": [{"id": str(i), "title": f"T{i}", "text": f"says a{i}", "score": "1", "has_answer": True}],
        }
        for i in range(5)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_options_reach_the_core(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--negatives", "3", "--min-negatives", "2", "--random-negatives", "--seed", "4", "--prompt", "Well?"]
    run = CliRunner().invoke(main, ["data", "reranker", str(results), str(results), "--out", str(out), *options])
    assert run.exit_code == 0, run.output
    assert "10 of 10 questions" in run.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["query"] for line in lines] == [f"q{i}?" for i in range(5)] * 2
    assert all(line["prompt"] == "Well?" and len(line["neg"]) == 3 for line in lines)


def test_left_out_questions_are_counted(results: Path, tmp_path: Path) -> None:
    more = {"question": "q?", "answers": ["a"], "ctxs": [{"id": "8", "title": "", "text": text} for text in "ab"]}
    none = {"question": "q?", "answers": ["c"], "ctxs": more["ctxs"]}
    results.write_text("\n".join([results.read_text(), json.dumps(more), json.dumps(none)]))
    run = CliRunner().invoke(main, ["data", "reranker", str(results), "--out", str(tmp_path / "out.jsonl")])
    assert run.exit_code == 0, run.output
    assert "1 of 7 questions (1 have no passage with an answer, 5 fewer than 1 without)" in run.output


@pytest.mark.parametrize(
    ("content", "complaint"), [("{", "results.jsonl:1"), ("", "results.jsonl"), (None, "results.jsonl")]
)
def test_bad_input_is_one_line(results: Path, tmp_path: Path, content: str | None, complaint: str) -> None:
    results.unlink()
    if content is not None:
        results.write_text(content)
    run = CliRunner().invoke(main, ["data", "reranker", str(results), "--out", str(tmp_path / "out" / "data.jsonl")])
    assert run.exit_code == 2
    [line] = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not list(tmp_path.glob("out/*"))
