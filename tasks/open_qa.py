"""Loading and scoring of the open-domain QA tasks.

A document has ``question`` (as the data has it), ``answers`` and, where the data brings passages, ``ctxs`` in DPR's
form. Data comes from the hub, or from local files named by one lm-eval argument::

    --metadata '{"genpoe_data": "FILE"}'                                  every genpoe task of the run
    --metadata '{"genpoe_data": {"genpoe_nq": "FILE", "genpoe_tqa": "FILE"}}'   task by task

in any form that ``genpoe_plugin.questions`` reads: DPR result JSON or JSONL, qas TSV, nq_open JSONL, each also .gz.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets

from genpoe_plugin.answers import exact_match, f1
from genpoe_plugin.errors import InputError
from genpoe_plugin.hub_questions import NQ_OPEN, TRIVIA_QA, read_hub_questions
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.questions import Question, read_questions

TASKS = ("genpoe_nq", "genpoe_tqa", "genpoe_demo")
Splits = dict[str, datasets.Dataset]


def genpoe_nq(genpoe_data: Any = None, **_: Any) -> Splits:
    """The ``custom_dataset`` of genpoe_nq; lm-eval passes all of its metadata and model arguments."""
    return _local("genpoe_nq", genpoe_data) or _hub("genpoe_nq", NQ_OPEN)


def genpoe_tqa(genpoe_data: Any = None, **_: Any) -> Splits:
    """The ``custom_dataset`` of genpoe_tqa."""
    return _local("genpoe_tqa", genpoe_data) or _hub("genpoe_tqa", TRIVIA_QA)


def genpoe_demo(genpoe_data: Any = None, **_: Any) -> Splits:
    """The ``custom_dataset`` of genpoe_demo, which has no data but a local file's."""
    splits = _local("genpoe_demo", genpoe_data)
    if splits is None:
        raise InputError(
            "genpoe_demo: no data; `genpoe demo` makes it and runs this task, "
            """and its file can be given by --metadata '{"genpoe_data": "FILE"}'"""
        )
    return splits


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The closed-book prompt; the genpoe model adds to it what its mode says."""
    return closed_book_prompt(doc["question"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """EM and F1 of the first line of the generation."""
    prediction = results[0].split("\n", 1)[0]
    return {"em": exact_match(prediction, doc["answers"]), "f1": f1(prediction, doc["answers"])}


def _local(task: str, data: Any) -> Splits | None:
    """The local file that ``genpoe_data`` names for ``task``, or None where it names none."""
    if isinstance(data, Mapping):
        if unknown := sorted(set(data) - set(TASKS)):
            raise InputError(f"genpoe_data: {unknown[0]!r} is no task that reads files; these do: {', '.join(TASKS)}")
        data = data.get(task)
    if data is None:
        return None
    if not isinstance(data, str | Path):
        raise InputError(f"genpoe_data: {data!r} is neither a file nor a mapping from task to file")
    path = Path(data).expanduser()
    docs = [_doc(question) for question in read_questions(path)]
    if not docs:
        raise InputError(f"{path}: no questions")
    if not any(doc["ctxs"] for doc in docs):
        for doc in docs:
            del doc["ctxs"]
    return {"test": datasets.Dataset.from_list(docs)}


def _doc(question: Question) -> dict[str, Any]:
    ctxs = []
    for retrieved in question.passages:
        fields = asdict(retrieved)
        ctxs.append(fields.pop("passage") | fields)
    return {"question": question.question, "answers": list(question.answers), "ctxs": ctxs}


def _hub(task: str, name: str) -> Splits:
    try:
        docs = [
            {"question": question.question, "answers": list(question.answers)}
            for question in read_hub_questions(name, "validation")
        ]
    except InputError as error:
        raise InputError(
            f"""{task}: {error}; a local file can be given by --metadata '{{"genpoe_data": {{"{task}": "FILE"}}}}'"""
        ) from error
    return {"test": datasets.Dataset.from_list(docs)}
