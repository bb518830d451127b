"""``real-llm study``: trained experts against untrained ones, and against RAG trained on the same questions.

A cell is one training and its evaluations (rows) with the stock lm_eval: with the right passage, with another
question's passage, and with one passage for all questions. The last control and RAG's adapter show what training
teaches besides reading passages.
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
from benchmarks.real_llm.lora import ADAPTER
from benchmarks.real_llm.measures import Paired, mean
from benchmarks.real_llm.output import passage_tokens
from benchmarks.real_llm.questions import DISTRACTORS, file_of, with_gold, with_hard_negatives
from benchmarks.real_llm.rows import StudyRow
from benchmarks.real_llm.scores import Scores, paired
from benchmarks.real_llm.study import Study
from benchmarks.row import machine
from genpoe_plugin.checkpoints.checkpoint import read_config
from genpoe_plugin.comparison.matrix import processors_of_one
from genpoe_plugin.data.questions import read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.int8 import unit_bytes
from genpoe_plugin.files import atomic_file
from genpoe_plugin.prompts import normalise_question
from genpoe_plugin.training.training_arguments import HypernetworkTraining

CONTROLS = ("shuffled", "constant")
UNTRAINED, INT8, FOUR_EQUAL = "untrained", "int8", "four-equal"
LORA = "rag_lora"
LADDER = "ladder.json"
IN_INT8 = ("window_4", "window_16")
"""Cells that are also evaluated with int8 experts."""
COUNTS = (1, 2, 4, 8)
"""Numbers of retrieved passages per question."""
LABELS = {
    f"-{INT8}": f", {INT8}",
    "-experts": ", untrained experts",
    "-experts-shuffled": ", untrained experts",
    "-experts-all": ", untrained experts in all layers",
    f"-{FOUR_EQUAL}": "",
    **{f"-first-{count}": "" for count in COUNTS},
}
"""Suffix of a row's name to the text that follows the cell's name in the table."""
COMPARED = ("em", "f1", "nats")


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        options: options of `genpoe train hypernetwork` besides the shared ones; None for the adapter of RAG.
        pretrained: whether training starts on passages alone, for as many steps as on questions.
        several: whether the cell is also evaluated with several passages of equal gates.
    """

    name: str
    options: tuple[str, ...] | None = ()
    pretrained: bool = False
    several: bool = False


def cells(layers: Sequence[int], more_layers: Sequence[int] | None = None) -> list[Cell]:
    """All cells of a study: most differ from ``window_4`` in one option.

    Args:
        layers: layers with experts in the attention.
        more_layers: layers of the cells named ``more_layers``; without them there are no such cells.
    """

    def attention(*options: str, window: int = 4, queries: bool = True, layout: str = "paragraph", own: Any = None):
        words = ["--preset", "attention", "--layers", ",".join(map(str, own or layers)), "--window", str(window)]
        words += ["--layout", layout, *(("--query-rank", "64") if queries else ())]
        return (*words, *options)

    unanswerable, several = ("--unanswerable", "0.25"), ("--num-passages", "4")
    # The best single layer of Gemma 3 and of Qwen2.5 is in the middle of their best three or four.
    one, first = (layers[(len(layers) - 1) // 2],), ("--layer", str(layers[0]))
    found = [
        Cell(LORA, None),
        Cell("window_4", attention()),
        Cell("window_16", attention(window=16)),
        Cell("window_4_unanswerable", attention(*unanswerable)),
        Cell("window_4_robust", attention(*unanswerable, *several), several=True),
        Cell("window_16_robust", attention(*unanswerable, *several, window=16), several=True),
        Cell("window_4_distractors", attention(*several), several=True),
        Cell("window_4_distilled", attention("--distillation", "0.5")),
        Cell("window_4_pretrained", attention(), pretrained=True),
        Cell("window_4_plain_queries", attention(queries=False)),
        Cell("window_4_prompt_layout", attention(layout="knowledge")),
        Cell("window_1", attention(window=1)),
        Cell("window_64", attention(window=64)),
        Cell("window_4_one_layer", attention(own=one)),
        Cell("window_4_beside_mlp", attention("--place", "mlp")),
        Cell("window_4_beside_one_mlp", attention("--place", "mlp", own=one)),
        Cell("memory", ("--preset", "memory", *first)),
        Cell("paper", ("--preset", "paper", *first)),
    ]
    if more_layers is not None:
        more = [Cell(f"window_{size}_more_layers", attention(window=size, own=more_layers)) for size in (4, 16)]
        found[3:3] = more
    return found


@dataclass(frozen=True)
class Ladder:
    """Settings of a study of trainings.

    Attributes:
        study: LLM, questions and output folder; of its own rows, only closed-book answering and RAG run.
        layers: layers with experts in the attention.
        training: files of training questions with passages, one per data set.
        arguments: arguments of all trainings, except the seed.
        lora_rank: rank of RAG's LoRA adapter.
        more_layers: see `cells`.
        passages: file of passages for pretraining.
        jobs: number of trainings and rows to run in parallel.
    """

    study: Study
    layers: Layers
    training: tuple[Path, ...]
    arguments: HypernetworkTraining
    lora_rank: int
    more_layers: Layers | None = None
    passages: Path | None = None
    jobs: int = 1

    @property
    def cells(self) -> list[Cell]:
        return cells(self.layers, self.more_layers)

    @property
    def _wanted(self) -> int:
        """Number of training questions for all steps."""
        return (self.arguments.max_steps or 1) * self.arguments.batch_size

    @property
    def data(self) -> Path:
        """File of the training questions of all cells."""
        return self.study.out / f"training-{self._wanted}.jsonl"

    def write_data(self) -> None:
        """Sample the training questions from all files, without the study's evaluation questions.

        Each question has its own passage and BM25's best passages without an answer.
        """
        if self.data.is_file():
            return
        evaluated = {
            normalise_question(question.question).casefold()
            for name in self.study.files
            for question in read_questions(file_of(self.study.out, name, "gold"))
        }
        sampled = []
        for file in self.training:
            questions = [
                question
                for question in with_gold(read_questions(file))
                if normalise_question(question.question).casefold() not in evaluated
            ]
            sampled += random.Random(0).sample(questions, min(-(-self._wanted // len(self.training)), len(questions)))
        random.Random(1).shuffle(sampled)
        write_questions(self.data, with_hard_negatives(sampled), purpose="training")

    def train(self, cell: Cell, seed: int) -> Path:
        """Train a cell, or resume it; returns the folder of its checkpoint or adapter.

        Raises:
            InputError: the training failed, or it needs passages and there is no file of them.
        """
        out = self.study.out / "trained" / f"{cell.name}-{seed}"
        if cell.options is None:
            self._run(self._adapter_command(out, seed), cell)
            return out
        if not cell.pretrained:
            self._run(self._command("--data", self.data, out, seed, cell.options), cell)
            return out
        if self.passages is None:
            raise InputError(f"{cell.name}: the data folder has no file of passages for pretraining")
        first = out.with_name(f"{out.name}-passages")
        self._run(self._command("--pretrain", self.passages, first, seed, cell.options), cell)
        self._run(self._command("--data", self.data, out, seed, ("--init", str(first))), cell)
        return out

    def _command(self, kind: str, source: Path, out: Path, seed: int, options: Sequence[str]) -> list[str]:
        words = ["train_cli", "train", "hypernetwork", "--model", self.study.llm, kind, str(source), "--out", str(out)]
        words += ["--dtype", self.study.dtype, "--device", str(self.study.device)]
        for name in ("max_steps", "batch_size", "micro_batch_size", "learning_rate", "precision", "save_every", "seed"):
            if (value := getattr(replace(self.arguments, seed=seed), name)) is not None:
                words += ["--" + name.replace("_", "-"), str(value)]
        return [*words, *options]

    def _adapter_command(self, out: Path, seed: int) -> list[str]:
        arguments = self.arguments
        words = ["benchmarks", "real-llm", "adapter", "--llm", self.study.llm, "--data", str(self.data)]
        words += ["--out", str(out), "--steps", str(arguments.max_steps), "--batch-size", str(arguments.batch_size)]
        words += ["--learning-rate", str(arguments.learning_rate), "--rank", str(self.lora_rank), "--seed", str(seed)]
        return [*words, "--dtype", self.study.dtype, "--device", str(self.study.device)]

    def _run(self, command: Sequence[str], cell: Cell) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, env=processors_of_one(self.jobs)
        )
        if done.returncode:
            raise InputError(f"{cell.name}: failed with status {done.returncode}; rerun the same command to resume")

    def rows(self, cell: Cell, seed: int) -> list[StudyRow]:
        """The evaluations of a trained cell: with the right passage, and the controls."""
        name, trained = f"{cell.name}-{seed}", self.study.out / "trained" / f"{cell.name}-{seed}"
        if cell.options is None:
            # The adapter was trained to read the prompt; it is also evaluated with untrained experts.
            experts = StudyRow(f"{name}-experts", "genpoe", layers=self.layers, adapter=trained / ADAPTER)
            row = StudyRow(name, "rag", adapter=trained / ADAPTER)
            if seed:  # untrained experts are evaluated with one adapter only
                return [row]
            return [
                row,
                experts,
                replace(experts, name=f"{name}-experts-shuffled", passages="shuffled", curve=True),
                replace(experts, name=f"{name}-experts-all", layers=self.study.shape.all, curve=True),
            ]
        row = StudyRow(name, "genpoe", layers=self.layers, checkpoint=trained)
        rows = [row, *(replace(row, name=f"{name}-{kind}", passages=kind, curve=True) for kind in CONTROLS)]
        if cell.name in IN_INT8:
            rows.append(_in_int8(row))
        if cell.several:
            rows += [_four_equal(row), *(_first(row, count) for count in COUNTS)]
        return rows

    def base_rows(self) -> list[StudyRow]:
        """The rows without training."""
        untrained = StudyRow(UNTRAINED, "genpoe", layers=self.layers)
        four = StudyRow("rag_four", "rag", "hard", num_passages=DISTRACTORS + 1, curve=True)
        rows = [StudyRow("closed_book", "closed_book"), StudyRow("rag", "rag"), four]
        return [*rows, untrained, _in_int8(untrained), _four_equal(untrained)]

    def records(self) -> list[dict[str, Any]]:
        """One record per finished row, also of earlier commands."""
        rows = {
            row.name: (_label(row.name, UNTRAINED) if row.name.startswith(UNTRAINED) else row.name, None, row)
            for row in self.base_rows()
        }
        for cell in self.cells:
            folders = (self.study.out / "trained").glob(f"{cell.name}-*")
            for seed in sorted(int(end) for folder in folders if (end := folder.name[len(cell.name) + 1 :]).isdigit()):
                own = f"{cell.name}-{seed}"
                rows |= {
                    row.name: (cell.name + _label(row.name, own)[len(own) :], seed, row)
                    for row in self.rows(cell, seed)
                }
        scores = self.study.answers([row for _, _, row in rows.values()])
        return [
            {"row": name, "seed": "" if seed is None else seed} | self._record(row, seed, scores)
            for name, seed, row in rows.values()
            if row.name in scores
        ]

    def _record(self, row: StudyRow, seed: int | None, scores: dict[str, Scores]) -> dict[str, Any]:
        names = list(self.study.files)
        record: dict[str, Any] = {
            "passage": _passage(row),
            **self._size(row),
        }
        for measure in COMPARED:
            if any(measure not in scores[row.name][name] for name in names):
                continue
            column = paired([scores[row.name]], names, (measure,))[:, 0]
            record[measure] = asdict(mean(column, share=measure != "nats"))
        record["n"] = len(paired([scores[row.name]], names, ("f1",)))
        if row.reads_gold:
            for name, other in (("of_prompt", "rag"), ("of_rag_lora", f"{LORA}-{seed}")):
                if {"closed_book", other} <= scores.keys():
                    three = [scores[one] for one in (row.name, "closed_book", other)]
                    share = Paired(paired(three, names, ("f1",))).recovered(0, 1, 2)
                    record[name] = share and asdict(share)
        return record

    def _size(self, row: StudyRow) -> dict[str, Any]:
        """Trained parameters, bytes per unit in 16 bits (or in int8), and tokens per unit."""
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
            window = config.window if config.head == "attention" else 10**9  # one unit per passage
        if row.expert_dtype == INT8:
            width = self.study.shape.width
            size = unit_bytes(size // BYTES // width, width)
        return {"parameters": parameters, "unit_bytes": size, "window": window}


def _label(name: str, own: str) -> str:
    """The name in the table: ``own``, a prefix of ``name``, with the `LABELS` text of the rest."""
    rest = name[len(own) :]
    return own + LABELS.get(rest, "")


def _passage(row: StudyRow) -> str:
    """The passages of a row, as the table names them."""
    if row.purpose == "ranked":
        return f"{row.num_passages} retrieved"
    if row.purpose == "hard":
        return f"right and {DISTRACTORS} distractors"
    return "right" if row.passages == "retrieved" else row.passages


def _four_equal(row: StudyRow) -> StudyRow:
    name, count = f"{row.name}-{FOUR_EQUAL}", DISTRACTORS + 1
    return replace(row, name=name, purpose="hard", num_passages=count, gates="uniform", curve=True)


def _first(row: StudyRow, count: int) -> StudyRow:
    name = f"{row.name}-first-{count}"
    return replace(row, name=name, purpose="ranked", num_passages=count, gates="uniform", curve=True)


def _in_int8(row: StudyRow) -> StudyRow:
    return replace(row, name=f"{row.name}-{INT8}", expert_dtype=INT8, curve=True)


def write_ladder(ladder: Ladder, command: str) -> Path:
    """Write the file `LADDER` with all finished rows."""
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
