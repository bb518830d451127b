"""The stock command on every data set: passages that come with the questions reach experts and prompts, no index."""

from __future__ import annotations

import json
import sys

import pytest
from lm_eval import evaluator
from lm_eval._cli import HarnessCLI
from lm_eval.tasks._index import TaskIndex

from genpoe_plugin import registration
from genpoe_plugin.comparison.runs import QuestionBook, read_runs
from genpoe_plugin.prompts import closed_book_prompt, cut_passages, rag_prompt
from tests.data_sets import EXPECTED, EXPECTED_OF_OTHERS, write_original

ORIGINALS = ("squad", "narrativeqa", "hotpotqa", "2wiki", "mquake", "popqa")


@pytest.fixture
def command(monkeypatch, tmp_path, llm_dir):
    """``command(model, model_args, tasks, *options)``: run it; the logged samples by task, in order."""
    registration.install()
    # Reading thousands of task files, and asking the machine about itself, is most of what the command does.
    build = TaskIndex.build
    monkeypatch.setattr(
        TaskIndex, "build", staticmethod(lambda _, **options: build([registration.task_folder()], **options))
    )
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)

    def run(model: str, model_args: str, tasks: str, *options: str):
        out = tmp_path / "out"
        words = f"lm_eval --model {model} --tasks {tasks} --device cpu --batch_size 4 --log_samples --output_path {out}"
        arguments = ["--gen_kwargs", "max_gen_toks=6", "--model_args", f"pretrained={llm_dir}{model_args}", *options]
        monkeypatch.setattr(sys, "argv", [*words.split(), *arguments])
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
        found = {}
        for file in out.glob("*/samples_*.jsonl"):
            samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
            found[file.name.removeprefix("samples_").rpartition("_")[0]] = samples
        (results,) = out.glob("*/results_*.json")
        return found, json.loads(results.read_text())

    return run


@pytest.mark.parametrize("mode", ["rag", "genpoe"])
def test_passages_of_the_data_answer(command, hub, hypernetwork_dir, by_hand, tokenizer, tmp_path, mode):
    experts = f",hypernetwork={hypernetwork_dir}" if mode == "genpoe" else ""
    trace = tmp_path / "trace.jsonl"
    samples, results = command("genpoe", f",mode={mode},num_passages=2,trace={trace}{experts}", "genpoe_all")
    assert {*samples} == {f"genpoe_{name}" for name in EXPECTED}
    traced = {(line["task"], line["question"]): line for line in map(json.loads, trace.read_text().splitlines())}
    for name, questions in EXPECTED.items():
        task = f"genpoe_{name}"
        for sample, (question, _, passages) in zip(samples[task], questions, strict=True):
            strings = [f"{title}: {text}" if title else text for title, text, _ in passages[:2]]
            strings = cut_passages(strings, tokenizer)
            if mode == "rag":
                expected, gap = by_hand.generate(rag_prompt(question, strings), [], [], 0, tokens=6)
            else:
                gates = [1 / len(strings) for _ in strings]
                expected, gap = by_hand.generate(closed_book_prompt(question), strings, gates, 0, tokens=6)
            assert gap > 1e-4, f"{name}: a near tie; choose another question"
            assert sample["resps"] == [[expected]], name
            marks = [item["has_answer"] for item in traced[task, question]["passages"]]
            assert marks == [gold for _, _, gold in passages[:2]]
    assert results["groups"]["genpoe_all"]["em,none"] == 0.0
    assert 0.0 <= results["results"]["genpoe_mquake"]["multihop_acc,none"] <= 1.0


def test_conflicts_and_unanswerable_questions(command, hub, hypernetwork_dir, by_hand, tokenizer, tmp_path):
    tasks = "genpoe_conflict,genpoe_unanswerable,genpoe_conflict_nats"
    samples, results = command("genpoe", f",mode=genpoe,hypernetwork={hypernetwork_dir}", tasks)
    for name, ((question, answers, ((title, text, _),)),) in EXPECTED_OF_OTHERS.items():
        strings = cut_passages([f"{title}: {text}" if title else text], tokenizer)
        expected, gap = by_hand.generate(closed_book_prompt(question), strings, [1.0], 0, tokens=6)
        assert gap > 1e-4, f"{name}: a near tie; choose another question"
        (sample,) = samples[f"genpoe_{name}"]
        assert sample["resps"] == [[expected]]
        assert sample["doc"]["answers"] == answers
    (question, _, ((_, text, _),)) = EXPECTED_OF_OTHERS["conflict"][0]
    likelihood = by_hand.score(
        closed_book_prompt(question), " Denver Broncos", cut_passages([text], tokenizer), [1.0], 0
    )
    assert samples["genpoe_conflict_nats"][0]["nats"] == pytest.approx(-likelihood, abs=1e-3)
    # `genpoe compare` reads all metrics.
    runs, left_out = read_runs([tmp_path / "out"], QuestionBook())
    assert not left_out
    assert {run.task: {*run.scores} for run in runs} == {
        "genpoe_conflict": {"follows", "original", "em", "f1"},
        "genpoe_unanswerable": {"abstains", "answers_anyway"},
        "genpoe_conflict_nats": {"nats", "nats_per_byte"},
    }
    assert not next(run for run in runs if run.task == "genpoe_unanswerable").higher_is_better("answers_anyway")
    assert results["results"]["genpoe_conflict"]["follows,none"] == 0.0


def test_gold_passages_of_the_authors_files(command, hypernetwork_dir, tmp_path):
    files = {f"genpoe_{name}": str(write_original(name, tmp_path / name)) for name in ORIGINALS}
    trace = tmp_path / "trace.jsonl"
    command(
        *["genpoe", f",mode=genpoe,passages=gold,trace={trace},hypernetwork={hypernetwork_dir}", ",".join(files)],
        *["--metadata", json.dumps({"genpoe_data": files})],
    )
    lines = list(map(json.loads, trace.read_text().splitlines()))
    assert len(lines) == sum(len(EXPECTED[name]) for name in ORIGINALS)
    for line in lines:
        (passages,) = [
            passages
            for question, _, passages in EXPECTED[line["task"].removeprefix("genpoe_")]
            if question == line["question"]
        ]
        kept = [(item["title"], item["has_answer"]) for item in line["passages"]]
        assert kept == [(title, gold) for title, _, gold in passages if gold]


def test_the_plain_model_of_lm_eval_runs_them_as_well(command, hub):
    samples, results = command("hf", "", "genpoe_all", "--limit", "1")
    assert {len(found) for found in samples.values()} == {1}
    assert "rouge_l,none" in results["results"]["genpoe_narrativeqa"]
    assert results["results"]["genpoe_mquake"]["multihop_acc_stderr,none"] == "N/A"
