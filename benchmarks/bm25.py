"""BM25 over synthetic passages: build time and memory, bytes, and search beside bm25s alone.

Passages have 100 words, drawn by Zipf's law from a vocabulary of 300,000, as many words as Wikipedia's passages have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from benchmarks.child import run_child
from benchmarks.options import Options, folder_of
from benchmarks.retrieval import interleaved_times
from benchmarks.row import Row
from genpoe_plugin.retrieval.bm25 import FILES, BM25Retriever

FULL, QUICK = 1_000_000, 5_000  # passages
VOCABULARY, WORDS, QUESTION_WORDS = 300_000, 100, 8
QUESTIONS, K, ROUNDS = 64, 20, 5


def measure(options: Options) -> list[Row]:
    """Build an index with the command, and search it in turns with bm25s."""
    count = QUICK if options.quick else FULL
    with folder_of(options) as folder:
        passages = folder / f"passages-{count}.tsv"
        with passages.open("w") as file:
            file.writelines(f"{number}\t{text}\t\n" for number, text in enumerate(texts(count, WORDS, seed=0)))
        command = ["-m", "train_cli", "index", "build", "--retriever", "bm25", "--passages", passages]
        begin = time.perf_counter()
        _, peak = run_child([*command, "--out", folder / "bm25"], os.environ)
        seconds = time.perf_counter() - begin
        return [
            Row("bm25.passages", count, ""),
            Row("bm25.build_seconds", seconds, "s"),
            Row("bm25.build_peak_gb", peak / 1e9, "GB"),
            Row("bm25.bytes_per_passage", sum((folder / "bm25" / name).stat().st_size for name in FILES) / count, "B"),
            *compare_with_bm25s(folder / "bm25"),
        ]


def compare_with_bm25s(directory: Path) -> list[Row]:
    """Our search, with the passages' texts, over that of bm25s with the same files; both find the same scores."""
    retriever = BM25Retriever.load(directory)
    direct, stemmer = bm25s.BM25.load(directory, mmap=True), Stemmer.Stemmer("english")
    questions = list(texts(QUESTIONS, QUESTION_WORDS, seed=1))

    def search() -> np.ndarray:
        words = bm25s.tokenize(questions, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
        return direct.retrieve(words, k=K, backend_selection="numpy", show_progress=False).scores

    ours = [[entry.score for entry in found] for found in retriever.retrieve(questions, K)]
    if not all(np.allclose(mine, theirs) for mine, theirs in zip(ours, search(), strict=True)):
        raise RuntimeError("the same index has other scores for the same questions")
    times = interleaved_times({"bm25s": search, "ours": lambda: retriever.retrieve(questions, K)}, ROUNDS)
    return [
        Row("bm25.bm25s_search", 1000 * times["bm25s"] / QUESTIONS, "ms/question"),
        Row("bm25.search", 1000 * times["ours"] / QUESTIONS, "ms/question"),
        Row("bm25.time_ratio_to_bm25s", times["ours"] / times["bm25s"], "x", "<= 1.1"),
    ]


def texts(count: int, words: int, seed: int) -> Iterator[str]:
    """Texts of so many words each, drawn by Zipf's law."""
    shares = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ranks = np.searchsorted(shares, shares[-1] * rng.random(words))
        yield " ".join(f"w{rank}" for rank in ranks)
