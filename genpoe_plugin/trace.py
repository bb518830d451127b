"""The trace: a JSON Lines file that says, for every sample, which passages it was answered with and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genpoe_plugin.files import atomic_file, open_text
from genpoe_plugin.pipeline import Selection
from genpoe_plugin.questions import RetrievedPassage


class Trace:
    """Collects the lines of one run and writes them, all of them or nothing.

    A run's first write replaces what an earlier run left, but for `keep_earlier`.

    Args:
        path: the file; under data parallelism each process but the first writes ``name.rank1.jsonl`` and so on, until
            `join` makes one file of them.
        rank: of this process.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        path = Path(path)
        self.path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path
        self._lines: dict[tuple[Any, ...], str] = {}

    def add(self, doc_id: int | None, selection: Selection, **facts: Any) -> None:
        """Note a sample; requests of one sample (the choices of a doc) make one line. ``facts`` go in as they are."""
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
        self._lines[_key(line)] = json.dumps(line, ensure_ascii=False)

    def add_prompt(self, doc_id: int | None, selection: Selection, prompt: str) -> None:
        """Add to the line of a sample the prompt that the LLM reads, with the passages that are in it."""
        key = selection.task, doc_id, selection.question.question
        self._lines[key] = json.dumps({**json.loads(self._lines[key]), "prompt": prompt}, ensure_ascii=False)

    def keep_earlier(self) -> None:
        """Take over the lines of an earlier run: what `lm_eval --use_cache` answers from it never reaches the model."""
        if self.path.is_file():
            with open_text(self.path) as file:
                self._lines = {_key(json.loads(line)): line.rstrip("\n") for line in file}

    @property
    def lines(self) -> dict[tuple[Any, ...], str]:
        """What was noted so far, by task, doc and question."""
        return self._lines

    def join(self, parts: Sequence[Mapping[tuple[Any, ...], str]] | None) -> None:
        """Write the lines of all processes, in the order that one process has; without them, leave it to another."""
        if parts is None:
            self.path.unlink(missing_ok=True)
            return
        lines = {key: line for part in parts for key, line in part.items()}
        tasks = list(dict.fromkeys(task for task, *_ in lines))
        self._lines = dict(sorted(lines.items(), key=lambda item: (tasks.index(item[0][0]), item[0][1])))
        self.write()

    def write(self) -> None:
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in self._lines.values()), encoding="utf-8")


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["task"], line["doc_id"], line["question"]


def _scores(passage: RetrievedPassage) -> dict[str, Any]:
    return {
        "id": passage.passage.id,
        "rank": passage.rank,
        "score": passage.score,
        "rerank_rank": passage.rerank_rank,
        "rerank_score": passage.rerank_score,
        "has_answer": passage.has_answer,
    }
