"""A study of one LLM: its settings, its rows as runs of the stock lm_eval, and what has been found so far."""

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
NATS_BATCH = 8  # lm_eval keeps the logits of whole prompts: gigabytes with a large vocabulary
SEED = 0  # of the sample of questions, and of the controls


@dataclass(frozen=True)
class Study:
    """What a study is asked for.

    Attributes:
        llm: a directory, or a name of the hub.
        out: folder of all that the study writes.
        files: of questions, by data set.
        sets: layers by their number.
        limit, limit_curve, limit_nats: questions of each data set; the second in rows on layers, distractors and
            retrieval, the third where the likelihood of answers is scored.
        max_tokens: of an answer.
        expert_gb: gigabytes of memory for experts.
        store: whether all experts are kept on disk too, so that every passage is read once for all rows.
        heads: checkpoint with chosen key-value heads.

    Raises:
        InputError: settings that cannot be.
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
                raise InputError(f"--limit-{name} {part}: more than --limit {self.limit}, of which it is a part")
        for value in (self.llm, str(self.out)):
            if "," in value:
                raise InputError(f"{value}: has a comma, at which lm_eval would split it; give another directory")

    @classmethod
    def asked(
        cls, llm: str, out: Path, *, limit: int, limit_curve: int | None, limit_nats: int | None, **more: Any
    ) -> Study:
        """As a command asks for it: limits that are not given are ``limit``."""
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

    def chosen(self, names: str | None) -> list[StudyRow]:
        """The rows of these names, separated by commas, in their order; without names all of them.

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
        """Write down the settings, or check them against those of what is there; then write the files of questions.

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
        """What all rows share. The sets of layers are not among it, so that some may come later."""
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
        """The runs of lm_eval that a row is: answers, and likelihoods of the right ones.

        It is one run where both are for as many questions and no passage stands in the prompt.
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
            # One checkpoint for all sets of layers, so that every passage is read once for all rows.
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
        """Carry out a row, unless its results are there.

        Args:
            jobs: rows that are carried out at a time, which share the processors.

        Raises:
            InputError: it failed, or its folder has another run.
        """
        if row.layers and row.checkpoint is None:
            self.create()
        for matrix in self._matrices(row):
            run_matrix(matrix, jobs)

    def create(self) -> None:
        """Write the checkpoint of experts in all layers, unless it is there."""
        if self._checkpoint.is_dir():
            return
        run_genpoe("experts", "create", "--llm", self.llm, "--preset", "attention", "--out", self._checkpoint)

    def finished(self, rows: Sequence[StudyRow] | None = None) -> list[StudyRow]:
        """Those of ``rows``, or of all rows of the study, that have whole results.

        Raises:
            InputError: a row's folder has another run than the settings say.
        """
        return [
            row
            for row in (self.rows if rows is None else rows)
            if all(is_finished(matrix, cell) for matrix in self._matrices(row) for cell in matrix.cells)
        ]

    def scores(self, rows: Sequence[StudyRow] | None = None) -> dict[str, Scores]:
        """Of all finished rows, by name."""
        tokens = token_counter(load_tokenizer(self.llm))
        return {
            row.name: read_scores(self._folders(self._matrices(row)), list(self.files), tokens)
            for row in self.finished(rows)
        }

    def answers(self, rows: Sequence[StudyRow]) -> dict[str, Scores]:
        """Of all rows whose answers are there, by name; with likelihoods only where they are there too."""
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
