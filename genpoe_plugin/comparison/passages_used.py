"""Read from a genpoe model's trace which passages each question was answered with."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genpoe_plugin.comparison.runs import ABSENT, UNKNOWN, Run, parse_json, prompt_key, read_lines
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.trace import TRACE


@dataclass(frozen=True, eq=False)
class PassagesUsed:
    """The passages of every question of a run; arrays are in the run's order.

    Attributes:
        trace: path of the trace.
        answer_given: 1 if a passage that the LLM was given has an answer, 0 if none has, -1 if unknown.
        ranks: best rank of a retrieved passage with an answer; 0 if none has one, -1 if unknown.
        lengths: number of words of the first passage that the LLM was given; -1 if unknown.
        offsets: byte offset of each question's line in the trace.
    """

    trace: Path
    answer_given: NDArray[np.int64]
    ranks: NDArray[np.int64]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def line(self, place: int) -> dict[str, Any]:
        """Read the trace of a question."""
        with self.trace.open("rb") as lines:
            lines.seek(int(self.offsets[place]))
            return parse_json(lines.readline())


def passages_used(run: Run) -> PassagesUsed | None:
    """Read the trace of a run; None if there is no trace.

    Raises:
        InputError: the trace is broken, or belongs to another run.
    """
    genpoe = run.genpoe
    if not genpoe:
        return None
    name = genpoe.get("arguments", {}).get("trace") or TRACE.format(date=run.date)
    folder = genpoe.get("provenance", {}).get("directory", "")
    places = [Path(name), Path(folder) / name, *(parent / Path(name).name for parent in run.results.parents[:2])]
    trace = next((place for place in places if os.path.isfile(place)), None)
    if trace is None:
        return None
    fingerprint = genpoe.get("fingerprint", {})
    facts = {"mode": fingerprint.get("mode"), "hypernetwork": fingerprint.get("hypernetwork")}
    if "settings" in genpoe:
        facts["settings"] = genpoe["settings"]
    names, expected = list(facts), list(facts.values())
    place_of = _SamplePlaces(run)
    answer_given = np.full(len(run.doc_ids), UNKNOWN, np.int64)
    ranks, lengths, offsets = (answer_given.copy() for _ in range(3))
    for offset, line in read_lines(trace):
        try:
            if line["task"] != run.task:
                continue
            if [line.get(name) for name in names] != expected:
                raise InputError(
                    f"{trace}: the trace does not belong to {run.results}; give every run its own trace file"
                )
            place, sure = place_of(line["doc_id"], line.get("prompt_hash"))
            if place is None or not (sure or offsets[place] < 0):
                continue
            offsets[place] = offset
            _check(line)
            answer_given[place] = _any_has_answer(line["passages"])
            ranks[place] = _rank(line["retrieved"])
            lengths[place] = line["passages"][0].get("words", UNKNOWN) if line["passages"] else UNKNOWN
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{trace}: not a trace ({type(error).__name__}: {error})") from error
    if (offsets < 0).any():
        missing = int(np.count_nonzero(offsets < 0))
        raise InputError(f"{trace}: {missing:,} questions of {run.results} are not in it; run it again")
    return PassagesUsed(trace, answer_given, ranks, lengths, offsets)


def _check(line: dict[str, Any]) -> None:
    """Raise a `ValueError` if the page cannot show a line of a trace."""
    if not isinstance(line.get("prompt"), str | None):
        raise ValueError("a prompt that is no text")
    for passage in line["passages"]:
        if not (math.isfinite(passage["gate"]) and isinstance(passage["id"], str | int)):
            raise ValueError("a passage without id or gate")


class _SamplePlaces:
    """Finds the sample that a line of a trace belongs to."""

    def __init__(self, run: Run) -> None:
        self.by_doc = {int(number): place for place, number in enumerate(run.doc_ids)}
        self.by_prompt: defaultdict[int, list[int]] = defaultdict(list)
        for place, key in enumerate(run.prompt_keys):
            self.by_prompt[int(key)].append(place)

    def __call__(self, doc_id: int, prompt_hash: str | None) -> tuple[int | None, bool]:
        """The position of a line's sample, and whether it is certain.

        A line may have no sample (None), because a run with a response cache also traces cached answers that it does
        not use.
        """
        place = self.by_doc.get(doc_id)
        if prompt_hash is None:
            return place, True
        candidates = self.by_prompt.get(prompt_key(prompt_hash), [])
        if place in candidates:
            return place, True
        # With lm_eval's --samples, the model and the sample log number docs differently.
        return (candidates[0] if len(candidates) == 1 else None), False


def _any_has_answer(passages: list[dict[str, Any]]) -> int:
    labels = [passage["has_answer"] for passage in passages]
    return UNKNOWN if None in labels else int(any(labels))


def _rank(retrieved: list[dict[str, Any]]) -> int:
    labels = [passage["has_answer"] for passage in retrieved]
    if not labels or None in labels:
        return UNKNOWN
    # The trace lists passages in the reranker's order if there is a reranker, else in the retriever's.
    return next((place for place, label in enumerate(labels, 1) if label), ABSENT)
