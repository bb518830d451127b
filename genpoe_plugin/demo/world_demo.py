"""`genpoe demo world`: an invented world, its index, a reranker and a hypernetwork for it, and their evaluation.

Reranker and hypernetwork are trained on one part of the world, and lm_eval runs on the other. Every stage calls the
code of the real commands and writes into one folder; finished stages are skipped. A tiny LLM and a tiny encoder come
with the package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from genpoe_plugin import __version__
from genpoe_plugin.arguments import DEFAULTS
from genpoe_plugin.comparison.matrix import Cell, Matrix, processors_of_one, run_matrix, write_matrix
from genpoe_plugin.comparison.origin import origin_of
from genpoe_plugin.comparison.runs import QuestionBook, read_runs
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.demo.world import Side, World, WorldQuestion, make_world
from genpoe_plugin.demo.world_table import Row, paired_p_value, read_row
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.json_text import read_json
from genpoe_plugin.prompts import MODES
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.encoder import load_encoder
from genpoe_plugin.selection.controls import CONTROLS
from genpoe_plugin.selection.reranking import Reranker, rerank
from genpoe_plugin.training.reranker_data import write_reranker_data
from genpoe_plugin.training.trainer import is_finished

ASSETS = Path(__file__).parent / "assets"
LLM, ENCODER = ASSETS / "llm", ASSETS / "encoder"
TASK = "genpoe_demo"
NUM_RETRIEVED: dict[Side, int] = {"train": 13, "test": 20}  # in training only for the reranker's negatives
HARD_NEGATIVES = 12  # among the best retrieved; most others have nothing in common with the question
RERANKER_PROMPT = "Yes or No:"  # short, since every pair is read on a CPU
JOBS = 2  # simultaneous trainings or lm_eval runs

RUNS = (
    ("closed_book", "none"),
    ("rag", "retrieved"),
    ("genpoe", "retrieved"),
    ("genpoe_rag", "retrieved"),
    ("genpoe", "gold"),
    ("genpoe", "shuffled"),
    ("genpoe", "random"),
    ("genpoe", "constant"),
    ("genpoe", "none"),
)
"""Mode and passages of each row of the table: the four modes, then the controls."""


@dataclass(frozen=True)
class DemoSettings:
    """Settings that change the result. A folder holds the outputs for one set of them."""

    seed: int = 0
    train_entities: int = 2500
    test_entities: int = 120
    reranker_steps: int = 900
    hypernetwork_steps: int = 300
    version: str = __version__


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Attributes:
        rows: the table, one row per entry of `RUNS`.
        p_value: p-value of McNemar's exact test of ``genpoe_rag`` against ``rag``.
        command: the lm_eval command of the ``genpoe`` row.
    """

    rows: list[Row]
    p_value: float
    command: str


def run_demo(out: str | Path, settings: DemoSettings) -> DemoResult:
    """Run the stages that are not finished in ``out``, and write ``out/table.json``.

    Raises:
        InputError: ``out`` holds a demo with other settings, or an lm_eval run failed.
    """
    out = Path(out)
    _claim(out, settings)
    world = make_world(settings.seed, settings.train_entities, settings.test_entities)
    _retrieve(out, world)
    with ThreadPoolExecutor(JOBS) as pool:
        stages = [pool.submit(_train_hypernetwork, out, settings), pool.submit(_rerank_test, out, settings)]
        for finished in as_completed(stages):
            finished.result()
    matrix = write_matrix(matrix_file(out), _matrix(out, settings))
    cells = table_cells(matrix, settings.seed)
    run_matrix(replace(matrix, cells=cells), JOBS)
    found, _ = read_runs([matrix.folder(cell) for cell in cells], QuestionBook())
    runs = dict(zip(RUNS, found, strict=True))
    rows = [read_row(run, _test_file(out)) for run in found]
    with atomic_file(out / "table.json") as temporary:
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    p_value = paired_p_value(runs["genpoe_rag", "retrieved"], runs["rag", "retrieved"])
    return DemoResult(rows, p_value, origin_of(runs["genpoe", "retrieved"]).command)


def _claim(out: Path, settings: DemoSettings) -> None:
    """Record the settings in ``out``, or refuse a folder of other settings."""
    path = out / "settings.json"
    if path.is_file():
        found = read_json(path)
        if found != asdict(settings):
            different = [name for name, value in asdict(settings).items() if found.get(name) != value]
            raise InputError(f"{out}: made with another {', '.join(different)}; choose another --out or delete it")
        return
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def _test_file(out: Path) -> Path:
    return out / "test.jsonl"


def _retrieve(out: Path, world: World) -> None:
    """Build the index over all passages, and retrieve passages for the questions of both sides."""
    if not (out / "index").is_dir():
        encoder = load_encoder(str(ENCODER))
        index_passages(world.passages, encoder, out / "index")
    targets: dict[Side, Path] = {"train": out / "train.jsonl", "test": out / "test.retrieved.jsonl"}
    for side, target in targets.items():
        if not target.is_file():
            retriever = DenseRetriever.load(out / "index", encoder=str(ENCODER))
            questions = world.questions[side]
            texts = [question.question for question in questions]
            retrieved = retriever.retrieve(texts, NUM_RETRIEVED[side], progress=True)
            write_questions(target, map(_with_passages, questions, retrieved))


def _with_passages(question: WorldQuestion, passages: tuple[RetrievedPassage, ...]) -> Question:
    """Mark the passage that states the fact, and no other one, even if the answer occurs in it by chance."""
    marked = tuple(replace(item, has_answer=item.passage.id == question.passage_id) for item in passages)
    return Question(question.question, question.answers, marked)


def _train_reranker(out: Path, settings: DemoSettings) -> None:
    if not (data := out / "reranker.jsonl").is_file():
        write_reranker_data(
            [out / "train.jsonl"], data, negatives=HARD_NEGATIVES, min_negatives=1, prompt=RERANKER_PROMPT
        )
    if not is_finished(out / "reranker"):
        _train(
            "reranker",
            {
                "model": LLM,
                "data": data,
                "out": out / "reranker",
                "negatives": 4,
                "batch-size": 12,
                "micro-batch-size": 12,
                "max-steps": settings.reranker_steps,
                "learning-rate": 2e-3,
                "lora-rank": 0,  # an LLM so small has no room for an adapter
                "max-length": 24,  # title and first words name the entity; the rest would cost most of the time
                "seed": settings.seed,
            },
            position=1,
        )


def _rerank_test(out: Path, settings: DemoSettings) -> None:
    _train_reranker(out, settings)
    if not _test_file(out).is_file():
        questions = list(read_questions(out / "test.retrieved.jsonl"))
        write_questions(_test_file(out), rerank(questions, Reranker.load(str(out / "reranker")), progress=True))


def _train_hypernetwork(out: Path, settings: DemoSettings) -> None:
    if not is_finished(out / "hypernetwork"):
        _train(
            "hypernetwork",
            {
                "model": LLM,
                "data": out / "train.jsonl",
                "out": out / "hypernetwork",
                "dtype": "float32",
                "preset": "memory",
                "layer": 2,
                "knowledge": 0.1,
                "max-steps": settings.hypernetwork_steps,
                "batch-size": 32,
                "learning-rate": 4e-3,
                "seed": settings.seed,
            },
            position=0,
        )


def _train(part: str, options: Mapping[str, object], position: int) -> None:
    """Run ``genpoe train`` in a subprocess, with its progress bar in line ``position``."""
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--device", "cpu"]
    environment = processors_of_one(JOBS) | {"TQDM_POSITION": str(position)}
    if subprocess.run([sys.executable, "-m", "train_cli", "train", part, *arguments], env=environment).returncode:
        raise InputError(f"training the {part} failed; see its message above")


def matrix_file(out: Path) -> Path:
    """The file for `genpoe compare --run`: all modes, controls and numbers of passages, with three seeds."""
    return out / "matrix.yaml"


def _matrix(out: Path, settings: DemoSettings) -> dict[str, Any]:
    return {
        "out": str(out / "leaderboard"),
        "tasks": TASK,
        "options": {"device": "cpu", "batch_size": 48, "metadata": {"genpoe_data": str(_test_file(out))}},
        "model_args": {"dtype": "float32"},
        "models": {
            "demo": {"pretrained": str(LLM), "hypernetwork": str(out / "hypernetwork")},
            "hf": {"model": "hf", "pretrained": str(LLM)},
        },
        "modes": list(MODES),
        "passages": list(CONTROLS),
        "num_passages": [1, 2, 4],
        "seeds": [settings.seed, settings.seed + 1, settings.seed + 2],
    }


def table_cells(matrix: Matrix, seed: int) -> tuple[Cell, ...]:
    """The cells of the table, in the order of `RUNS`, with the default number of passages and with ``seed``."""
    row = {"num_passages": DEFAULTS["num_passages"], "seed": seed}
    cells = {
        (cell.arguments["mode"], cell.arguments["passages"]): cell
        for cell in matrix.cells
        if cell.kind == "genpoe" and all(cell.arguments.get(name, value) == value for name, value in row.items())
    }
    return tuple(cells[run] for run in RUNS)
