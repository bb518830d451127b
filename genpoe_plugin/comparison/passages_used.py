"""Which passages the questions of a run were answered with: read from the trace that the genpoe model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from genpoe_plugin.comparison.runs import ABSENT, UNKNOWN, Run, read_lines
from genpoe_plugin.errors import InputError


@dataclass(frozen=True, eq=False)
class PassagesUsed:
    """For every question of a run, in the run's order.

    Attributes:
        given: 1 where a passage that the LLM was given has an answer, 0 where none has, -1 where that is not known.
        ranks: the best rank of a passage with an answer among those retrieved; 0 where none has one, -1 not known.
    """

    trace: Path
    given: NDArray[np.int64]
    ranks: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def line(self, place: int) -> dict[str, Any]:
        """The trace of a question, read again."""
        with self.trace.open("rb") as lines:
            lines.seek(int(self.offsets[place]))
            return orjson.loads(lines.readline())


def passages_used(run: Run) -> PassagesUsed | None:
    """What the trace of a run says; None where there is none to be found.

    Raises:
        InputError: the trace is broken, or of another run.
    """
    genpoe = run.genpoe
    name = genpoe and genpoe.get("arguments", {}).get("trace")
    if not genpoe or not name:
        return None
    folder = run.config.get("genpoe", {}).get("provenance", {}).get("directory", "")
    places = [Path(name), Path(folder) / name, *(parent / Path(name).name for parent in run.results.parents[:2])]
    trace = next((place for place in places if place.is_file()), None)
    if trace is None:
        return None
    place_of = {int(number): place for place, number in enumerate(run.doc_ids)}
    fingerprint = genpoe.get("fingerprint", {})
    facts = {"mode": fingerprint.get("mode"), "hypernetwork": fingerprint.get("hypernetwork")}
    if "settings" in genpoe:
        facts["settings"] = genpoe["settings"]
    given = np.full(len(place_of), UNKNOWN, np.int64)
    ranks, offsets = given.copy(), given.copy()
    for offset, line in read_lines(trace):
        if line["task"] != run.task:
            continue
        place = place_of.get(line["doc_id"])
        if place is None or any(line.get(fact) != value for fact, value in facts.items()):
            raise InputError(f"{trace}: the trace of another run than {run.results}; give every run a file of its own")
        offsets[place] = offset
        given[place] = _any_has_answer(line["passages"])
        ranks[place] = _rank(line["retrieved"])
    if (offsets < 0).any():
        missing = int(np.count_nonzero(offsets < 0))
        raise InputError(f"{trace}: {missing:,} questions of {run.results} are not in it; run it again")
    return PassagesUsed(trace, given, ranks, offsets)


def _any_has_answer(passages: list[dict[str, Any]]) -> int:
    found = [passage["has_answer"] for passage in passages]
    return UNKNOWN if None in found else int(any(found))


def _rank(retrieved: list[dict[str, Any]]) -> int:
    if not retrieved or any(passage["has_answer"] is None for passage in retrieved):
        return UNKNOWN
    # In the order in which passages are kept, which is the reranker's where there is one.
    found = (place for place, passage in enumerate(retrieved, 1) if passage["has_answer"])
    return next(found, ABSENT)
