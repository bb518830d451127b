"""Reranking in parts, each in its own process: joined, the same bytes as one run. Parts that do not fit are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.parts import Part, join_parts
from genpoe_plugin.selection.result_files import SCORE_BLOCK
from train_cli.main import main


def question(number: int, count: int) -> Question:
    passages = tuple(
        RetrievedPassage(Passage(f"{number}.{rank}", "", f"the fox {number * rank % 11} " * (rank % 5 + 1)), 1.0, rank)
        for rank in range(1, count + 1)
    )
    return Question(f"what is {number}", (f"fox {number % 3}",), passages)


@given(
    counts=st.lists(st.integers(0, 40), max_size=30).map(lambda counts: [*counts, 600, *counts]),
    parts=st.integers(1, 4),
)
def test_each_question_is_in_one_part(counts: list[int], parts: int) -> None:
    asked = [question(number, count) for number, count in enumerate(counts)]
    found = []
    try:
        for number in range(1, parts + 1):
            mine = list(Part(number, parts).questions(lambda: iter(asked)))
            assert mine
            if number < parts:  # parts end at whole blocks
                assert sum(len(item.passages) for item in mine) >= SCORE_BLOCK
            found += mine
    except InputError as error:
        assert "give at most" in str(error) and sum(counts) < parts * (SCORE_BLOCK + 600)
    else:
        assert found == asked


def test_several_machines_write_what_one_writes(llm_dir: Path, tmp_path: Path) -> None:
    """Each machine is a process of its own, and all run at the same time."""
    results = tmp_path / "retrieved.jsonl"
    write_questions(results, [question(number, 9) for number in range(150)], index="abc")

    def command(out: str, *options: str) -> list[str]:
        words = ["rerank", str(results), "--reranker", str(llm_dir), "--reranker-format", "likelihood"]
        return [sys.executable, "-m", "train_cli", *words, "--out", str(tmp_path / out), *options]

    subprocess.run(command("whole.jsonl"), check=True, capture_output=True)
    running = [
        subprocess.Popen(command(f"{n}.jsonl", "--part", f"{n}/3"), stdout=subprocess.DEVNULL) for n in (1, 2, 3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert {len(list(read_questions(tmp_path / f"{n}.jsonl"))) for n in (1, 2)} == {57}
    paths = [str(tmp_path / f"{n}.jsonl") for n in (3, 1, 2)]
    result = CliRunner().invoke(main, ["data", "join", *paths, "--out", str(tmp_path / "joined.jsonl")])
    assert result.exit_code == 0 and result.output.endswith("joined.jsonl: 150 questions of 3 parts\n")
    assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def write(name: str, **header: str) -> Path:
        write_questions(tmp_path / name, [question(0, 2)], **header)
        return tmp_path / name

    first, second = write("1", part="1/2", reranker="a"), write("2", part="2/2", reranker="a")
    assert join_parts([second, first], tmp_path / "joined") == 2
    with pytest.raises(InputError, match="1: one of the parts; give another --out"):
        join_parts([first, second], first)
    assert len(list(read_questions(first))) == 1
    for paths, message in (
        ([first], "part 2/2: missing; give the files of all 2 parts"),
        ([first, first, second], "part 1/2 is also in"),
        ([first, write("other", part="2/2", reranker="b")], "a part of another run than"),
        ([first, write("three", part="2/3", reranker="a")], "a part of another run than"),
        ([first, write("whole", reranker="a")], "whole: not a part; give files of `genpoe rerank --part`"),
        ([write("huge", part=f"1/{10**15}", reranker="a")], f"part 2/{10**15}: missing"),
        ([first, write("bad", part="0/2")], "bad: not a part"),
        ([tmp_path / "missing"], "missing: no such file"),
    ):
        with pytest.raises(InputError, match=message):
            join_parts(paths, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "3/2"), "'3/2' is not a part such as 2/4"),
        (("--part", "half"), "'half' is not a part such as 2/4"),
        (("--part", "1/2", "--format", "trec"), "--part: only files of --format genpoe can be joined, not trec"),
        (("--part", "1/2", "--write-qrels", "qrels"), "--write-qrels: not with --part"),
        (("--part", "2/2"), "--part 2/2: too few passages for 2 parts; give at most 1"),
    ],
)
def test_bad_parts_are_one_line(options: tuple[str, ...], message: str, llm_dir: Path, tmp_path: Path) -> None:
    write_questions(tmp_path / "results", [question(0, 2)])
    words = ["rerank", tmp_path / "results", "--reranker", llm_dir, "--out", tmp_path / "out", *options]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "out").exists()
