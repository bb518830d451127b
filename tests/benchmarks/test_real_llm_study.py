"""``real-llm study``: real trainings of a tiny LLM, and a stand-in for lm_eval that writes synthetic results."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from benchmarks.__main__ import main
from benchmarks.real_llm.ladder import LADDER, cells
from genpoe_plugin.data.questions import read_questions
from tests.benchmarks.test_real_llm_table import LIMIT, LmEval, data, letters  # noqa: F401
from tests.in_process import started_by
from train_cli.main import main as genpoe
from train_cli.train_hypernetwork import hypernetwork


class Trains(LmEval):
    """Also runs trainings, in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[str]] = []
        self.arguments: dict[str, dict[str, str]] = {}
        self.output = ""
        self.one_at_a_time = Lock()

    def __call__(self, command, **options):
        words = command[2:]
        with self.one_at_a_time:
            return self.run(words, command, options)

    def run(self, words, command, options):
        if words[0] == "train_cli":
            self.trained += [words[1:]] if words[1] == "train" else []
            return SimpleNamespace(returncode=CliRunner().invoke(genpoe, words[1:]).exit_code)
        if words[0] == "benchmarks":
            result = CliRunner().invoke(main, words[1:])
            self.output += result.output
            return SimpleNamespace(returncode=result.exit_code)
        lm_eval_options = dict(pairwise(words))
        pairs = lm_eval_options["--model_args"].split(",")
        self.arguments[Path(lm_eval_options["--output_path"]).name] = dict(pair.split("=", 1) for pair in pairs)
        return super().__call__(command, **options)


@pytest.fixture
def stand_in(monkeypatch) -> Trains:
    trains = Trains()
    monkeypatch.setattr(subprocess, "run", trains)
    monkeypatch.setattr(subprocess, "Popen", started_by(trains))
    return trains


@pytest.fixture
def run(data, letters, stand_in, llm_dir, tmp_path):  # noqa: F811
    """``run(*more)``: runs the command and returns its result. One training question is also an evaluation question."""
    evaluated = next(iter(read_questions(next(data.rglob("nq-open*")))))
    rows = [
        {
            "question": evaluated.question if number == 0 else f"where does number {number} live",
            "answers": [f"town {number}"],
            "ctxs": [{"id": str(number), "title": f"T{number}", "text": f"Number {number} lives in town {number}."}],
        }
        for number in range(9)
    ]
    (data / "nq_qed.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*more: str):
        words = ["real-llm", "study", "--llm", llm_dir, "--layers", "0,2", "--data", data, "--out", tmp_path / "study"]
        words += ["--limit", LIMIT, "--limit-controls", 4, "--limit-nats", 4, "--steps", 2, "--train-batch-size", 4]
        words += ["--lora-rank", 2]
        return CliRunner().invoke(main, [*map(str, words), *more])

    return command


def test_a_study_trains_evaluates_and_writes_its_results(run, stand_in, data, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "study"
    result = run("--cells", "window_4,rag_lora")
    assert result.exit_code == 0, result.output
    assert len(stand_in.trained) == 1 and "--window" in stand_in.trained[0]
    assert stand_in.arguments["window_4-0"]["hypernetwork"] == str(out / "trained" / "window_4-0")
    assert stand_in.arguments["window_4-0-constant"]["passages"] == "constant"
    assert stand_in.arguments["rag_lora-0"]["mode"] == "rag"
    adapter = Path(stand_in.arguments["rag_lora-0"]["peft"])
    experts = stand_in.arguments["rag_lora-0-experts"]
    assert (experts["mode"], experts["peft"], experts["expert_layers"]) == ("genpoe", str(adapter), "0+2")
    assert "expert_layers" not in stand_in.arguments["rag_lora-0-experts-all"]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name), "it has learned"

    evaluated = {q.question for f in (out / "questions").glob("*-gold.jsonl") for q in read_questions(f)}
    training = list(read_questions(next(out.glob("training-*.jsonl"))))
    assert len(training) == 8 and not evaluated & {question.question for question in training}

    study = json.loads((out / LADDER).read_text())
    found = {(row["row"], row["passage"]): row for row in study["rows"]}
    assert set(found) == {
        *((name, "right") for name in ("closed_book", "rag", "untrained", "window_4", "rag_lora")),
        *((f"{name}, int8", "right") for name in ("untrained", "window_4")),
        *((f"rag_lora, untrained experts{where}", "right") for where in ("", " in all layers")),
        ("rag_lora, untrained experts", "shuffled"),
        ("window_4", "shuffled"),
        ("window_4", "constant"),
        ("rag_four", "right and 3 distractors"),
        ("untrained", "right and 3 distractors"),
    }
    trained, untrained = found["window_4", "right"], found["untrained", "right"]
    assert trained["unit_bytes"] == untrained["unit_bytes"] and trained["window"] == 4
    # Two layers, keys and values of two heads of 8 numbers: a byte each, and four for each vector's scale.
    assert found["window_4, int8", "right"]["unit_bytes"] == 2 * 2 * 2 * (8 + 4) == trained["unit_bytes"] * 3 // 4
    assert stand_in.arguments["window_4-0-int8"]["expert_dtype"] == "int8"
    assert trained["parameters"] > found["rag_lora", "right"]["parameters"] > 0 == untrained["parameters"]
    # Experts answer 6 of 8 questions (all but the multiples of 4), closed-book answers none, and the prompt all.
    assert trained["of_prompt"]["value"] == trained["of_rag_lora"]["value"] == pytest.approx(6 / 8)
    assert found["window_4", "shuffled"]["f1"]["value"] == 0 and found["window_4", "shuffled"]["n"] == 8

    again = run("--cells", "window_4,rag_lora")
    assert again.exit_code == 0 and len(stand_in.runs) == len(set(stand_in.runs)), "nothing is evaluated twice"
    more = run("--cells", "window_16", "--seeds", "1")
    assert more.exit_code == 0, more.output
    rows = json.loads((out / LADDER).read_text())["rows"]
    assert {(row["row"], row["seed"]) for row in rows} >= {("window_4", 0), ("window_16", 1)}

    report = CliRunner().invoke(main, ["real-llm", "report", str(out), "--out", str(tmp_path / "REAL.md")])
    assert report.exit_code == 0, report.output
    text = (tmp_path / "REAL.md").read_text()
    assert ", trained" in text and "| window_4 | 0 |" in text and "### With other passages" in text


def test_an_adapter_with_other_arguments_is_refused(run, stand_in):
    assert run("--cells", "rag_lora").exit_code == 0
    other = run("--cells", "rag_lora", "--lora-rank", "3")
    assert other.exit_code == 2 and "rank was 2, is 3" in stand_in.output


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--cells", "other"], "--cells other: not one of"), (["--seeds", "a"], "is not a list of seeds")],
)
def test_bad_input_is_one_line(run, more, message):
    result = run(*more)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_cell_names_are_unique():
    names = [cell.name for cell in cells((0, 2))]
    assert len(set(names)) == len(names)


def test_cells_have_valid_training_options():
    shared = ["--model", "llm", "--data", "questions.jsonl", "--out", "out"]
    for cell in cells((1, 2, 3)):
        if cell.options is not None:
            hypernetwork.make_context("hypernetwork", [*shared, *cell.options])  # which refuses unknown ones
    beside = {cell.name: cell.options for cell in cells((1, 2, 3)) if "--place" in (cell.options or ())}
    layers = {name: options[options.index("--layers") + 1] for name, options in beside.items()}
    assert layers == {"window_4_beside_mlp": "1,2,3", "window_4_beside_one_mlp": "2"}


def test_parallel_jobs_run_all_rows(run, stand_in, data, tmp_path):  # noqa: F811
    """Rows of a training start when it has ended, while others still run."""
    result = run("--cells", "window_4_robust,window_16", "--seeds", "0,1", "--jobs", "3")
    assert result.exit_code == 0, result.output
    found = {
        (row["row"], row["seed"], row["passage"])
        for row in json.loads((tmp_path / "study" / LADDER).read_text())["rows"]
    }
    passages = ["right", "shuffled", "constant", "right and 3 distractors"] + [f"{k} retrieved" for k in (1, 2, 4, 8)]
    assert found >= {("window_4_robust", seed, passage) for seed in (0, 1) for passage in passages}
    assert found >= {("window_16", seed, passage) for seed in (0, 1) for passage in passages[:3]}
    arguments = stand_in.arguments["window_4_robust-1-first-8"]
    assert (arguments["num_passages"], arguments["gates"]) == ("8", "uniform")
    ranked = list(read_questions(next((tmp_path / "study" / "questions").glob("*-ranked.jsonl"))))
    assert all([entry.rank for entry in q.passages] == list(range(1, len(q.passages) + 1)) for q in ranked)


def test_pretraining_on_passages_comes_first(run, stand_in, data, tmp_path):  # noqa: F811
    missing = run("--cells", "window_4_pretrained")
    assert missing.exit_code == 2 and "no file of passages for pretraining" in missing.output
    text = " ".join(f"word{number}" for number in range(60))
    rows = [{"id": str(number), "title": f"T{number}", "text": f"{number} {text}"} for number in range(9)]
    (data / "wikipedia_paragraphs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("--cells", "window_4_pretrained")
    assert result.exit_code == 0, result.output
    first, then = stand_in.trained
    assert "--pretrain" in first and then[then.index("--init") + 1] == first[first.index("--out") + 1]


def test_other_trainings_run_when_one_fails(run, stand_in, monkeypatch, tmp_path):
    def fails(command, **options):
        if "--window" in command and command[command.index("--window") + 1] == "16":
            return SimpleNamespace(returncode=2)
        return stand_in(command, **options)

    monkeypatch.setattr(subprocess, "run", fails)
    monkeypatch.setattr(subprocess, "Popen", started_by(fails))
    result = run("--cells", "window_16,window_4", "--jobs", "2")
    assert result.exit_code == 2 and "failed: window_16-0, training" in result.output
    rows = json.loads((tmp_path / "study" / LADDER).read_text())["rows"]
    assert ("window_4", "right") in {(row["row"], row["passage"]) for row in rows}
