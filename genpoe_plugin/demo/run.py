"""The demo: a world, its index, a reranker and a hypernetwork trained on its train side, and lm_eval on its test side.

Every stage calls the code of the real commands and writes into one folder; a stage whose output is there is skipped.
The LLM and the encoder, which a real user downloads, come small with the package (`genpoe_plugin.demo.pretrain`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from tqdm import tqdm

from genpoe_plugin import __version__
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.demo.table import Row, read_row
from genpoe_plugin.demo.world import Side, World, WorldQuestion, make_world
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.indexing.encoding import index_passages
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
NUM_RETRIEVED: dict[Side, int] = {"train": 13, "test": 20}  # those of training are only for the reranker's negatives
HARD_NEGATIVES = 12  # of the best found: most others have nothing in common with the question
RERANKER_PROMPT = "Yes or No:"  # short, since every pair is read on a CPU

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
"""Mode and passages of each lm_eval run: the four modes, then the controls."""


@dataclass(frozen=True)
class DemoSettings:
    """What decides the demo's result; a folder holds the outputs of one such set."""

    seed: int = 0
    train_entities: int = 2500
    test_entities: int = 120
    reranker_steps: int = 900
    hypernetwork_steps: int = 300
    version: str = __version__


def run_demo(out: str | Path, settings: DemoSettings) -> list[Row]:
    """Run every stage that ``out`` lacks, write ``out/table.json`` and return its rows.

    Raises:
        InputError: ``out`` holds a demo with other settings, or an lm_eval run failed.
    """
    out = Path(out)
    _claim(out, settings)
    world = make_world(settings.seed, settings.train_entities, settings.test_entities)
    _retrieve(out, world, settings)
    with ThreadPoolExecutor(2) as pool:
        stages = [pool.submit(_train_hypernetwork, out, settings), pool.submit(_rerank_test, out, settings)]
        for finished in as_completed(stages):
            finished.result()
    _evaluate(out, settings)
    _write_matrix(out)
    rows = [read_row(results_directory(out, *run), *run, _test_file(out)) for run in RUNS]
    with atomic_file(out / "table.json") as temporary:
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return rows


def _claim(out: Path, settings: DemoSettings) -> None:
    """Make ``out`` the folder of these settings, or refuse it."""
    path = out / "settings.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != asdict(settings):
            different = [name for name, value in asdict(settings).items() if found.get(name) != value]
            raise InputError(f"{out}: made with another {', '.join(different)}; choose another --out or delete it")
        return
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def _test_file(out: Path) -> Path:
    return out / "test.jsonl"


def _retrieve(out: Path, world: World, settings: DemoSettings) -> None:
    """The index over all passages of the world, and the passages that it finds for the questions of either side."""
    if not (out / "index").is_dir():
        encoder = load_encoder(str(ENCODER))
        index_passages(world.passages, encoder, out / "index")
    targets: dict[Side, Path] = {"train": out / "train.jsonl", "test": out / "test.retrieved.jsonl"}
    for side, target in targets.items():
        if not target.is_file():
            retriever = DenseRetriever.load(out / "index", encoder=str(ENCODER))
            questions = world.questions[side]
            asked = [question.question for question in questions]
            found = retriever.retrieve(asked, NUM_RETRIEVED[side], progress=True)
            write_questions(target, map(_with_passages, questions, found))


def _with_passages(question: WorldQuestion, passages: tuple[RetrievedPassage, ...]) -> Question:
    """The world knows which passage answers a question, so no other counts, even if the answer occurs in it."""
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
    """Run ``genpoe train`` in a process of its own, with its progress bar in line ``position``."""
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--device", "cpu"]
    environment = _environment() | {"TQDM_POSITION": str(position)}
    if subprocess.run([sys.executable, "-m", "train_cli", "train", part, *arguments], env=environment).returncode:
        raise InputError(f"training the {part} failed; its own message is above")


def _environment() -> dict[str, str]:
    """Of one of two processes that share the machine."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}


def results_directory(out: Path, mode: str, passages: str) -> Path:
    """Where the lm_eval run of one row writes."""
    return out / "results" / f"{mode}-{passages}"


def lm_eval_command(out: Path, mode: str, passages: str, settings: DemoSettings) -> list[str]:
    """The stock lm_eval command of one row, as a user would type it."""
    arguments = {
        "pretrained": LLM,
        "dtype": "float32",
        "mode": mode,
        "passages": passages,
        "hypernetwork": out / "hypernetwork",
        "seed": settings.seed,
        "trace": results_directory(out, mode, passages) / "trace.jsonl",
    }
    return [
        "lm_eval", "--model", "genpoe", "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
        "--tasks", TASK, "--metadata", json.dumps({"genpoe_data": str(_test_file(out))}), "--batch_size", "48",
        "--device", "cpu", "--log_samples", "--output_path", str(results_directory(out, mode, passages)),
    ]  # fmt: skip


def matrix_file(out: Path) -> Path:
    """What `genpoe compare --run` takes: all modes, controls and numbers of passages, with three seeds."""
    return out / "matrix.yaml"


def _write_matrix(out: Path) -> None:
    if matrix_file(out).is_file():
        return
    declared = {
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
        "seeds": [0, 1, 2],
    }
    with atomic_file(matrix_file(out)) as temporary:
        temporary.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")


def _evaluate(out: Path, settings: DemoSettings) -> None:
    """Run lm_eval for every row that has no results yet, two rows at a time."""
    missing = [run for run in RUNS if not list(results_directory(out, *run).rglob("results_*.json"))]

    def evaluate(run: tuple[str, str]) -> None:
        _, *arguments = lm_eval_command(out, *run, settings)
        directory = results_directory(out, *run)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lm_eval.log").open("w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "lm_eval", *arguments]
            done = subprocess.run(command, env=_environment(), stdout=log, stderr=log)
        if done.returncode:
            raise InputError(f"lm_eval of {run[0]} with {run[1]} passages failed; see {log.name}")

    with ThreadPoolExecutor(2) as pool, tqdm(total=len(missing), desc="Running lm_eval", disable=not missing) as bar:
        for finished in as_completed([pool.submit(evaluate, run) for run in missing]):
            finished.result()
            bar.update()
