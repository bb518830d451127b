"""A study of one LLM: its settings, its rows as runs of the stock lm_eval, and their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.real_llm.commands import run_genpoe, whole_name
from benchmarks.real_llm.layers import Layers, Shape, largest_set, read_heads
from benchmarks.real_llm.questions import file_of, write_files
from benchmarks.real_llm.rows import StudyRow, study_rows
from benchmarks.real_llm.scores import NATS, Scores, kinds_of, read_scores, tasks_of, token_counter
from genpoe_plugin.comparison.matrix import Cell, Matrix, is_finished, run_matrix
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, file_digest
from genpoe_plugin.llm.language_model import load_tokenizer

SETTINGS = "study.json"
NATS_BATCH = 8  # lm_eval keeps the logits of whole prompts, which are gigabytes for a large vocabulary
SEED = 0  # random seed of the sample of questions and of the controls


@dataclass(frozen=True)
class Study:
    """Settings of a study.

    Attributes:
        llm: directory or hub name.
        out: output folder.
        files: files of questions by data set.
        sets: sets of layers by size.
        limit: questions per data set.
        limit_curve: questions per data set in rows on layers, distractors and retrieval.
        limit_nats: questions per data set for likelihoods.
        max_tokens: maximum length of an answer.
        expert_gb: gigabytes of memory for experts.
        store: whether experts are also stored on disk, so that each passage is read once for all rows.
        heads: checkpoint with selected key-value heads.

    Raises:
        InputError: a limit is too large, or a path has a comma.
    """

    llm: str
    out: Path
    files: Mapping[str, Path]
    sets: Mapping[int, Layers]
    shape: Shape
    limit: int
    limit_curve: int
    limit_nats: int
    dtype: str = "auto"
    batch_size: int = 16
    max_tokens: int = 16
    device: str | None = None
    expert_gb: float = 2.0
    store: bool = True
    heads: Path | None = None

    def __post_init__(self) -> None:
        for name, part in (("curve", self.limit_curve), ("nats", self.limit_nats)):
            if part > self.limit:
                raise InputError(f"--limit-{name} {part}: more than --limit {self.limit}; give at most as many")
        for value in (self.llm, str(self.out)):
            if "," in value:
                raise InputError(f"{value}: has a comma, which separates arguments in lm_eval; give another directory")

    @classmethod
    def from_options(
        cls, llm: str, out: Path, *, limit: int, limit_curve: int | None, limit_nats: int | None, **more: Any
    ) -> Study:
        """The study for the options of a command; a limit that is None is ``limit``."""
        return cls(
            llm=whole_name(llm),
            out=out.resolve(),
            limit=limit,
            limit_curve=limit if limit_curve is None else limit_curve,
            limit_nats=limit if limit_nats is None else limit_nats,
            **more,
        )

    @cached_property
    def main(self) -> Layers:
        return largest_set(dict(self.sets), self.shape.depth // 2)

    @cached_property
    def rows(self) -> list[StudyRow]:
        quarter = largest_set(dict(self.sets), max(1, self.shape.depth // 4))
        heads = None if self.heads is None else (self.heads, *read_heads(self.heads))
        return study_rows(dict(self.sets), self.main, quarter, self.shape.all, heads)

    def select_rows(self, names: str | None) -> list[StudyRow]:
        """The rows with the given names (comma-separated), in that order; without names, all rows.

        Raises:
            InputError: there is no such row.
        """
        if names is None:
            return self.rows
        known = {row.name: row for row in self.rows}
        wanted = list(dict.fromkeys(names.split(",")))
        if unknown := [name for name in wanted if name not in known]:
            raise InputError(f"--rows {unknown[0]}: not one of {', '.join(known)}")
        return [known[name] for name in wanted]

    def prepare(self) -> None:
        """Write the settings, or check them against those of an existing study; then write the files of questions.

        Raises:
            InputError: ``out`` has a study with other settings.
        """
        path, settings = self.out / SETTINGS, self._settings()
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if different := [name for name in settings if found.get(name) != settings[name]]:
                others = ", ".join(f"{name} {found.get(name)}, not {settings[name]}" for name in different)
                raise InputError(f"{self.out}: has a study with {others}; give another --out, or delete it")
        else:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        write_files(self.files, self.out, self.limit, SEED)

    def _settings(self) -> dict[str, Any]:
        """Settings that all rows share. Sets of layers are not included, so more can be added later."""
        return {
            "llm": Path(self.llm).name,
            "limit": self.limit,
            "limit_curve": self.limit_curve,
            "limit_nats": self.limit_nats,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "seed": SEED,
            "questions": {name: {"file": path.name, "sha256": file_digest(path)} for name, path in self.files.items()},
        }

    def _matrices(self, row: StudyRow) -> list[Matrix]:
        """The lm_eval runs of a row: generated answers, and likelihoods of the right answers.

        Both are one run if they use the same number of questions and no passage is in the prompt.
        """
        limit = self.limit_curve if row.curve else self.limit
        if limit <= self.limit_nats and row.mode in ("closed_book", "genpoe"):
            return [self._matrix(row, "", ("", NATS), limit)]
        return [self._matrix(row, "", ("",), limit), self._matrix(row, NATS, (NATS,), min(limit, self.limit_nats))]

    def _matrix(self, row: StudyRow, suffix: str, kinds: Sequence[str], limit: int) -> Matrix:
        arguments: dict[str, Any] = {"pretrained": self.llm, "dtype": self.dtype, "mode": row.mode, "seed": SEED}
        if row.mode != "closed_book":
            arguments |= {"passages": row.passages, "num_passages": row.num_passages}
        if row.adapter is not None:
            arguments["peft"] = row.adapter
        if row.expert_dtype is not None:
            arguments["expert_dtype"] = row.expert_dtype
        if row.layers:
            # One checkpoint for all sets of layers, so that each passage is read once for all rows.
            arguments |= {"hypernetwork": row.checkpoint or self._checkpoint, "gates": row.gates}
            arguments |= {"expert_gb": self.expert_gb}
            if self.store:
                arguments["expert_store"] = self.out / "experts"
            if row.layers != self.shape.all and row.checkpoint is None:
                arguments["expert_layers"] = "+".join(map(str, row.layers))
        options = {
            "batch_size": self.batch_size if "" in kinds else min(self.batch_size, NATS_BATCH),
            "device": self.device,
            "limit": limit,
            **({"gen_kwargs": f"max_gen_toks={self.max_tokens}"} if "" in kinds else {}),
            "metadata": {
                "genpoe_data": {f"genpoe_{name}": str(file_of(self.out, name, row.purpose)) for name in self.files}
            },
        }
        cell = Cell(row.name + suffix, "genpoe", {name: str(value) for name, value in arguments.items()})
        tasks = [task for kind in kinds for task in tasks_of(list(self.files), kind)]
        return Matrix(self.out / "rows", tuple(tasks), options, (cell,))

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint"

    def run(self, row: StudyRow, jobs: int = 1) -> None:
        """Run a row, unless its results exist.

        Args:
            jobs: number of rows that run in parallel and share the processors.

        Raises:
            InputError: the run failed, or its folder has another run.
        """
        if row.layers and row.checkpoint is None:
            self.create()
        for matrix in self._matrices(row):
            run_matrix(matrix, jobs)

    def create(self) -> None:
        """Write the checkpoint of experts in all layers, unless it exists."""
        if self._checkpoint.is_dir():
            return
        run_genpoe("experts", "create", "--llm", self.llm, "--out", self._checkpoint)

    def finished(self, rows: Sequence[StudyRow] | None = None) -> list[StudyRow]:
        """The rows (by default of the whole study) with complete results.

        Raises:
            InputError: a row's folder has a run with other settings.
        """
        return [
            row
            for row in (self.rows if rows is None else rows)
            if all(is_finished(matrix, cell) for matrix in self._matrices(row) for cell in matrix.cells)
        ]

    def scores(self, rows: Sequence[StudyRow] | None = None) -> dict[str, Scores]:
        """Scores of all finished rows, by name."""
        tokens = token_counter(load_tokenizer(self.llm))
        return {
            row.name: read_scores(self._folders(self._matrices(row)), list(self.files), tokens)
            for row in self.finished(rows)
        }

    def answers(self, rows: Sequence[StudyRow]) -> dict[str, Scores]:
        """Scores of all rows with generated answers, by name. Likelihoods are included if they exist."""
        tokens = token_counter(load_tokenizer(self.llm))
        found = {}
        for row in rows:
            matrices = [
                matrix for matrix in self._matrices(row) if all(is_finished(matrix, cell) for cell in matrix.cells)
            ]
            if any("" in kinds_of(matrix.tasks) for matrix in matrices):
                found[row.name] = read_scores(self._folders(matrices), list(self.files), tokens, nats=False)
        return found

    @staticmethod
    def _folders(matrices: Sequence[Matrix]) -> list[Path]:
        return [matrix.folder(cell) for matrix in matrices for cell in matrix.cells]
