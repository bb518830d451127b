"""The trace is saved beside lm-eval's results, and `genpoe compare` reads it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM

from genpoe_plugin.comparison.leaderboard import compare
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block
from genpoe_plugin.selection.trace import Trace


@pytest.fixture
def saved(evaluate):
    """``saved(lm, output_path, **options)`` evaluates and saves results as the command does."""

    def run(lm: HFLM, output_path: Path, **options: Any) -> None:
        tracker = EvaluationTracker(output_path=str(output_path))
        results = evaluate(lm, "genpoe_demo", evaluation_tracker=tracker, gen_kwargs="max_gen_toks=4", **options)
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name="genpoe_demo", samples=samples["genpoe_demo"])

    return run


def dates(folder: Path, kind: str) -> list[str]:
    return [path.stem.removeprefix(kind) for path in folder.rglob(f"{kind}*")]


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_the_prompt_that_the_llm_read_is_beside_the_samples(make_lm, saved, docs, expected_row, tmp_path, single):
    out = tmp_path / "out"
    saved(make_lm("rag"), out / "results.json" if single else out)
    (path,) = out.rglob("trace_*.jsonl")
    (samples,) = path.parent.glob("samples_genpoe_demo_*.jsonl")
    assert dates(out, "trace_") == dates(out, "results_") == [samples.stem.removeprefix("samples_genpoe_demo_")]
    lines = {line["prompt_hash"]: line for line in map(json.loads, path.read_text().splitlines())}
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(logged) == len(lines) == len(docs)
    for doc, sample in zip(docs, sorted(logged, key=lambda sample: sample["doc_id"]), strict=True):
        line = lines[sample["prompt_hash"]]
        assert line["doc_id"] == sample["doc_id"]
        assert line["prompt"] == knowledge_block(expected_row(doc)[0]) + closed_book_prompt(doc["question"])
        assert sample["arguments"]["gen_args_0"]["arg_0"] == closed_book_prompt(doc["question"])


def test_it_is_what_a_comparison_reads(make_lm, saved, docs, tmp_path):
    saved(make_lm("rag"), tmp_path)
    comparison = compare([tmp_path], draws=20)
    assert comparison.notes == ()
    ((system,),) = (board.systems for board in comparison.boards)
    questions = [comparison.book.texts[number] for number in system.runs[0].questions]
    lines = [system.used.line(place) for place in range(len(docs))]
    assert [line["question"] for line in lines] == questions
    assert all(closed_book_prompt(line["question"]) in line["prompt"] for line in lines)


def test_docs_that_lm_eval_numbers_otherwise_in_its_log_are_found(make_lm, saved, tmp_path):
    saved(make_lm("rag"), tmp_path, samples={"genpoe_demo": [1, 4]})
    comparison = compare([tmp_path], draws=20)
    assert comparison.notes == ()
    (system,) = comparison.boards[0].systems
    assert [system.runs[0].sample(place)["doc_id"] for place in (0, 1)] == [1, 4]
    for place in (0, 1):
        assert system.used.line(place)["question"] == system.runs[0].sample(place)["doc"]["question"]


def test_what_a_cache_answers_is_in_it(make_lm, saved, docs, tmp_path):
    for limit in (None, 5):
        saved(make_lm("rag"), tmp_path / str(limit), use_cache=str(tmp_path / "cache"), limit=limit)
        comparison = compare([tmp_path / str(limit)], draws=20)
        assert comparison.notes == ()
        assert len(comparison.boards[0].systems[0].used.offsets) == (limit or len(docs))


def test_a_trace_that_was_asked_for_elsewhere_is_there_alone(make_lm, saved, tmp_path):
    saved(make_lm("rag", trace=str(tmp_path / "mine.jsonl")), tmp_path / "out", limit=1)
    assert (tmp_path / "mine.jsonl").is_file() and dates(tmp_path, "trace_") == []


def test_other_models_have_none(llm, tokenizer, make_lm, saved, tmp_path):
    make_lm("closed_book")
    saved(HFLM(pretrained=llm, tokenizer=tokenizer, device="cpu"), tmp_path, limit=1)
    assert dates(tmp_path, "trace_") == [] != dates(tmp_path, "results_")


def test_a_trace_that_cannot_be_written_costs_nothing_else(make_lm, saved, tmp_path, monkeypatch, caplog):
    def full(self, path=None):
        if path is not None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trace, "write", full)
    with caplog.at_level(logging.WARNING):
        saved(make_lm("rag"), tmp_path, limit=1)
    assert "the trace cannot be written (No space left on device)" in caplog.text
    assert len(dates(tmp_path, "samples_")) == 1
