"""``genpoe data`` through the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from genpoe_plugin.data import resources
from genpoe_plugin.data.resources import RESOURCES, UNAVAILABLE
from tests.http_files import HTTPFile, serve
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
    run = CliRunner().invoke(
        main, ["data", "reranker", str(results), "--out", str(tmp_path / "out.jsonl"), "--min-negatives", "1"]
    )
    assert run.exit_code == 0, run.output
    assert "1 of 7 questions (1 have no passage with an answer, 5 fewer than 1 without)" in run.output


def test_thirty_two_negatives_are_the_default(results: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["data", "reranker", str(results), "--out", str(tmp_path / "out.jsonl")])
    assert run.exit_code == 2
    assert "none of 5 questions has a passage with an answer and at least 32 without" in run.stderr


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


def test_the_list_has_every_name_and_what_to_do_instead() -> None:
    run = CliRunner().invoke(main, ["data", "list"])
    assert run.exit_code == 0, run.output
    first = [line.split()[0].rstrip(":") for line in run.output.splitlines() if line]
    assert {resource.name for resource in RESOURCES} | {*UNAVAILABLE} <= {*first}
    assert "create them with `genpoe retrieve`" in run.output
    [wikipedia] = [line for line in run.output.splitlines() if line.startswith("data.wikipedia_split.psgs_w100")]
    assert "21,015,324 passages" in wikipedia and "CC BY-SA" in wikipedia


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPFile]:
    """Every address is that of a file of one question."""
    with serve(b"who\t['Rossini']\n") as file:
        local = tuple(replace(resource, address=f"{file.url}/q.csv") for resource in RESOURCES)
        monkeypatch.setattr(resources, "RESOURCES", local)
        yield file


def test_download_of_a_name_and_of_a_prefix(served: HTTPFile, tmp_path: Path) -> None:
    out = tmp_path / "downloads"
    names = ["data.retriever.qas.nq", "data.retriever.qas.nq-dev"]
    run = CliRunner().invoke(main, ["data", "download", *names, "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert len(served.asked) == 3
    for split in ("train", "dev", "test"):
        path = out / f"data/retriever/qas/nq-{split}.csv"
        assert path.read_bytes() == served.body
        assert f"{path}: {len(served.body)} bytes; NQ, {split}; licence: CC BY-SA 3.0" in run.stdout
    assert "not downloaded" not in run.output
    run = CliRunner().invoke(main, ["data", "download", names[1], "--out", str(out)])
    assert run.exit_code == 0
    assert run.stdout.startswith(f"{out}/data/retriever/qas/nq-dev.csv: already downloaded")


def test_download_says_what_a_prefix_does_not_bring(served: HTTPFile, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["data", "download", "data.retriever_results", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert run.stdout.count("not downloaded: ") == 2
    assert "not downloaded: DPR publishes no results for TriviaQA; create them with `genpoe retrieve`" in run.stdout


@pytest.mark.parametrize("name", ["data.reader.nq.single.train", "nq", "data.retriever.qas.nq-train"])
def test_download_errors_are_one_line(served: HTTPFile, tmp_path: Path, name: str) -> None:
    served.failures = [404]
    run = CliRunner().invoke(main, ["data", "download", name, "--out", str(tmp_path / "out")])
    assert run.exit_code == 2
    [line] = run.stderr.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_wrong_name_is_seen_before_anything_is_downloaded(served: HTTPFile, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["data", "download", "data.retriever.qas.nq-dev", "nq", "--out", str(tmp_path)])
    assert run.exit_code == 2
    assert served.asked == []


def test_ctrl_c_says_how_to_go_on(served: HTTPFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resources, "download", interrupted)
    run = CliRunner().invoke(main, ["data", "download", "data.retriever.qas.nq-dev", "--out", str(tmp_path)])
    assert run.exit_code == 130
    assert "rerun the same command to resume" in run.stderr


def test_conflicts_are_written_and_counted(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "conflicts.jsonl"
    run = CliRunner().invoke(main, ["data", "conflicts", "--questions", str(results), "--out", str(out), "--seed", "4"])
    assert run.exit_code == 0, run.output
    assert "5 of 5 questions (0 have no passage with an answer that can be replaced, 0 no other" in run.output
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["seed"] == 4
    for number, line in enumerate(lines):
        assert line["original_answers"] == [f"a{number}"]
        assert line["answers"] != line["original_answers"]
        assert line["ctxs"][0]["text"] == f"says {line['answers'][0]}"


def test_no_conflicts_are_one_line(results: Path, tmp_path: Path) -> None:
    results.write_text(results.read_text().splitlines()[0])
    run = CliRunner().invoke(main, ["data", "conflicts", "--questions", str(results), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2
    assert "none of 1 questions can be changed" in run.stderr
