"""Checks of lm-eval's response cache (``--use_cache``): its answers must be of the same run and the same passages.

lm-eval stores answers under their prompts, and a cached answer never reaches the model. So the cache also stores the
fingerprint of the run that filled it, digests of some questions' passages, and the lines of the trace.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args

from genpoe_plugin.data.questions import Question
from genpoe_plugin.errors import InputError

_FINGERPRINT, _PROBES, _TRACE = "genpoe fingerprint", "genpoe probes", "genpoe trace "
_PROBES_PER_TASK = 4

Answers = MutableMapping[str, Any]


def open_cache(answers: Answers, fingerprint: Mapping[str, Any]) -> None:
    """Open a cache for a run with this fingerprint.

    Raises:
        InputError: it was filled by another model, or with other arguments.
    """
    saved = answers.get(_FINGERPRINT)
    if saved is None:
        if len(answers):
            raise InputError("--use_cache: the cache was filled by another model; give another path")
        answers[_FINGERPRINT] = fingerprint
    elif saved != fingerprint:
        names = [name for name in {**fingerprint, **saved} if fingerprint.get(name) != saved.get(name)]
        differences = "; ".join(f"{name} was {saved.get(name)}, is {fingerprint.get(name)}" for name in names)
        raise InputError(f"--use_cache: the cache belongs to another run ({differences}); give another path")
    # Cached answers never reach the model, so a few questions of each task are answered again in every run.
    for probe in answers.get(_PROBES, {}):
        answers.pop(probe, None)


def traced(answers: Answers) -> Iterator[str]:
    """The lines of the trace in the cache."""
    return (line for key, line in answers.items() if key.startswith(_TRACE))


def keep_trace(answers: Answers, lines: Mapping[tuple[Any, ...], str]) -> None:
    """Store lines of the trace, by task, doc and hash of the prompt, for runs whose answers come from the cache."""
    entries = {f"{_TRACE}{task} {doc_id} {prompt_hash}": line for (task, doc_id, prompt_hash), line in lines.items()}
    answers.update({key: line for key, line in entries.items() if answers.get(key) != line})


def guard_passages(
    answers: Answers, method: str, requests: Sequence[Instance], questions: Sequence[Question], num_compared: int
) -> None:
    """Check that the answers in a cache were given with the passages that the docs have now.

    Args:
        answers: the cache.
        method: the method of the model that is called.
        requests, questions: the requests and their questions.
        num_compared: largest number of passages per question to compare.

    Raises:
        InputError: the passages have changed, or two docs have the same prompt and different passages.
    """
    probes: dict[str, str] = answers.get(_PROBES, {})
    digests: dict[str, str] = {}
    probed: defaultdict[str | None, int] = defaultdict(int)
    for request, question in zip(requests, questions, strict=True):
        if not question.passages:
            continue
        key = hash_args(method, request.args)
        content = json.dumps([asdict(passage) for passage in question.passages[:num_compared]])
        digest = hashlib.sha256(content.encode()).hexdigest()
        where = f"--use_cache: question {question.question!r} of task {request.task_name}"
        if digests.setdefault(key, digest) != digest:
            raise InputError(f"{where} comes with two sets of passages and one prompt; leave --use_cache out")
        if probes.get(key, digest) != digest:
            raise InputError(f"{where} had other passages when the cache was filled; give another path")
        if key in probes or probed[request.task_name] < _PROBES_PER_TASK:
            probes[key] = digest
            probed[request.task_name] += 1
    answers[_PROBES] = probes
