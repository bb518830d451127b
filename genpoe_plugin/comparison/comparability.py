"""Which runs may be ranked together: those that were asked the same in the same way.

Runs of a task that agree in every aspect share a board. Where they do not agree they are on different boards, each
ranked for itself, and it is said what differs.
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
"""What a user may rank together all the same; without the same questions there is nothing to pair."""

_COMPLETIONS, _OF_DOCS = "as completions", "those of the docs"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_METRICS = ("metric_list", "process_results", "filter_list", "output_type", "doc_to_target", "doc_to_choice", "repeats")
_PROMPTS = ("doc_to_text", "description", "target_delimiter", "fewshot_delimiter", "fewshot_config", "gen_prefix")


@dataclass(frozen=True)
class Protocol:
    """How a run was asked, aspect by aspect; each is a text for people, unequal where runs are not comparable.

    ``passages`` has its parts apart, since a run may leave some unused: where they come from, the reranker, and how
    many it was given. None for a part that the run does not use.
    """

    version: str
    metrics: str
    questions: str
    prompts: str
    shots: str
    decoding: str
    passages: tuple[str | None, str | None, str | None]

    def without(self, aspects: Collection[str]) -> tuple[str, ...]:
        """What has to be equal, but for passages."""
        return tuple(getattr(self, name) for name in ASPECTS if name not in aspects and name != "passages")


def protocol_of(run: Run) -> Protocol:
    """How a run was asked."""
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
    """The texts themselves; of chats, whose templates are the models' own, what the task and the user say of them."""
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
    """An aspect in which a board differs from the first of its task, with what it is here and there."""

    aspect: str
    here: str
    there: str


@dataclass(frozen=True)
class Comparable:
    """Runs of one task that may be ranked together; all have the same questions."""

    task: str
    runs: tuple[Run, ...]
    protocol: Protocol
    differences: tuple[Difference, ...] = ()
    allowed: tuple[Difference, ...] = ()


def comparable(runs: Sequence[Run], allow: Collection[str] = ()) -> list[Comparable]:
    """Runs in groups that may be ranked together: by task, the largest first.

    A run that uses no passages is in every group that differs from another in passages alone.

    Args:
        allow: aspects that may differ.
    """
    groups: list[Comparable] = []
    for task in dict.fromkeys(run.task for run in runs):
        protocols = {id(run): protocol_of(run) for run in runs if run.task == task}
        alike: dict[tuple[str, ...], list[Run]] = {}
        for run in runs:
            if run.task == task:
                alike.setdefault(protocols[id(run)].without(allow), []).append(run)
        found = [
            group
            for members in alike.values()
            for group in ([members] if "passages" in allow else _by_passages(members, protocols))
        ]
        found.sort(key=lambda members: -len(members))
        first: Comparable | None = None
        for members in found:
            fullest = max(members, key=lambda run: sum(part is not None for part in protocols[id(run)].passages))
            protocol = protocols[id(fullest)]
            allowed = [
                Difference(aspect, _told(protocols[id(run)], aspect), _told(protocol, aspect))
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
    """Runs whose passages agree in all parts that both use."""
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


def _told(protocol: Protocol, aspect: str) -> str:
    if aspect != "passages":
        return getattr(protocol, aspect)
    source, reranker, number = protocol.passages
    if source is None:
        return "none"
    parts = [source, reranker and reranker != "None" and f"reranker {reranker}", number and f"at most {number}"]
    return ", ".join(part for part in parts if part)


def _differences(run: Run, protocol: Protocol, first: Comparable) -> tuple[Difference, ...]:
    found: list[Difference] = []
    for aspect in ASPECTS:
        if _agree(protocol, first.protocol, aspect):
            continue
        if any(entry.aspect == "questions" for entry in found) and _is_of_questions(protocol, first.protocol, aspect):
            continue
        here, there = _told(protocol, aspect), _told(first.protocol, aspect)
        if aspect == "questions":
            shared = len(np.intersect1d(run.questions, first.runs[0].questions))
            here += f", {shared:,} of them in both"
        found.append(Difference(aspect, here, there))
    return tuple(found)


def _is_of_questions(protocol: Protocol, other: Protocol, aspect: str) -> bool:
    """Whether other questions alone explain that these differ, which are digests of all prompts, or of all docs."""
    if aspect == "passages":
        return protocol.passages[1:] == other.passages[1:] and all(
            str(each.passages[0]).startswith(_OF_DOCS) for each in (protocol, other)
        )
    return aspect == "prompts" and all(each.prompts.startswith(_COMPLETIONS) for each in (protocol, other))


def without_duplicates(runs: Sequence[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Of runs that were made twice, the last; and the others, by name."""
    kept: dict[tuple[Any, ...], Run] = {}
    left_out = []
    for run in sorted(runs, key=lambda run: run.date):
        protocol = protocol_of(run)
        same = (run.task, key(settings_of(run)), *protocol.without(()), *protocol.passages)
        earlier = kept.pop(same, None)
        kept[same] = run
        if earlier is not None:
            metric = next(iter(run.scores))
            other = int(np.count_nonzero(earlier.scores[metric] != run.scores[metric]))
            said = f"{metric} differs on {other:,} questions" if other else f"the same {metric} on every question"
            reason = f"task {run.task}: a duplicate of {run.results}, which is newer ({said})"
            left_out.append(LeftOut(earlier.results, reason))
    chosen = set(map(id, kept.values()))
    return [run for run in runs if id(run) in chosen], left_out
