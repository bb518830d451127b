"""Loading and scoring of the question answering tasks.

A doc has ``question`` (unchanged), ``answers`` and, for data sets with passages, ``ctxs`` in DPR's format;
tasks/README.md lists the data sets. Docs come from the hub, or from local files that one lm-eval argument names::

    --metadata '{"genpoe_data": "FILE"}'                                  for all genpoe tasks
    --metadata '{"genpoe_data": {"genpoe_nq": "FILE", "genpoe_tqa": "FILE"}}'   per task

in any format of ``genpoe_plugin.data.questions``: the authors' own files, the hub's Parquet files, DPR result JSON or
JSONL, qas TSV, nq_open JSONL; text also as .gz. A ``_nats`` task without a file of its own reads that of its base task.
`genpoe_conflict`'s docs also have ``original_answers``, which the passages do not state any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets

from genpoe_plugin.data import hub_questions as hub
from genpoe_plugin.data.answers import (
    abstains,
    contains,
    exact_match,
    first_line,
    popqa_accuracy,
    rouge_l,
    token_scores,
)
from genpoe_plugin.data.questions import Question, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import closed_book_prompt

HUB = {  # task: data set and split
    "genpoe_nq": (hub.NQ_OPEN, "validation"),
    "genpoe_tqa": (hub.TRIVIA_QA, "validation"),
    "genpoe_popqa": (hub.POP_QA, "test"),
    "genpoe_squad": (hub.SQUAD, "validation"),
    "genpoe_narrativeqa": (hub.NARRATIVE_QA, "test"),
    "genpoe_hotpotqa": (hub.HOTPOT_QA, "validation"),
    "genpoe_2wiki": (hub.TWO_WIKI, "validation"),
    "genpoe_mquake": (hub.MQUAKE, "CF3k"),
    "genpoe_conflict": (hub.NQ_SWAP, "dev"),
    "genpoe_unanswerable": (hub.SQUAD_2, "validation"),
}
_NATS = "_nats"  # suffix of tasks that score the likelihood of answers
DEMO = "genpoe_demo"  # its questions exist only as a local file
CONFLICT, UNANSWERABLE = "genpoe_conflict", "genpoe_unanswerable"
NATS_TASKS = tuple(f"{task}{_NATS}" for task in HUB if task != UNANSWERABLE)
TASKS = (*HUB, *NATS_TASKS, DEMO)
Splits = dict[str, datasets.Dataset]


def questions(genpoe_task: str, genpoe_data: Any = None, **_: Any) -> Splits:
    """The ``custom_dataset`` of all tasks. lm-eval calls it with the task's ``dataset_kwargs`` and all metadata."""
    splits = _local(genpoe_task, genpoe_data)
    if splits is None and genpoe_task == DEMO:
        raise InputError(
            f"{DEMO}: no data; run `genpoe demo`, which makes it, "
            """or name a file with --metadata '{"genpoe_data": "FILE"}'"""
        )
    return splits or _hub(genpoe_task)


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The closed-book prompt. The genpoe model adds passages in the modes with passages in the prompt."""
    return closed_book_prompt(doc["question"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """EM, F1 with its precision and recall, and containment of an answer, for the first non-empty line."""
    prediction, answers = first_line(results[0]), doc["answers"]
    scores = token_scores(prediction, answers)
    return {
        "em": exact_match(prediction, answers),
        "f1": scores.f1,
        "contains": contains(prediction, answers),
        "token_precision": scores.precision,
        "token_recall": scores.recall,
    }


def process_popqa(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Add PopQA's accuracy: whether an answer is a substring, as given, in lower case or capitalised."""
    return {**process_results(doc, results), "acc": popqa_accuracy(first_line(results[0]), doc["answers"])}


def process_narrativeqa(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Add ROUGE-L, since answers are free text."""
    return {**process_results(doc, results), "rouge_l": rouge_l(first_line(results[0]), doc["answers"])}


def process_mquake(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Add the question's case and whether the answer is right, for `any_of_a_case`."""
    scores = process_results(doc, results)
    return {**scores, "multihop_acc": [doc.get("case") or doc["question"], scores["em"]]}


def process_conflict(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """EM and F1 of the passage's answer; whether it is contained (``follows``), and whether the original one is.

    ``original`` is missing if the data does not have the original answers.
    """
    scores = process_results(doc, results)
    followed = {"em": scores["em"], "f1": scores["f1"], "follows": scores["contains"]}
    if "original_answers" not in doc:
        return followed
    return {**followed, "original": contains(first_line(results[0]), doc["original_answers"])}


def process_unanswerable(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Whether the first non-empty line abstains from an answer."""
    abstained = abstains(first_line(results[0]))
    return {"abstains": abstained, "answers_anyway": 1 - abstained}


def first_answer(doc: Mapping[str, Any]) -> str:
    """The continuation whose likelihood the ``_nats`` tasks score."""
    return f" {doc['answers'][0]}"


def original_answer(doc: Mapping[str, Any]) -> str:
    """The continuation whose likelihood ``genpoe_conflict_nats`` scores."""
    return f" {doc['original_answers'][0]}"


def process_nats(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Scores of `first_answer`; see `_nats`."""
    return _nats(first_answer(doc), results)


def process_original_nats(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Scores of `original_answer`; see `_nats`."""
    return _nats(original_answer(doc), results)


def _nats(answer: str, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Negative log-likelihood of an answer, and the same per UTF-8 byte, with the space before the answer.

    lm-eval gives tasks the sum over the answer's tokens, not their number, which depends on the tokenizer.
    """
    nats = -results[0][0]
    return {"nats": nats, "nats_per_byte": nats / len(answer.encode())}


def any_of_a_case(items: Sequence[tuple[str, float]]) -> float:
    """MQuAKE's multi-hop accuracy: the share of cases with a right answer to at least one wording."""
    cases: defaultdict[str, float] = defaultdict(float)
    for case, score in items:
        cases[case] = max(cases[case], score)
    return fmean(cases.values())


def _local(task: str, data: Any) -> Splits | None:
    """The docs of the local file that ``genpoe_data`` names for ``task``; None if it names none."""
    if isinstance(data, Mapping):
        if unknown := sorted(set(data) - set(TASKS)):
            raise InputError(
                f"genpoe_data: {unknown[0]!r} is not a task with local files; these are: {', '.join(TASKS)}"
            )
        data = data.get(task, data.get(task.removesuffix(_NATS)))
    if data is None:
        return None
    if not isinstance(data, str | Path):
        raise InputError(f"genpoe_data: {data!r} is neither a file nor a mapping from task to file")
    path = Path(data).expanduser()
    return _splits(_suitable(task, read_questions(path, need_answers=task != UNANSWERABLE), str(path)))


def _hub(task: str) -> Splits:
    name, split = HUB[task.removesuffix(_NATS)]
    try:
        questions = hub.read_hub_questions(name, split, need_answers=task != UNANSWERABLE)
        return _splits(_suitable(task, questions, name))
    except InputError as error:
        raise InputError(
            f"""{task}: {error}; to use a local file, give --metadata '{{"genpoe_data": {{"{task}": "FILE"}}}}'"""
        ) from error


def _suitable(task: str, questions: Iterable[Question], source: str) -> list[Question]:
    """The questions that a task asks."""
    if task == UNANSWERABLE:
        found = [question for question in questions if not question.answers]
        if not found:
            raise InputError(f"{source}: no questions without an answer (an empty list of answers)")
        return found
    found = list(questions)
    if not found:
        raise InputError(f"{source}: no questions")
    if task.removesuffix(_NATS) == CONFLICT:
        missing = sum(not question.original_answers for question in found)
        if missing and (missing < len(found) or task != CONFLICT):
            raise InputError(
                f'{source}: {missing} of {len(found)} questions have no "original_answers"; `genpoe data conflicts` '
                "makes sets with them"
            )
    return found


def _doc(question: Question) -> dict[str, Any]:
    ctxs = []
    for retrieved in question.passages:
        fields = asdict(retrieved)
        ctxs.append(fields.pop("passage") | fields)
    return {
        "question": question.question,
        "answers": list(question.answers),
        "original_answers": list(question.original_answers),
        "case": question.case,
        "ctxs": ctxs,
    }


def _splits(questions: list[Question]) -> Splits:
    """One split with a doc for each question, without fields that are empty in all docs."""
    docs = [_doc(question) for question in questions]
    for field in ("original_answers", "case", "ctxs"):
        if not any(doc[field] for doc in docs):
            for doc in docs:
                del doc[field]
    return {"test": datasets.Dataset.from_list(docs)}
