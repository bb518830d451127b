"""Two processes as `accelerate launch` starts them, on CPU over gloo, against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from genpoe_plugin.lm.hf import GenPoELM

CONTROLS = ("retrieved", "shuffled", "random", "constant")
OTHER_MODES = ("closed_book", "rag", "genpoe_rag")


@pytest.fixture(scope="module")
def two_runs(llm_dir, hypernetwork_dir, index_dir, evaluate, in_two_processes, tmp_path_factory):
    """``run(folder)``: all evaluations of this file, by name; in one process, and in each of two."""
    arguments = {"pretrained": str(llm_dir), "hypernetwork": str(hypernetwork_dir), "device": "cpu", "batch_size": 2}

    def report(lm: HFLM, *tasks: str, **options: Any) -> dict[str, Any]:
        results = evaluate(lm, *tasks, **options)
        facts = {"rank": lm.rank, "world_size": lm.world_size}
        if results is None:
            return facts
        samples = {
            f"{task} {sample['doc_id']}": sample["filtered_resps"]
            for task, found in results["samples"].items()
            for sample in sorted(found, key=lambda sample: sample["doc_id"])
        }
        return facts | {"samples": samples, "results": results["results"]}

    def run(folder: Path) -> dict[str, Any]:
        reports = {}
        for control in CONTROLS:
            # An odd number of docs, so that one of two processes gets a request of padding.
            lm = GenPoELM(**arguments, passages=control, trace=str(folder / f"{control}.jsonl"))
            reports[control] = report(lm, "genpoe_demo", limit=5, gen_kwargs="max_gen_toks=8")
        for mode in OTHER_MODES:
            without = dict(arguments) if mode == "genpoe_rag" else {**arguments, "hypernetwork": None}
            lm = GenPoELM(**without, mode=mode)
            reports[mode] = report(lm, "genpoe_demo", limit=5, gen_kwargs="max_gen_toks=8")
        trace = str(folder / "others.jsonl")
        lm = GenPoELM(**arguments, mode="genpoe_rag", index=str(index_dir), num_passages=2, trace=trace)
        reports["others"] = report(lm, "local_choice", "local_rolling", "local_text")
        for time in ("cached", "again"):
            lm = GenPoELM(**arguments, trace=str(folder / "cached.jsonl"))
            reports[time] = report(lm, "genpoe_demo", gen_kwargs="max_gen_toks=8", use_cache=str(folder / "cache"))
        return reports

    directories = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    one, two = directories
    alone = run(one)
    first, second = in_two_processes(lambda: run(two))
    return (alone, one), (first, two), (second, two)


def test_each_process_has_its_share(two_runs):
    for (reports, _), rank in zip(two_runs[1:], range(2), strict=True):
        assert all(report["rank"] == rank and report["world_size"] == 2 for report in reports.values())
        assert all(("results" in report) == (rank == 0) for report in reports.values())


@pytest.mark.parametrize("name", [*CONTROLS, *OTHER_MODES, "cached", "again"])
def test_two_processes_answer_like_one(two_runs, name):
    (alone, _), (shared, _), _ = two_runs
    assert shared[name]["samples"] == alone[name]["samples"]
    assert shared[name]["results"] == alone[name]["results"]
    assert len(alone[name]["samples"]) == (6 if name in ("cached", "again") else 5)


@pytest.mark.parametrize("name", [*CONTROLS, "cached"])
def test_one_trace_of_both_with_the_passages_of_one_process(two_runs, name):
    (_, one), (_, two), _ = two_runs
    assert (two / f"{name}.jsonl").read_text() == (one / f"{name}.jsonl").read_text() != ""
    assert not list(two.glob("*.rank*.jsonl"))


def test_any_other_task(two_runs):
    """Scores from batches of another size differ by rounding."""
    (alone, one), (shared, two), _ = two_runs
    assert set(shared["others"]["samples"]) == set(alone["others"]["samples"])
    for key, response in alone["others"]["samples"].items():
        if key.startswith("local_text"):
            assert shared["others"]["samples"][key] == response
        else:
            assert _scores(shared["others"]["samples"][key]) == pytest.approx(_scores(response))
    perplexities = [run["others"]["results"]["local_rolling"]["word_perplexity,none"] for run in (alone, shared)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    lines = [[_passages(line) for line in (folder / "others.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert lines[0] == lines[1]


def _scores(response: Any) -> list[float]:
    """Of running text, or of choices."""
    return [float(part if isinstance(part, float) else part[0]) for part in response]


def _passages(line: str) -> tuple[Any, ...]:
    entry = json.loads(line)
    return entry["task"], entry["doc_id"], entry["question"], [passage["id"] for passage in entry["passages"]]


def test_the_controls_do_mix_the_questions_of_both(two_runs):
    """Else equal passages would say nothing: alone, a process with docs 1 and 3 could not have shuffled them."""
    (_, one), *_ = two_runs
    traces = {
        control: [_passages(line) for line in (one / f"{control}.jsonl").read_text().splitlines()]
        for control in CONTROLS
    }
    for control in CONTROLS[1:]:
        assert traces[control] != traces["retrieved"]
    givers = {tuple(ids): doc for _, doc, _, ids in traces["retrieved"]}
    pairs = [(doc, givers[tuple(ids)]) for _, doc, _, ids in traces["shuffled"] if ids]
    assert any(doc % 2 != giver % 2 for doc, giver in pairs)


def test_each_process_has_its_own_cache(two_runs):
    _, (_, two), _ = two_runs
    assert sorted(path.name for path in two.glob("*.db")) == ["cache_rank0.db", "cache_rank1.db"]
