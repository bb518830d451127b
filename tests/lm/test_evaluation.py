"""lm-eval's own evaluation of the tasks with the model class, on documents with passages as DPR's files have them."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from genpoe_plugin.prompts import closed_book_prompt, rag_prompt

TASK_FOLDER = Path(__file__).parents[2] / "tasks"


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_both_tasks_in_every_mode(make_lm, docs, by_hand, expected_row, tmp_path, mode):
    """Research code: crashes on both data sets, where it tokenises a question's list of passages as if it were text."""
    halves = {"genpoe_nq": docs[:3], "genpoe_tqa": docs[3:]}
    expected = {}
    for doc in docs:
        strings, gates = expected_row(doc)
        prompt, start = closed_book_prompt(doc["question"]), 0
        if "rag" in mode and strings:
            prompt = rag_prompt(doc["question"], strings)
            start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
        if "genpoe" not in mode:
            strings = gates = ()
        expected[doc["question"]] = by_hand.generate(prompt, strings, gates, start, tokens=32)
    # One question of each task has the answer that the model gives, so that the scores are not all zero.
    data = {}
    for task, half in halves.items():
        gold = [{**doc, "answers": [expected[doc["question"]][0]] if doc is half[0] else ["no"]} for doc in half]
        data[task] = str(tmp_path / f"{task}.json")
        Path(data[task]).write_text(json.dumps(gold))

    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"genpoe_data": data})
    results = lm_eval.simple_evaluate(model=make_lm(mode), tasks=["genpoe"], task_manager=manager, log_samples=True)
    for task, half in halves.items():
        records = sorted(results["samples"][task], key=lambda record: record["doc_id"])
        assert [record["doc"]["question"] for record in records] == [doc["question"] for doc in half]
        for record in records:
            answer, gap = expected[record["doc"]["question"]]
            assert gap > 1e-4, "a near tie; choose another document"
            assert record["resps"][0][0] == answer
        assert results["results"][task]["em,none"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_nats_in_every_mode(make_lm, docs, by_hand, expected_row, tmp_path, mode):
    data = tmp_path / "docs.json"
    data.write_text(json.dumps(docs))
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"genpoe_data": str(data)})
    results = lm_eval.simple_evaluate(
        model=make_lm(mode), tasks=["genpoe_nq_nats"], task_manager=manager, log_samples=True
    )
    records = sorted(results["samples"]["genpoe_nq_nats"], key=lambda record: record["doc_id"])
    for doc, record in zip(docs, records, strict=True):
        strings, gates = expected_row(doc)
        prompt, start = closed_book_prompt(doc["question"]), 0
        if "rag" in mode and strings:
            prompt = rag_prompt(doc["question"], strings)
            start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
        if "genpoe" not in mode:
            strings = gates = ()
        expected = by_hand.score(prompt, f" {doc['answers'][0]}", strings, gates, start)
        assert record["nats"] == pytest.approx(-expected, abs=1e-3)
    mean = sum(record["nats"] for record in records) / len(docs)
    assert results["results"]["genpoe_nq_nats"]["nats,none"] == pytest.approx(mean)
