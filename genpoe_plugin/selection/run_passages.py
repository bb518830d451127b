"""Questions with the passages of a TREC run, by whatever system it was made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.data.trec import Run
from genpoe_plugin.errors import InputError

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.passage_store import PassageStore


def passages_of_run(run: Run, source: str | Path | PassageStore, limit: int | None = None) -> dict[str, Passage]:
    """The texts of the passages of a run, by id; the source is read once.

    Args:
        run: the run.
        source: a file of passages, or the passages of an index.
        limit: the number of passages per question that are needed.

    Raises:
        InputError: one of the passages is not there.
    """
    wanted = {identifier for found in run.values() for identifier in islice(found, limit)}
    passages = _file_passages(source, wanted) if isinstance(source, str | Path) else source.find(wanted)
    if missing := wanted - passages.keys():
        raise InputError(
            f"{len(missing):,} of {len(wanted):,} passages of the run are not among the passages, such as"
            f" {min(missing)!r}; give those that were searched"
        )
    return passages


def _file_passages(path: str | Path, wanted: Collection[str]) -> dict[str, Passage]:
    return {passage.id: passage for passage in read_passages(path) if passage.id in wanted}


def with_run(
    questions: Iterable[Question], run: Run, passages: Mapping[str, Passage], limit: int | None = None
) -> Iterator[Question]:
    """Yield the questions with the passages that a run has for their ids, in place of any that they had.

    Args:
        questions: questions with ids (`identified`).
        run: the run.
        passages: the passages of the run, by id.
        limit: the largest number of passages per question.

    Raises:
        InputError: the run has questions that are not among them.
    """
    others = set(run)
    for question in questions:
        others.discard(question.id)
        ranked = enumerate(islice(run.get(question.id, {}).items(), limit), 1)
        yield replace(
            question,
            passages=tuple(RetrievedPassage(passages[identifier], score, rank) for rank, (identifier, score) in ranked),
        )
    if others:
        raise InputError(
            f"the run has {len(others):,} questions that are not in the file of questions, such as {min(others)!r};"
            " questions without an id are numbered from 1"
        )
