"""``real-llm study``: trained experts, beside untrained ones and beside RAG that learned as much.

A cell is a training and its rows of the stock lm_eval: with the right passage, with another question's, and with one
that is the same for all. What training teaches besides passages shows in the last, and in the adapter of RAG.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.real_llm.layers import BYTES, Layers
from benchmarks.real_llm.lora import ADAPTER, train_adapter
from benchmarks.real_llm.measures import Paired, mean
from benchmarks.real_llm.output import passage_tokens
from benchmarks.real_llm.questions import file_of, with_gold
from benchmarks.real_llm.rows import StudyRow
from benchmarks.real_llm.scores import Scores, paired
from benchmarks.real_llm.study import Study
from benchmarks.row import machine
from genpoe_plugin.checkpoint import read_config
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.int8 import unit_bytes
from genpoe_plugin.files import atomic_file, file_digest
from genpoe_plugin.language_model import load_language_model
from genpoe_plugin.prompts import normalise_question
from genpoe_plugin.questions import read_questions, write_questions
from genpoe_plugin.training.arguments import HypernetworkTraining
from genpoe_plugin.training.examples import training_examples

CONTROLS = ("shuffled", "constant")
UNTRAINED, INT8 = "untrained", "int8"
LORA = "rag_lora"
LADDER = "ladder.json"
LABELS = {
    f"-{INT8}": f", {INT8}",
    "-experts": ", untrained experts",
    "-experts-shuffled": ", untrained experts",
    "-experts-all": ", untrained experts in all layers",
}
"""Ends of the names of rows, and what a table has beside the name of the training."""
COMPARED = ("em", "f1", "nats")


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        options: of `genpoe train hypernetwork`, beside those that all cells share; None for the adapter of RAG.
    """

    name: str
    options: tuple[str, ...] | None = ()


def cells(layers: Sequence[int]) -> list[Cell]:
    """The ladder, for experts in ``layers``."""
    attention = ("--preset", "attention", "--layers", ",".join(map(str, layers)))
    one_layer = ("--preset", "attention", "--layers", str(layers[-1]))
    middle = ("--layer", str(layers[0]))
    return [
        Cell(LORA, None),
        Cell("window_4", (*attention, "--window", "4")),
        Cell("window_16", (*attention, "--window", "16")),
        Cell("window_1", attention),
        Cell("window_4_unanswerable", (*attention, "--window", "4", "--unanswerable", "0.25")),
        Cell("window_4_distilled", (*attention, "--window", "4", "--distillation", "0.5")),
        Cell("window_4_distractors", (*attention, "--window", "4", "--num-passages", "4")),
        Cell("window_64", (*attention, "--window", "64")),
        Cell("window_4_beside_mlp", (*attention, "--window", "4", "--place", "mlp")),
        Cell("window_4_beside_one_mlp", (*one_layer, "--window", "4", "--place", "mlp")),
        Cell("memory", ("--preset", "recommended", *middle)),
    ]


@dataclass(frozen=True)
class Ladder:
    """What a study of trainings is asked for.

    Attributes:
        study: its LLM, its questions and where everything goes; its rows are not run but for closed-book answering and
            RAG.
        layers: of experts in the attention.
        training: file of questions with passages, for each data set.
        arguments: of all trainings, without their seed.
        lora_rank: of the adapter of RAG.
    """

    study: Study
    layers: Layers
    training: tuple[Path, ...]
    arguments: HypernetworkTraining
    lora_rank: int

    @property
    def _wanted(self) -> int:
        """Questions that the steps need."""
        return (self.arguments.max_steps or 1) * self.arguments.batch_size

    @property
    def data(self) -> Path:
        """The questions that all cells learn from."""
        return self.study.out / f"training-{self._wanted}.jsonl"

    def write_data(self) -> None:
        """As many questions of each file as the steps need, drawn by seed 0, without those that the study asks."""
        if self.data.is_file():
            return
        asked = {
            normalise_question(question.question).casefold()
            for name in self.study.files
            for question in read_questions(file_of(self.study.out, name, "gold"))
        }
        drawn = []
        for file in self.training:
            questions = [
                question
                for question in with_gold(read_questions(file))
                if normalise_question(question.question).casefold() not in asked
            ]
            drawn += random.Random(0).sample(questions, min(-(-self._wanted // len(self.training)), len(questions)))
        random.Random(1).shuffle(drawn)
        write_questions(self.data, drawn, purpose="training")

    def train(self, cell: Cell, seed: int) -> Path:
        """The folder of a cell's checkpoint or adapter, which is made unless it is there.

        Raises:
            InputError: the training failed.
        """
        out = self.study.out / "trained" / f"{cell.name}-{seed}"
        arguments = replace(self.arguments, seed=seed)
        if cell.options is None:
            model, tokenizer = load_language_model(self.study.llm, device=self.study.device, dtype=self.study.dtype)
            model.requires_grad_(False)
            examples = training_examples(read_questions(self.data))
            identity = {"llm": self.study.llm, "dtype": self.study.dtype, "data": file_digest(self.data)}
            return train_adapter(model, tokenizer, examples, arguments, self.lora_rank, out, identity)
        words = ["train", "hypernetwork", "--model", self.study.llm, "--data", str(self.data), "--out", str(out)]
        words += ["--dtype", self.study.dtype, "--device", str(self.study.device)]
        for name in ("max_steps", "batch_size", "micro_batch_size", "learning_rate", "precision", "save_every", "seed"):
            if (value := getattr(arguments, name)) is not None:
                words += ["--" + name.replace("_", "-"), str(value)]
        done = subprocess.run([sys.executable, "-m", "train_cli", *words, *cell.options], stdin=subprocess.DEVNULL)
        if done.returncode:
            raise InputError(f"{cell.name}: training stopped with status {done.returncode}; the same command goes on")
        return out

    def rows(self, cell: Cell, seed: int) -> list[StudyRow]:
        """What is asked of a trained cell: the right passage, and the controls."""
        name, trained = f"{cell.name}-{seed}", self.study.out / "trained" / f"{cell.name}-{seed}"
        if cell.options is None:
            # What has learned to read its prompt reads experts as well, though none of them was trained.
            experts = StudyRow(f"{name}-experts", "genpoe", layers=self.layers, adapter=trained / ADAPTER)
            return [
                StudyRow(name, "rag", adapter=trained / ADAPTER),
                experts,
                replace(experts, name=f"{name}-experts-shuffled", passages="shuffled", curve=True),
                replace(experts, name=f"{name}-experts-all", layers=self.study.shape.all, curve=True),
            ]
        row = StudyRow(name, "genpoe", layers=self.layers, checkpoint=trained)
        rows = [row, *(replace(row, name=f"{name}-{kind}", passages=kind, curve=True) for kind in CONTROLS)]
        return [*rows, _in_int8(row)] if "attention" in cell.options else rows

    def base_rows(self) -> list[StudyRow]:
        """What trainings are compared with."""
        untrained = StudyRow(UNTRAINED, "genpoe", layers=self.layers)
        return [StudyRow("closed_book", "closed_book"), StudyRow("rag", "rag"), untrained, _in_int8(untrained)]

    def records(self) -> list[dict[str, Any]]:
        """One for every finished row, of whichever command."""
        rows = {row.name: (_label(row.name, row.name.removesuffix(f"-{INT8}")), None, row) for row in self.base_rows()}
        for cell in cells(self.layers):
            folders = (self.study.out / "trained").glob(f"{cell.name}-*")
            for seed in sorted(int(end) for folder in folders if (end := folder.name[len(cell.name) + 1 :]).isdigit()):
                own = f"{cell.name}-{seed}"
                rows |= {
                    row.name: (cell.name + _label(row.name, own)[len(own) :], seed, row)
                    for row in self.rows(cell, seed)
                }
        scores = self.study.scores([row for _, _, row in rows.values()])
        return [
            {"row": name, "seed": "" if seed is None else seed} | self._record(row, seed, scores)
            for name, seed, row in rows.values()
            if row.name in scores
        ]

    def _record(self, row: StudyRow, seed: int | None, scores: dict[str, Scores]) -> dict[str, Any]:
        names = list(self.study.files)
        record: dict[str, Any] = {
            "passage": "right" if row.passages == "retrieved" else row.passages,
            **self._size(row),
        }
        for measure in COMPARED:
            column = paired([scores[row.name]], names, (measure,))[:, 0]
            record[measure] = asdict(mean(column, share=measure != "nats"))
        record["n"] = len(paired([scores[row.name]], names, ("f1",)))
        if row.mode == "genpoe" and row.passages == "retrieved":
            for name, other in (("of_prompt", "rag"), ("of_rag_lora", f"{LORA}-{seed}")):
                if {"closed_book", other} <= scores.keys():
                    three = [scores[one] for one in (row.name, "closed_book", other)]
                    share = Paired(paired(three, names, ("f1",))).recovered(0, 1, 2)
                    record[name] = share and asdict(share)
        return record

    def _size(self, row: StudyRow) -> dict[str, Any]:
        """Numbers that were trained, bytes of a unit in 16 bits or as it is kept, and tokens of a unit."""
        parameters = 0
        if row.adapter is not None:
            weights = load_file(row.adapter / "adapter_model.safetensors")
            parameters = sum(weight.numel() for weight in weights.values())
        if not row.layers:
            return {"parameters": parameters, "unit_bytes": None, "window": None}
        if row.checkpoint is None:
            size, window = self.study.shape.bytes(row.layers), 1
        else:
            config = read_config(row.checkpoint)
            size, parameters = footprint(config).expert_bytes // 2, footprint(config).parameters
            window = config.window if config.head == "attention" else 10**9  # one unit, whatever the length
        if row.expert_dtype == INT8:
            width = self.study.shape.width
            size = unit_bytes(size // BYTES // width, width)
        return {"parameters": parameters, "unit_bytes": size, "window": window}


def _label(name: str, own: str) -> str:
    """``own``, the name of a training or of a row without one, and what a table has for the rest of ``name``."""
    rest = name[len(own) :]
    return own + LABELS.get(rest, "")


def _in_int8(row: StudyRow) -> StudyRow:
    return replace(row, name=f"{row.name}-{INT8}", expert_dtype=INT8, curve=True)


def write_ladder(ladder: Ladder, command: str) -> Path:
    """Write `LADDER` with all finished rows."""
    path = ladder.study.out / LADDER
    record = {
        "llm": Path(ladder.study.llm).name,
        "layers": ladder.layers,
        "arguments": asdict(ladder.arguments),
        "lora_rank": ladder.lora_rank,
        "command": command,
        "machine": machine(),
        "passage_tokens": passage_tokens(ladder.study),
        "rows": ladder.records(),
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
