"""The tasks as lm-eval sees them: loading, prompts, few-shot, scores. Models here are stand-ins with set answers."""

from __future__ import annotations

import gzip
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from genpoe_plugin.errors import InputError

TASK_FOLDER = Path(__file__).parents[1] / "tasks"

QUESTIONS = [
    ("who wrote the hobbit", ["J.R.R. Tolkien", "Tolkien"], "JRR Tolkien\nmore text"),
    ("where is the gateway arch?", ["St. Louis", "St. Louis, Missouri"], " St. Louis."),
    ("when was rome founded", ["753 BC"], "in 753 BC"),
    ("Who sings it", ["The Beatles"], "\n \n The Beatles \nwho else"),  # an answer may begin on a new line
    ("how long is it", ["9 km"], " \n\t\n"),
    ("is there more", ["More"], "No.\nMore"),
]
EM = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
F1 = [1.0, 1.0, 0.8, 1.0, 0.0, 0.0]
PRECISION = [1.0, 1.0, 2 / 3, 1.0, 0.0, 0.0]
RECALL = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
CONTAINS = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
SCORES = {"em": EM, "f1": F1, "token_precision": PRECISION, "token_recall": RECALL, "contains": CONTAINS}
CTXS = [{"id": "7", "title": "Hobbit", "text": "By Tolkien.", "score": "81.5", "has_answer": True}]


class SetAnswers(LM):
    """Answers a prompt by its last question, and keeps the requests."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        super().__init__()
        self.answers = answers
        self.requests: list[Instance] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.requests += requests
        return [self.answers[re.findall(r"Question: (.*)\nAnswer:", r.args[0])[-1]] for r in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """A nat for each character."""
        self.requests += requests
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        raise NotImplementedError


def as_prompted(question: str) -> str:
    return question[0].upper() + question[1:].rstrip("?") + "?"


def evaluate(tasks: list[str], data: Any, **options: Any) -> tuple[dict[str, Any], SetAnswers]:
    return run(tasks, data, {as_prompted(question): generation for question, _, generation in QUESTIONS}, **options)


def run(tasks: list[str], data: Any, answers: Mapping[str, str], **options: Any) -> tuple[dict[str, Any], SetAnswers]:
    model = SetAnswers(answers)
    manager = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"pretrained": "LLM", "genpoe_data": data}
    )
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)
    assert results is not None
    return results, model


def write_questions(path: Path, *, ctxs: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """QUESTIONS in the form and compression that the name asks for."""
    extra = {} if ctxs is None else {"ctxs": ctxs}
    dpr = [{"question": question, "answers": answers, **extra} for question, answers, _ in QUESTIONS]
    if ".tsv" in path.name:
        text = "".join(f"{question}\t{answers!r}\n" for question, answers, _ in QUESTIONS)
    elif "nq_open" in path.name:
        text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a, _ in QUESTIONS)
    elif ".jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in dpr)
    else:
        text = json.dumps(dpr)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "nq_open.jsonl")


@pytest.mark.parametrize(
    "name", ["dpr.json", "dpr.json.gz", "dpr.jsonl", "nq_open.jsonl", "nq_open.jsonl.gz", "qas.tsv", "qas.tsv.gz"]
)
def test_every_form_of_file_gives_the_same_scores(tmp_path: Path, name: str) -> None:
    results, model = evaluate(["genpoe_nq"], str(write_questions(tmp_path / name)))
    scores = results["results"]["genpoe_nq"]
    for metric, values in SCORES.items():
        assert scores[f"{metric},none"] == pytest.approx(statistics.mean(values)), metric
        # The standard error of a mean, in closed form.
        assert scores[f"{metric}_stderr,none"] == pytest.approx(statistics.stdev(values) / len(values) ** 0.5), metric
    assert [request.doc["question"] for request in model.requests] == [question for question, _, _ in QUESTIONS]


def test_prompt_and_generation_arguments(questions: Path) -> None:
    _, model = evaluate(["genpoe_nq"], str(questions))
    assert [request.args[0] for request in model.requests] == [
        "Question: Who wrote the hobbit?\nAnswer:",
        "Question: Where is the gateway arch?\nAnswer:",
        "Question: When was rome founded?\nAnswer:",
        "Question: Who sings it?\nAnswer:",
        "Question: How long is it?\nAnswer:",
        "Question: Is there more?\nAnswer:",
    ]
    assert model.requests[0].args[1] == {"until": ["\nQuestion:"], "do_sample": False, "max_gen_toks": 32}


def test_passages_of_the_file_reach_the_model(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "dpr.json", ctxs=CTXS)
    _, model = evaluate(["genpoe_nq"], str(path))
    (ctx,) = model.requests[0].doc["ctxs"]
    assert {key: ctx[key] for key in CTXS[0]} == {**CTXS[0], "score": 81.5}
    json.dumps(model.requests[0].doc)  # as lm-eval does to hash it


def test_no_passages_no_field(questions: Path) -> None:
    _, model = evaluate(["genpoe_nq"], str(questions))
    assert set(model.requests[0].doc) == {"question", "answers"}


def test_few_shot_examples_come_first_and_end_in_their_answer(questions: Path) -> None:
    _, model = evaluate(["genpoe_nq"], str(questions), num_fewshot=3)
    for request, (question, _, _) in zip(model.requests, QUESTIONS, strict=True):
        *examples, last = request.args[0].split("\n\n")
        assert last == f"Question: {as_prompted(question)}\nAnswer:"
        assert len(examples) == 3
        assert all(re.fullmatch(r"Question: [A-Z].*\?\nAnswer: \S.*", example) for example in examples)


def test_the_group_is_the_plain_mean(tmp_path: Path) -> None:
    """Its standard error is that of the mean of independent means."""
    nq = write_questions(tmp_path / "nq_open.jsonl")
    tqa = tmp_path / "tqa.jsonl"
    rows = [{"question": QUESTIONS[0][0], "answer": answers} for answers in (["Tolkien", "JRR Tolkien"], ["x"])]
    tqa.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, _ = evaluate(["genpoe"], {"genpoe_nq": str(nq), "genpoe_tqa": str(tqa)})
    assert results["results"]["genpoe_tqa"]["em,none"] == 0.5
    group = results["groups"]["genpoe"]
    for metric, values in SCORES.items():
        variances = [statistics.variance(part) / len(part) for part in (values, [1.0, 0.0])]
        assert group[f"{metric},none"] == pytest.approx((statistics.mean(values) + 0.5) / 2), metric
        assert group[f"{metric}_stderr,none"] == pytest.approx(sum(variances) ** 0.5 / 2), metric


@pytest.mark.parametrize("task", ["genpoe_nq", "genpoe_tqa"])
@pytest.mark.parametrize("named", [None, "task", "nats", "both"])
def test_nats_are_those_of_the_first_answer(tmp_path: Path, task: str, named: str | None) -> None:
    """After the prompt that generates it, from the task's file, or one of their own."""
    file, other = str(write_questions(tmp_path / "dpr.json", ctxs=CTXS)), str(tmp_path / "missing")
    data = {None: file, "task": {task: file}, "nats": {f"{task}_nats": file}}
    results, model = evaluate(
        [f"{task}_nats"], data.get(named, {task: other, f"{task}_nats": file}), num_fewshot=2, log_samples=True
    )
    _, generating = evaluate([task], file, num_fewshot=2)
    assert [request.args[0] for request in model.requests] == [request.args[0] for request in generating.requests]
    assert [request.args[1] for request in model.requests] == [f" {answers[0]}" for _, answers, _ in QUESTIONS]
    assert model.requests[0].doc["ctxs"]
    lengths = [1 + len(answers[0]) for _, answers, _ in QUESTIONS]
    scores = results["results"][f"{task}_nats"]
    assert scores["nats,none"] == pytest.approx(statistics.mean(lengths))
    assert scores["nats_stderr,none"] == pytest.approx(statistics.stdev(lengths) / len(lengths) ** 0.5)
    assert scores["nats_per_byte,none"] == pytest.approx(1.0)  # a nat for each character, all of them ASCII
    assert results["higher_is_better"][f"{task}_nats"] == {"nats": False, "nats_per_byte": False}
    # What nats per token need, whatever the tokenizer.
    for sample, (_, answers, _), length in zip(results["samples"][f"{task}_nats"], QUESTIONS, lengths, strict=True):
        assert sample["target"] == sample["arguments"][0][1] == f" {answers[0]}"
        assert sample["filtered_resps"] == [(-length, False)]
        assert sample["nats"] == length


def test_nats_per_byte_count_utf8(tmp_path: Path) -> None:
    path = tmp_path / "nq_open.jsonl"
    path.write_text(json.dumps({"question": QUESTIONS[0][0], "answer": ["Zürich"]}))
    results, _ = evaluate(["genpoe_nq_nats"], str(path))
    assert results["results"]["genpoe_nq_nats"]["nats_per_byte,none"] == pytest.approx(7 / 8)


def test_the_normalisation_is_named_in_the_results(questions: Path) -> None:
    results, _ = evaluate(["genpoe_demo"], str(questions), log_samples=True)
    assert results["configs"]["genpoe_demo"]["metadata"]["answer_normalisation"] == "SQuAD v1.1"
    assert results["versions"]["genpoe_demo"] == 2.0
    assert results["samples"]["genpoe_demo"][0]["target"] == QUESTIONS[0][1]


def test_the_hub_data_sets_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    trivia = {"value": "Tolkien", "aliases": ["JRR Tolkien", "Tolkien"], "normalized_value": "tolkien"}
    hub = {
        ("google-research-datasets/nq_open", None): {"question": "who wrote the hobbit", "answer": ["Tolkien"]},
        ("mandarjoshi/trivia_qa", "unfiltered.nocontext"): {"question": "Who wrote the hobbit?", "answer": trivia},
    }

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        assert split == "validation"
        return datasets.Dataset.from_list([hub[name, config]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    results, model = evaluate(["genpoe"], None)
    assert [request.doc["answers"] for request in model.requests] == [["Tolkien"], ["Tolkien", "JRR Tolkien"]]
    assert results["results"]["genpoe_nq"]["em,none"] == 0.0
    assert results["results"]["genpoe_tqa"]["em,none"] == 1.0


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("genpoe_nq", "missing.jsonl", "missing.jsonl: no such file"),
        (
            "genpoe_nq",
            {"genpoe_nk": "x"},
            "genpoe_data: 'genpoe_nk' is not a task with local files; these are: genpoe_nq,",
        ),
        ("genpoe_nq", 7, "genpoe_data: 7 is neither a file nor a mapping from task to file"),
        ("genpoe_nq", None, "genpoe_nq: cannot load google-research-datasets/nq_open from the hub"),
        ("genpoe_demo", None, "genpoe_demo: no data; run `genpoe demo`, which makes it"),
        ("genpoe_demo", {"genpoe_nq": "x"}, "genpoe_demo: no data; run `genpoe demo`, which makes it"),
    ],
)
def test_bad_data_is_one_clear_line(task: str, data: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        evaluate([task], data)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nq_open.jsonl"
    path.write_text('{"question": "q", "answer": ["a"]}\n{"question": "q"}\n')
    with pytest.raises(InputError, match=r"nq_open\.jsonl:2: .*answer"):
        evaluate(["genpoe_nq"], str(path))


def test_the_real_nq_questions() -> None:
    path = Path(__file__).parents[2] / "shared/data/nq/nq-open-gold-passages.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs the NQ sample of {path}")
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"genpoe_data": str(path)})
    task = manager.load(["genpoe_nq"])["tasks"]["genpoe_nq"]
    docs = list(task.test_docs())
    assert len(docs) == 1800
    assert all(doc["ctxs"][0]["has_answer"] for doc in docs)
    gold = [task.process_results(doc, [f" {doc['answers'][0]}\n"]) for doc in docs]
    assert all(scores == dict.fromkeys(SCORES, 1.0) for scores in gold if scores["f1"])
    assert sum(scores["em"] for scores in gold) >= 1795  # a few answers have nothing but articles and punctuation
