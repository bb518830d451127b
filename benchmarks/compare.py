"""``genpoe compare``: time and memory, coverage of its intervals, false alarms of its tests.

The runs are synthetic: random answers, docs with four passages each, and a trace for every run of the genpoe model.
Each mode and number of passages has shuffled and random controls in three seeds; one run is a plain ``hf``.
"""

from __future__ import annotations

import os
import time
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import coverage
from benchmarks.child import run_child
from benchmarks.options import Options, folder_of
from benchmarks.row import Row
from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.comparison.output_files import PAGE, RECORD

RUNS, QUESTIONS, PASSAGES = 100, 10_000, 4
MODES = ("genpoe", "rag", "genpoe_rag")
PARTS = (("retrieved", 0), ("gold", 0), *product(("shuffled", "random"), (0, 1, 2)), ("constant", 0))
SHARES = {"retrieved": 0.5, "gold": 0.7, "shuffled": 0.1, "random": 0.1, "constant": 0.1}
"""Share of correct answers by control."""


def measure(options: Options) -> list[Row]:
    """Measure wall time, processor time and peak memory of the command in a subprocess."""
    runs, questions = (12, 500) if options.quick else (RUNS, QUESTIONS)
    with folder_of(options) as folder:
        results = folder / f"{runs}-runs-of-{questions}"
        if not results.exists():
            write_runs(results, runs, questions)
        out = folder / "comparison"
        start, used = time.perf_counter(), _children_seconds()
        _, peak = run_child(["-m", "train_cli", "compare", results, "--out", out], os.environ)
        seconds, used = time.perf_counter() - start, _children_seconds() - used
        size = sum(file.stat().st_size for file in results.rglob("*") if file.is_file())
        written = [(out / name).stat().st_size / 1e6 for name in (PAGE, RECORD)]
    of = f"{runs} runs x {questions:,} samples"
    return [
        Row(f"compare, {of}: time", seconds, "s", "<= 40"),
        Row(f"compare, {of}: processor time", used, "s"),
        Row(f"compare, {of}: peak memory", peak / 1e9, "GB", "<= 1"),
        Row(f"compare, {of}: read", size / 1e6, "MB"),
        Row(f"compare, {of}: page", written[0], "MB"),
        Row(f"compare, {of}: JSON", written[1], "MB"),
        *coverage.rows(2_000 if options.quick else coverage.DRAWS),
    ]


def _children_seconds() -> float:
    """Processor time of all subprocesses that have ended, in seconds."""
    times = os.times()
    return times.children_user + times.children_system


def write_runs(folder: Path, runs: int, questions: int) -> None:
    """Write ``runs`` runs of one task with EM and F1; hard questions are hard for all runs."""
    rng = np.random.default_rng(0)
    docs = documents(questions, PASSAGES)
    ease = rng.normal(size=questions)
    declared = [(mode, number, *part) for number in (4, 3, 2, 1) for mode in MODES for part in PARTS]
    assert runs <= len(declared) + 1
    for at, (mode, number, passages, seed) in enumerate(declared[: runs - 1]):
        facts = genpoe_facts(mode, passages, number, seed, questions=questions)
        scores = _scores(rng, ease, SHARES[passages])
        write_run(folder / f"run{at}", scores, docs=docs, genpoe=facts, model_args={"mode": mode}, trace=True)
    write_run(folder / "hf", _scores(rng, ease, 0.2), docs=docs)


def _scores(rng: np.random.Generator, ease: np.ndarray, share: float) -> dict[str, list[float]]:
    luck = ease + rng.normal(size=len(ease))
    right = luck > np.quantile(luck, 1 - share)
    part = np.where(rng.random(len(ease)) < 0.3, np.round(rng.random(len(ease)), 3), 0.0)
    return {"em": right.astype(float).tolist(), "f1": np.where(right, 1.0, part).tolist()}
