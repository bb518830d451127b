"""The trace: a JSON Lines file with the passages, scores, gates and prompt of every sample."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.files import atomic_file
from genpoe_plugin.selection.pipeline import Selection

TRACE = "trace_{date}.jsonl"
"""Default name of the trace, beside lm-eval's results of that date."""


class Trace:
    """Collects the lines of one run and writes them atomically.

    The first write of a run replaces the file of an earlier run.

    Args:
        path: the trace file. Under data parallelism, every process except the first writes to ``name.rank1.jsonl`` and
            so on, until `join` merges them. If None, `write` must be called with a path.
        rank: rank of this process.
    """

    def __init__(self, path: str | Path | None = None, rank: int = 0) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and rank:
            self.path = self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")
        self._lines: dict[tuple[Any, ...], str] = {}

    def add(self, doc_id: int | None, selection: Selection, **facts: Any) -> str:
        """Add a sample and return its line.

        Requests of one sample (the choices of a doc) share one line if they have the same ``prompt_hash``.

        Args:
            doc_id: the doc's number in its task.
            selection: the sample's passages and gates.
            facts: further fields of the line, written unchanged.
        """
        line = {
            "task": selection.task,
            "doc_id": doc_id,
            "question": selection.question.question,
            **facts,
            "retrieved": [_scores(passage) for passage in selection.retrieved],
            "passages": [
                {
                    **_scores(passage),
                    "title": passage.passage.title,
                    "words": len(passage.passage.text.split()),
                    "gate": gate,
                }
                for passage, gate in zip(selection.passages, selection.gates, strict=True)
            ],
        }
        self._lines[_key(line)] = text = json.dumps(line, ensure_ascii=False)
        return text

    def keep(self, lines: Iterable[str]) -> None:
        """Add lines of an earlier run, for samples that `lm_eval --use_cache` answers without calling the model."""
        self._lines.update((_key(json.loads(line)), line) for line in lines)

    @property
    def lines(self) -> dict[tuple[Any, ...], str]:
        """The lines so far, by task, doc, question and prompt."""
        return self._lines

    def join(self, parts: Sequence[Mapping[tuple[Any, ...], str]] | None) -> None:
        """Write the lines of all processes, in the order of a run with one process.

        Args:
            parts: the `lines` of every process; None in every process except the one that writes.
        """
        if parts is None:
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            return
        lines = {key: line for part in parts for key, line in part.items()}
        tasks = list(dict.fromkeys(task for task, *_ in lines))
        self._lines = dict(sorted(lines.items(), key=lambda item: (tasks.index(item[0][0]), item[0][1])))
        self.write()

    def write(self, path: Path | None = None) -> None:
        """Write all lines to ``path``, by default to the trace's own path; without either, write nothing."""
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
