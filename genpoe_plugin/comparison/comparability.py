"""Decide which runs may be ranked together: those with the same questions, asked in the same way.

Runs of a task that agree in every aspect share a board. Other runs are on separate boards, each with its own ranking
and its differences from the first board.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genpoe_plugin.arguments import is_used
from genpoe_plugin.comparison.runs import LeftOut, Run
from genpoe_plugin.comparison.settings import key, settings_of

ASPECTS = ("version", "metrics", "questions", "prompts", "shots", "decoding", "passages")
ALLOWABLE = tuple(aspect for aspect in ASPECTS if aspect != "questions")
"""Aspects that a user may allow to differ; the questions must be the same, because the tests are paired."""

_COMPLETIONS, _OF_DOCS = "as completions", "those of the docs"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_METRICS = ("metric_list", "process_results", "filter_list", "output_type", "doc_to_target", "doc_to_choice", "repeats")
_PROMPTS = ("doc_to_text", "description", "target_delimiter", "fewshot_delimiter", "fewshot_config", "gen_prefix")


@dataclass(frozen=True)
class Protocol:
    """The protocol of a run: one text per aspect, which differs if runs are not comparable.

    Attributes:
        version: version of the task.
        metrics: metrics and their definition.
        questions: number and digest of the questions.
        prompts: digest of the prompts.
        shots: number of few-shot examples, and their seed.
        decoding: generation arguments.
        passages: source of the passages, reranker, and number of retrieved passages; None for parts that the run does
            not use.
    """

    version: str
    metrics: str
    questions: str
    prompts: str
    shots: str
    decoding: str
    passages: tuple[str | None, str | None, str | None]

    def without(self, aspects: Collection[str]) -> tuple[str, ...]:
        """The values of all aspects except ``aspects`` and the passages."""
        return tuple(getattr(self, name) for name in ASPECTS if name not in aspects and name != "passages")


def protocol_of(run: Run) -> Protocol:
    """The protocol of a run."""
    task, config = run.task_config, run.config
    shots = run.report["n-shot"].get(run.task, 0)
    definition = {name: task.get(name) for name in _METRICS}
    return Protocol(
        version=str(run.report["versions"].get(run.task)),
        metrics=f"{', '.join(run.scores)} (definition {_digest(definition)})",
        questions=f"{len(run.questions):,} questions (set {_digest(run.questions.tobytes())})",
        prompts=_prompts(run),
        shots=f"{shots}" + (f" (seed {config.get('fewshot_seed')})" if shots else ""),
        decoding=_text(task.get("generation_kwargs")),
        passages=_passages(run),
    )


def _prompts(run: Run) -> str:
    """A digest of the prompts; for chats, whose template depends on the model, of the settings for prompts."""
    if not run.report.get("chat_template"):
        return f"{_COMPLETIONS} ({run.prompts[:8]})"
    facts = [run.report.get("system_instruction"), run.report.get("fewshot_as_multiturn")]
    return f"as chats ({_digest([run.task_config.get(name) for name in _PROMPTS] + facts)})"


def _passages(run: Run) -> tuple[str | None, str | None, str | None]:
    if run.genpoe is None:
        return None, None, None
    settings = settings_of(run)
    if settings["passages"] == "none":
        return None, None, None
    source = f"{_OF_DOCS} ({run.documents[:8]})" if run.brings_passages else f"index {settings.get('index')}"
    if not is_used("reranker", settings["mode"], settings["passages"]):
        return source, None, None
    return source, str(settings.get("reranker")), str(settings.get("num_retrieved"))


def _text(value: Any) -> str:
    return _ADDRESS.sub("", json.dumps(value, sort_keys=True, default=str))


def _digest(value: Any) -> str:
    content = value if isinstance(value, bytes) else _text(value).encode()
    return hashlib.sha256(content).hexdigest()[:8]


@dataclass(frozen=True)
class Difference:
    """An aspect in which a board differs from the first board of its task.

    Attributes:
        aspect: name of the aspect.
        here: its value on this board.
        there: its value on the first board.
    """

    aspect: str
    here: str
    there: str


@dataclass(frozen=True)
class Comparable:
    """Runs of one task that may be ranked together; all have the same questions.

    Attributes:
        task: the task.
        runs: the runs.
        protocol: their common protocol.
        differences: differences from the first group of the task.
        allowed: differences within the group that the user has allowed.
    """

    task: str
    runs: tuple[Run, ...]
    protocol: Protocol
    differences: tuple[Difference, ...] = ()
    allowed: tuple[Difference, ...] = ()


def comparable(runs: Sequence[Run], allow: Collection[str] = ()) -> list[Comparable]:
    """Group runs that may be ranked together, by task, the largest group first.

    A run without passages is in every group that differs from other groups only in the passages.

    Args:
        runs: the runs.
        allow: aspects that may differ within a group.
    """
    groups: list[Comparable] = []
    for task in dict.fromkeys(run.task for run in runs):
        protocols = {id(run): protocol_of(run) for run in runs if run.task == task}
        alike: dict[tuple[str, ...], list[Run]] = {}
        for run in runs:
            if run.task == task:
                alike.setdefault(protocols[id(run)].without(allow), []).append(run)
        memberships = [
            group
            for members in alike.values()
            for group in ([members] if "passages" in allow else _by_passages(members, protocols))
        ]
        memberships.sort(key=lambda members: -len(members))
        first: Comparable | None = None
        for members in memberships:
            fullest = max(members, key=lambda run: sum(part is not None for part in protocols[id(run)].passages))
            protocol = protocols[id(fullest)]
            allowed = [
                Difference(aspect, describe(protocols[id(run)], aspect), describe(protocol, aspect))
                for aspect in allow
                for run in members
                if not _agree(protocols[id(run)], protocol, aspect)
            ]
            group = Comparable(
                task,
                tuple(members),
                protocol,
                () if first is None else _differences(members[0], protocol, first),
                tuple(dict.fromkeys(allowed)),
            )
            first = first or group
            groups.append(group)
    return groups


def _by_passages(members: Sequence[Run], protocols: dict[int, Protocol]) -> Iterable[list[Run]]:
    """Group runs whose passages agree in all parts that both use."""
    used = {protocols[id(run)].passages for run in members}
    fullest = [parts for parts in used if not any(parts != other and _fits(parts, other) for other in used)]
    for parts in sorted(fullest, key=str):
        yield [run for run in members if _fits(protocols[id(run)].passages, parts)]


def _fits(parts: Sequence[str | None], fuller: Sequence[str | None]) -> bool:
    return all(part is None or part == other for part, other in zip(parts, fuller, strict=True))


def _agree(first: Protocol, second: Protocol, aspect: str) -> bool:
    if aspect == "passages":
        pairs = zip(first.passages, second.passages, strict=True)
        return all(None in pair or pair[0] == pair[1] for pair in pairs)
    return getattr(first, aspect) == getattr(second, aspect)


def describe(protocol: Protocol, aspect: str) -> str:
    """The value of an aspect, as text."""
    if aspect != "passages":
        return getattr(protocol, aspect)
    source, reranker, number = protocol.passages
    if source is None:
        return "none"
    parts = [source, reranker and reranker != "None" and f"reranker {reranker}", number and f"at most {number}"]
    return ", ".join(part for part in parts if part)


def _differences(run: Run, protocol: Protocol, first: Comparable) -> tuple[Difference, ...]:
    differences: list[Difference] = []
    for aspect in ASPECTS:
        if _agree(protocol, first.protocol, aspect):
            continue
        other_questions = any(entry.aspect == "questions" for entry in differences)
        if other_questions and _follows_from_questions(protocol, first.protocol, aspect):
            continue
        here, there = describe(protocol, aspect), describe(first.protocol, aspect)
        if aspect == "questions":
            shared = len(np.intersect1d(run.questions, first.runs[0].questions))
            here += f", {shared:,} of them in both"
        differences.append(Difference(aspect, here, there))
    return tuple(differences)


def _follows_from_questions(protocol: Protocol, other: Protocol, aspect: str) -> bool:
    """Whether different questions alone may explain a difference in the digests of prompts or of docs."""
    if aspect == "passages":
        return protocol.passages[1:] == other.passages[1:] and all(
            str(each.passages[0]).startswith(_OF_DOCS) for each in (protocol, other)
        )
    return aspect == "prompts" and all(each.prompts.startswith(_COMPLETIONS) for each in (protocol, other))


def without_duplicates(runs: Sequence[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Keep the latest of duplicate runs; return the kept runs and the others as left out."""
    latest: dict[tuple[Any, ...], Run] = {}
    left_out = []
    for run in sorted(runs, key=lambda run: run.date):
        protocol = protocol_of(run)
        same = (run.task, key(settings_of(run)), *protocol.without(()), *protocol.passages)
        earlier = latest.pop(same, None)
        latest[same] = run
        if earlier is not None:
            metric = next(iter(run.scores))
            differing = int(np.count_nonzero(earlier.scores[metric] != run.scores[metric]))
            detail = (
                f"{metric} differs on {differing:,} questions" if differing else f"the same {metric} on every question"
            )
            reason = f"task {run.task}: a duplicate of {run.results}, which is newer ({detail})"
            left_out.append(LeftOut(earlier.results, reason))
    chosen = set(map(id, latest.values()))
    return [run for run in runs if id(run) in chosen], left_out
