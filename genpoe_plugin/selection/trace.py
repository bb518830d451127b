"""The trace: a JSON Lines file that says, for every sample, what the LLM read, and which passages it had and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.files import atomic_file
from genpoe_plugin.selection.pipeline import Selection

TRACE = "trace_{date}.jsonl"
"""Beside lm-eval's results of that date, where no other place was given."""


class Trace:
    """Collects the lines of one run and writes them, all of them or nothing.

    A run's first write replaces what an earlier run left.

    Args:
        path: the file; under data parallelism each process but the first writes ``name.rank1.jsonl`` and so on, until
            `join` makes one file of them. Without one, lines are collected for a `write` that names a place.
        rank: of this process.
    """

    def __init__(self, path: str | Path | None = None, rank: int = 0) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and rank:
            self.path = self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")
        self._lines: dict[tuple[Any, ...], str] = {}

    def add(self, doc_id: int | None, selection: Selection, **facts: Any) -> str:
        """Note a sample, and return its line.

        Requests of one sample (the choices of a doc) make one line, if what they asked, the fact ``prompt_hash``, is
        the same. ``facts`` go in as they are.
        """
        line = {
            "task": selection.task,
            "doc_id": doc_id,
            "question": selection.question.question,
            **facts,
            "retrieved": [_scores(passage) for passage in selection.retrieved],
            "passages": [
                {**_scores(passage), "title": passage.passage.title, "gate": gate}
                for passage, gate in zip(selection.passages, selection.gates, strict=True)
            ],
        }
        self._lines[_key(line)] = told = json.dumps(line, ensure_ascii=False)
        return told

    def keep(self, lines: Iterable[str]) -> None:
        """Take over lines of an earlier run: what `lm_eval --use_cache` answers from it never reaches the model."""
        self._lines.update((_key(json.loads(line)), line) for line in lines)

    @property
    def lines(self) -> dict[tuple[Any, ...], str]:
        """What was noted so far, by task, doc, question and prompt."""
        return self._lines

    def join(self, parts: Sequence[Mapping[tuple[Any, ...], str]] | None) -> None:
        """Write the lines of all processes, in the order that one process has; without them, leave it to another."""
        if parts is None:
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            return
        lines = {key: line for part in parts for key, line in part.items()}
        tasks = list(dict.fromkeys(task for task, *_ in lines))
        self._lines = dict(sorted(lines.items(), key=lambda item: (tasks.index(item[0][0]), item[0][1])))
        self.write()

    def write(self, path: Path | None = None) -> None:
        """Write all lines, to ``path`` or the trace's own; to none where it has none."""
        path = self.path if path is None else path
        if path is not None:
            with atomic_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in self._lines.values()), encoding="utf-8")


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["task"], line["doc_id"], line["question"], line.get("prompt_hash")


def _scores(passage: RetrievedPassage) -> dict[str, Any]:
    return {
        "id": passage.passage.id,
        "rank": passage.rank,
        "score": passage.score,
        "rerank_rank": passage.rerank_rank,
        "rerank_score": passage.rerank_score,
        "has_answer": passage.has_answer,
    }
