"""Each task's questions as lm-eval gets them, from the hub's data sets and from the authors' files, and its scores."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from genpoe_plugin.data.questions import Question, write_questions
from genpoe_plugin.errors import InputError
from tests.data_sets import EXPECTED, EXPECTED_OF_OTHERS, HUB_ROWS, WORDINGS, write_original, write_parquet
from tests.test_tasks import TASK_FOLDER, SetAnswers, as_prompted, run

ORIGINALS = ("squad", "narrativeqa", "hotpotqa", "2wiki", "mquake", "popqa")
COMMON = ["em", "f1", "token_precision", "token_recall", "contains"]
METRICS = {
    **{"popqa": ["acc"], "narrativeqa": ["rouge_l"], "mquake": ["multihop_acc"]},
    **{"conflict": ["follows", "original"], "unanswerable": ["abstains", "answers_anyway"]},
}
ALL = EXPECTED | EXPECTED_OF_OTHERS


def ask(name: str, data: Any, generations: list[str]) -> tuple[dict[str, Any], SetAnswers]:
    """The task's scores, if its questions are answered so, and the model with what it was asked."""
    asked = [as_prompted(question) for question, _, _ in ALL[name]]
    results, model = run([f"genpoe_{name}"], data, dict(zip(asked, generations, strict=True)))
    return results["results"][f"genpoe_{name}"], model


def check_docs(name: str, model: SetAnswers) -> None:
    docs = [request.doc for request in model.requests]
    assert [(doc["question"], doc["answers"]) for doc in docs] == [asked[:2] for asked in ALL[name]]
    for doc, (_, _, passages) in zip(docs, ALL[name], strict=True):
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


CONFLICTS = [
    (Question("who won", ("Rome",), original_answers=("Denver Broncos", "Broncos")), "Rome"),
    (Question("who lost", ("Asti",), original_answers=("Carolina Panthers",)), "The Carolina Panthers, of course"),
    (Question("who played", ("New York",), original_answers=("Oslo",)), "Old York"),
    (Question("who sang", ("Como",), original_answers=("Lady Gaga",)), "It was Como, not Lady Gaga"),
]


def test_conflicts_are_followed_or_not(tmp_path: Path) -> None:
    path = tmp_path / "conflicts.jsonl"
    write_questions(path, [question for question, _ in CONFLICTS])
    answers = {as_prompted(question.question): answer for question, answer in CONFLICTS}
    results, model = run(["genpoe_conflict"], str(path), answers, log_samples=True)
    samples = results["samples"]["genpoe_conflict"]
    assert [sample["follows"] for sample in samples] == [1, 0, 0, 1]
    assert [sample["original"] for sample in samples] == [0, 1, 0, 1]
    assert [sample["em"] for sample in samples] == [1, 0, 0, 0]
    assert [sample["f1"] for sample in samples] == pytest.approx([1, 0, 2 / 4, 2 / 7])
    assert [request.doc["original_answers"] for request in model.requests] == [
        list(question.original_answers) for question, _ in CONFLICTS
    ]
    scores = results["results"]["genpoe_conflict"]
    assert (scores["follows,none"], scores["original,none"]) == (0.5, 0.5)
    assert results["higher_is_better"]["genpoe_conflict"]["original"] is False


def test_conflicts_without_original_answers_have_no_such_metric(tmp_path: Path) -> None:
    path = tmp_path / "conflicts.jsonl"
    path.write_text(json.dumps({"question": "who won", "answers": ["Rome"], "counterfactual": True}))
    results, _ = run(["genpoe_conflict"], str(path), {"Who won?": "Rome"})
    assert results["results"]["genpoe_conflict"]["follows,none"] == 1.0
    assert "original,none" not in results["results"]["genpoe_conflict"]


def test_the_prior_is_that_of_the_original_answer(hub: Path) -> None:
    results, model = run(["genpoe_conflict_nats"], None, {})
    assert [request.args[1] for request in model.requests] == [" Denver Broncos"]
    scores = results["results"]["genpoe_conflict_nats"]
    assert (scores["nats,none"], scores["nats_per_byte,none"]) == (len(" Denver Broncos"), 1.0)


@pytest.mark.parametrize(("name", "generations"), [("conflict", ["Rome"]), ("unanswerable", ["unanswerable"])])
def test_the_other_tasks_from_the_hub(hub: Path, name: str, generations: list[str]) -> None:
    scores, model = ask(name, None, generations)
    check_docs(name, model)
    first, second = METRICS[name]
    assert (scores[f"{first},none"], scores[f"{second},none"]) == (1.0, 0.0)


def test_answers_to_unanswerable_questions(tmp_path: Path) -> None:
    """Questions with an answer, as SQuAD 2.0 has them, are not asked."""
    (row,) = HUB_ROWS["unanswerable"]
    answered = {**HUB_ROWS["squad"][0], "question": "Not asked?"}
    generations = {"Q0?": "Unanswerable.", "Q1?": "the Panthers", "Q2?": "\n", "Q3?": "It is not mentioned"}
    path = tmp_path / "squad2.jsonl"
    rows = [answered, *({**row, "question": question} for question in generations)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, _ = run(["genpoe_unanswerable"], {"genpoe_unanswerable": str(path)}, generations, log_samples=True)
    samples = results["samples"]["genpoe_unanswerable"]
    assert [sample["abstains"] for sample in samples] == [1, 0, 1, 1]
    assert [sample["answers_anyway"] for sample in samples] == [0, 1, 0, 0]
    assert results["results"]["genpoe_unanswerable"]["answers_anyway,none"] == 0.25


@pytest.mark.parametrize(
    ("task", "originals", "message"),
    [
        ("genpoe_unanswerable", [None], "no questions without an answer"),
        ("genpoe_conflict_nats", [None, None], '2 of 2 questions have no "original_answers"; `genpoe data conflicts`'),
        ("genpoe_conflict", [None, ["b"]], '1 of 2 questions have no "original_answers"; `genpoe data conflicts`'),
    ],
)
def test_unsuitable_questions_are_one_line(tmp_path: Path, task: str, originals: list[Any], message: str) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": "q", "answers": ["a"], "original_answers": original} for original in originals]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as error:
        run([task], str(path), {})
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_all_tasks_at_once(hub: Path) -> None:
    """The group's EM is the plain mean of the tasks'."""
    right = {as_prompted(question): answers[0] for name in EXPECTED for question, answers, _ in EXPECTED[name]}
    right[as_prompted(EXPECTED["squad"][0][0])] = "wrong"
    results, model = run(["genpoe_all"], None, right)
    assert len(model.requests) == sum(map(len, EXPECTED.values()))
    assert results["results"]["genpoe_squad"]["em,none"] == 0.5
    assert results["groups"]["genpoe_all"]["em,none"] == pytest.approx(7.5 / 8)


def test_the_groups_mean_has_its_standard_error(tmp_path: Path) -> None:
    """That of a plain mean over independent tasks, from each task's answers."""
    right = {"genpoe_nq": [1, 1, 1, 0], "genpoe_tqa": [1, 0, 0]}
    files, generations = {}, {}
    for task, column in right.items():
        asked = [f"{task} {number}?" for number in range(len(column))]
        files[task] = str(tmp_path / f"{task}.jsonl")
        rows = [{"question": question, "answers": ["yes"]} for question in asked]
        Path(files[task]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = ["yes" if value else "wrong" for value in column]
        generations |= dict(zip(map(as_prompted, asked), answers, strict=True))
    group = run(["genpoe"], files, generations)[0]["groups"]["genpoe"]
    assert group["em,none"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    error = sum(statistics.variance(column) / len(column) for column in right.values()) ** 0.5 / 2
    for metric in ("em", "f1", "contains", "token_precision", "token_recall"):
        assert group[f"{metric}_stderr,none"] == pytest.approx(error), metric


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

    likelihoods = {f"{task}_nats" for task in HUB if task != "genpoe_unanswerable"}
    assert {*rows} | likelihoods == {*manager.all_subtasks}
    for task, (name, split) in HUB.items():
        assert f"[{name}](https://huggingface.co/datasets/{name})" in rows[task]
        assert f"| {split} " in rows[task]
        for metric in METRICS.get(task.removeprefix("genpoe_"), []):
            assert f"`{metric}`" in rows[task]
