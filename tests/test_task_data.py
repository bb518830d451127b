"""Each task's questions as lm-eval gets them, from the hub's data sets and from the authors' files, and its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from tests.data_sets import EXPECTED, HUB_ROWS, WORDINGS, write_original, write_parquet
from tests.test_tasks import TASK_FOLDER, SetAnswers, as_prompted, run

ORIGINALS = ("squad", "narrativeqa", "hotpotqa", "2wiki", "mquake", "popqa")
COMMON = ["em", "f1", "token_precision", "token_recall", "contains"]
METRICS = {"popqa": ["acc"], "narrativeqa": ["rouge_l"], "mquake": ["multihop_acc"]}


def ask(name: str, data: Any, generations: list[str]) -> tuple[dict[str, Any], SetAnswers]:
    """The task's scores, if its questions are answered so, and the model with what it was asked."""
    asked = [as_prompted(question) for question, _, _ in EXPECTED[name]]
    results, model = run([f"genpoe_{name}"], data, dict(zip(asked, generations, strict=True)))
    return results["results"][f"genpoe_{name}"], model


def check_docs(name: str, model: SetAnswers) -> None:
    docs = [request.doc for request in model.requests]
    assert [(doc["question"], doc["answers"]) for doc in docs] == [asked[:2] for asked in EXPECTED[name]]
    for doc, (_, _, passages) in zip(docs, EXPECTED[name], strict=True):
        assert [(ctx["title"], ctx["text"], ctx["has_answer"]) for ctx in doc.get("ctxs", [])] == passages
        assert all(isinstance(ctx["id"], str) and ctx["id"] for ctx in doc.get("ctxs", []))
        assert ("ctxs" in doc) == bool(passages)
        assert ("case" in doc) == (name == "mquake")
        json.dumps(doc)  # as lm-eval does to hash it


@pytest.mark.parametrize("name", EXPECTED)
def test_from_the_hub(hub: Path, name: str) -> None:
    gold = [answers[-1] for _, answers, _ in EXPECTED[name]]
    scores, model = ask(name, None, gold)
    check_docs(name, model)
    for metric in [*COMMON, *METRICS.get(name, [])]:
        assert scores[f"{metric},none"] == pytest.approx(1.0), metric
    metrics = {key.split(",")[0] for key in scores if key.endswith(",none") and "stderr" not in key}
    assert metrics == {*COMMON, *METRICS.get(name, [])}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_data_set_has_a_likelihood_task(hub: Path, name: str) -> None:
    results, model = run([f"genpoe_{name}_nats"], None, {})
    check_docs(name, model)
    firsts = [f" {answers[0]}" for _, answers, _ in EXPECTED[name]]
    assert [request.args[1] for request in model.requests] == firsts
    assert results["results"][f"genpoe_{name}_nats"]["nats,none"] == pytest.approx(sum(map(len, firsts)) / len(firsts))


@pytest.mark.parametrize("name", ORIGINALS)
def test_from_the_authors_files(tmp_path: Path, name: str) -> None:
    path = write_original(name, tmp_path)
    scores, model = ask(name, {f"genpoe_{name}": str(path)}, ["wrong"] * len(EXPECTED[name]))
    check_docs(name, model)
    assert scores["em,none"] == scores["f1,none"] == 0.0


def test_from_a_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "validation-00000-of-00001.parquet", HUB_ROWS["hotpotqa"])
    scores, model = ask("hotpotqa", str(path), ["Yes, they were"])
    check_docs("hotpotqa", model)
    assert (scores["em,none"], scores["f1,none"]) == (0.0, pytest.approx(0.5))


def test_popqa_counts_answers_within_the_first_line(hub: Path) -> None:
    scores, _ = ask("popqa", None, [" He was a politician.\nand more"])
    assert (scores["acc,none"], scores["em,none"]) == (1.0, 0.0)
    assert scores["f1,none"] == pytest.approx(2 * 1 / (3 + 1))  # "he was politician" against "politician"
    scores, _ = ask("popqa", None, [" An actor\npolitician"])
    assert (scores["acc,none"], scores["em,none"], scores["f1,none"]) == (0.0, 0.0, 0.0)


def test_narrativeqa_takes_the_better_of_two_answers(hub: Path) -> None:
    scores, _ = ask("narrativeqa", None, [" In Phoenix, a student\n A student in Phoenix"])
    assert scores["em,none"] == 0.0
    assert scores["rouge_l,none"] == pytest.approx(2 * 2 / (4 + 4))  # the longest common subsequence has two words
    assert scores["f1,none"] == pytest.approx(1.0)  # the same words


def test_a_case_of_mquake_is_right_if_a_wording_is(tmp_path: Path) -> None:
    (row,) = HUB_ROWS["mquake"]
    others = [f"{wording} And then?" for wording in WORDINGS]
    rows = [row, {**row, "case_id": 2, "questions": others}, {**row, "case_id": 3, "questions": ["A third case?"]}]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(rows))
    answers = {WORDINGS[0]: "London", WORDINGS[1]: " Washington", others[0]: "no", others[1]: "Paris"}
    results, _ = run(["genpoe_mquake"], str(path), {**answers, "A third case?": "Washington, D.C."}, log_samples=True)
    scores = results["results"]["genpoe_mquake"]
    assert scores["em,none"] == pytest.approx(2 / 5)
    assert scores["multihop_acc,none"] == pytest.approx(2 / 3)
    assert [sample["em"] for sample in results["samples"]["genpoe_mquake"]] == [0.0, 1.0, 0.0, 0.0, 1.0]


def test_all_tasks_at_once(hub: Path) -> None:
    """The group's EM is the plain mean of the tasks'."""
    right = {as_prompted(question): answers[0] for name in EXPECTED for question, answers, _ in EXPECTED[name]}
    right[as_prompted(EXPECTED["squad"][0][0])] = "wrong"
    results, model = run(["genpoe_all"], None, right)
    assert len(model.requests) == sum(map(len, EXPECTED.values()))
    assert results["results"]["genpoe_squad"]["em,none"] == 0.5
    assert results["groups"]["genpoe_all"]["em,none"] == pytest.approx(7.5 / 8)


def test_few_shot_examples_are_the_same_for_all(hub: Path) -> None:
    right = {as_prompted(question): "x" for name in EXPECTED for question, _, _ in EXPECTED[name]}
    _, model = run(["genpoe_all"], None, right, num_fewshot=2)
    assert len({request.args[0].rsplit("\n\n", 1)[0] for request in model.requests}) == 1


def test_the_readme_has_every_task() -> None:
    """tasks/README.md: a row for each, with the data set that it asks."""
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    rows = {
        line.split("|")[1].strip(" `"): line
        for line in (TASK_FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `genpoe_")
    }
    from tasks.open_qa import HUB

    assert {*rows} | {f"{task}_nats" for task in HUB} == {*manager.all_subtasks}
    for task, (name, split) in HUB.items():
        assert f"[{name}](https://huggingface.co/datasets/{name})" in rows[task]
        assert f"| {split} " in rows[task]
        for metric in METRICS.get(task.removeprefix("genpoe_"), []):
            assert f"`{metric}`" in rows[task]
