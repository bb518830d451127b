"""What the questions of a run were answered with: read from the trace that the genpoe model wrote."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from genpoe_plugin.comparison.runs import ABSENT, UNKNOWN, Run, prompt_key, read_lines
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.trace import TRACE


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
    if not genpoe:
        return None
    name = genpoe.get("arguments", {}).get("trace") or TRACE.format(date=run.date)
    folder = genpoe.get("provenance", {}).get("directory", "")
    places = [Path(name), Path(folder) / name, *(parent / Path(name).name for parent in run.results.parents[:2])]
    trace = next((place for place in places if place.is_file()), None)
    if trace is None:
        return None
    fingerprint = genpoe.get("fingerprint", {})
    facts = {"mode": fingerprint.get("mode"), "hypernetwork": fingerprint.get("hypernetwork")}
    if "settings" in genpoe:
        facts["settings"] = genpoe["settings"]
    place_of = _Places(run)
    given = np.full(len(run.doc_ids), UNKNOWN, np.int64)
    ranks, offsets = given.copy(), given.copy()
    for offset, line in read_lines(trace):
        try:
            if line["task"] != run.task:
                continue
            if any(line.get(fact) != value for fact, value in facts.items()):
                raise InputError(
                    f"{trace}: the trace of another run than {run.results}; give every run a file of its own"
                )
            place, sure = place_of(line["doc_id"], line.get("prompt_hash"))
            if place is None or not (sure or offsets[place] < 0):
                continue
            offsets[place] = offset
            given[place] = _any_has_answer(line["passages"])
            ranks[place] = _rank(line["retrieved"])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{trace}: not a trace ({type(error).__name__}: {error})") from error
    if (offsets < 0).any():
        missing = int(np.count_nonzero(offsets < 0))
        raise InputError(f"{trace}: {missing:,} questions of {run.results} are not in it; run it again")
    return PassagesUsed(trace, given, ranks, offsets)


class _Places:
    """Where the samples of a run are that the lines of a trace are of."""

    def __init__(self, run: Run) -> None:
        self.by_doc = {int(number): place for place, number in enumerate(run.doc_ids)}
        self.by_prompt: defaultdict[int, list[int]] = defaultdict(list)
        for place, key in enumerate(run.asked):
            self.by_prompt[int(key)].append(place)

    def __call__(self, doc_id: int, prompt_hash: str | None) -> tuple[int | None, bool]:
        """The place of a line's sample, and whether it is surely that one.

        A run with a response cache traces all that the cache answers, asked now or not, so a line may have none.
        """
        place = self.by_doc.get(doc_id)
        if prompt_hash is None:
            return place, True
        asked = self.by_prompt.get(prompt_key(prompt_hash), [])
        if place in asked:
            return place, True
        # With lm_eval's --samples, the model and the sample log number docs differently.
        return (asked[0] if len(asked) == 1 else None), False


def _any_has_answer(passages: list[dict[str, Any]]) -> int:
    found = [passage["has_answer"] for passage in passages]
    return UNKNOWN if None in found else int(any(found))


def _rank(retrieved: list[dict[str, Any]]) -> int:
    if not retrieved or any(passage["has_answer"] is None for passage in retrieved):
        return UNKNOWN
    # In the order in which passages are kept, which is the reranker's where there is one.
    found = (place for place, passage in enumerate(retrieved, 1) if passage["has_answer"])
    return next(found, ABSENT)
