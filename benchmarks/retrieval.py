"""Retrieval at Wikipedia's scale, over the synthetic vectors of `clustered_vectors`.

- Index types: every type that `choose_factory` offers for Wikipedia, with the number of inverted lists for this size,
  exact search, and two other types. Measured are build time, bytes per vector, milliseconds per question in batches of
  64, and recall@20 of exact search, tuned by the build on held-out questions.
- The type recommended for Wikipedia in 16 GB: recall is measured at this size, with the number of inverted lists for
  this size; only its bytes are projected to 21 million passages.
- Our retriever against FAISS itself: the same index and settings, interleaved in one process.
- Our exact search against that of FAISS with default settings: separate processes, the same type, vectors and number of
  threads.
- Peak memory of `genpoe index build` from existing shards, with ``--memory 4GB``.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.child import run_child
from benchmarks.clustered_vectors import DIMENSION, ClusteredVectors, NumberedQuestions, write_shards
from benchmarks.options import Options, folder_of
from benchmarks.row import Row
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.building import Queries, build_index, building_directory
from genpoe_plugin.indexing.factory import choose_factory, index_bytes
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.faiss_setup import faiss, set_parameters
from genpoe_plugin.retrieval.index import VECTORS, PassageIndex
from genpoe_plugin.retrieval.measures import neighbour_recall

WIKIPEDIA = 21_015_324  # passages of psgs_w100
MEMORY = 16 * 10**9  # bytes, for Wikipedia
RECALL = 0.95
TUNED_RECALL = 0.96  # target of the build, above `RECALL` because recall is measured on other questions
K, BATCH = 20, 64
ROUNDS = 21  # batches per variant in time comparisons
PROCESSES = 3  # interleaved subprocesses per variant, to compare load-time settings
OTHERS = ("IVF4096,SQfp16", "IVF4096,RaBitQfs4")


@dataclass(frozen=True)
class Sizes:
    vectors: int  # for the comparison of index types
    queries: int
    flat: int  # vectors for the comparison of exact search
    build: int  # vectors for the peak memory of a build


FULL = Sizes(vectors=1_000_000, queries=1_024, flat=300_000, build=2_000_000)
QUICK = Sizes(vectors=30_000, queries=512, flat=30_000, build=50_000)


@dataclass(frozen=True)
class Measured:
    """Cost and recall of one index type."""

    factory: str
    build_seconds: float
    bytes_per_vector: float
    ms_per_query: float
    recall: float
    tuned: str


def measure(options: Options) -> list[Row]:
    """All rows; also prints a table of the index types and the projection to Wikipedia."""
    sizes = QUICK if options.quick else FULL
    with folder_of(options) as folder:
        corpus = ClusteredVectors(sizes.vectors)
        shards = write_shards(corpus, folder / f"shards-{sizes.vectors}")
        queries = corpus.queries(sizes.queries)
        wikipedia = choose_factory(WIKIPEDIA, DIMENSION, MEMORY).factory
        recommended = with_lists_for(wikipedia, sizes.vectors)
        rows = [Row("retrieval.vectors", sizes.vectors, "")]
        held_out = Queries(corpus.queries(sizes.queries, part=1), "held-out questions")
        ours = [recommended] if options.quick else [*offered(sizes.vectors), recommended]
        others = [with_lists_for(factory, sizes.vectors) for factory in OTHERS]
        factories = dict.fromkeys(["Flat", *ours, *others])
        rows += compare_types(shards, queries, held_out, factories, recommended, folder)
        rows += project(wikipedia, recommended, sizes.vectors, folder)
        rows += compare_with_faiss(folder / "recommended", queries)
        rows += compare_with_default(sizes.flat, folder / f"flat-{sizes.flat}")
        rows += measure_build(sizes.build, folder)
    return rows


def with_lists_for(factory: str, count: int) -> str:
    """The factory string with a power of 2 of inverted lists of about 250 vectors each: 4096 for a million."""
    return re.sub(r"IVF\d+(_HNSW\d+)?", f"IVF{2 ** round(math.log2(count / 250))}", factory)


def offered(count: int) -> Iterator[str]:
    """Every index type that `choose_factory` offers for Wikipedia, largest first, with inverted lists for ``count``."""
    memory = None
    while True:
        try:
            choice = choose_factory(WIKIPEDIA, DIMENSION, memory)
        except InputError:
            return
        yield with_lists_for(choice.factory, count)
        memory = choice.peak - 1


def exact_neighbours(shards: Shards, queries: np.ndarray, k: int = K) -> np.ndarray:
    """Rows of the k largest inner products, int64 [n, k], computed shard by shard."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    start = 0
    for number in tqdm(shards.numbers, desc="exact search", unit="shard"):
        vectors = np.asarray(shards.vectors(number), np.float32)
        found = faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = np.hstack([scores, found[0]]), np.hstack([rows, found[1] + start])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
        start += len(vectors)
    return rows


def compare_types(
    shards: Shards, queries: np.ndarray, held_out: Queries, factories: Iterable[str], recommended: str, folder: Path
) -> list[Row]:
    """Build and measure an index of each type; only the recommended one is kept."""
    exact = exact_neighbours(shards, queries)
    results = []
    for factory in factories:
        directory = folder / ("recommended" if factory == recommended else "other")
        results.append(measure_type(shards, queries, exact, held_out, factory, directory))
        if factory != recommended:
            delete_index(directory)
        print(_line(results[-1]))
    print(f"\n{shards.count:,} vectors of {shards.dimension}, {len(queries):,} questions, {_threads()} threads")
    print("\n".join([_HEADER, *(_line(result) for result in results)]))
    rows = []
    for result in results:
        prefix = f"retrieval.{result.factory}"
        rows += [
            Row(f"{prefix}.build", result.build_seconds, "s"),
            Row(f"{prefix}.size", result.bytes_per_vector, "bytes/vector"),
            Row(f"{prefix}.search", result.ms_per_query, "ms/question"),
            Row(f"{prefix}.recall20", result.recall, ""),
        ]
    found = next(result.recall for result in results if result.factory == recommended)
    return [*rows, Row("retrieval.recall20_recommended", found, "", f">= {RECALL}")]


def measure_type(
    shards: Shards, queries: np.ndarray, exact: np.ndarray, held_out: Queries, factory: str, directory: Path
) -> Measured:
    delete_index(directory)
    begin = time.perf_counter()
    index = build_index(shards, directory, factory=factory, recall=TUNED_RECALL, queries=held_out)
    build_seconds = time.perf_counter() - begin
    found, times = [], []
    for start in range(0, len(queries), BATCH):
        begin = time.perf_counter()
        found.append(index.search(queries[start : start + BATCH], K)[1])
        times.append((time.perf_counter() - begin) / len(queries[start : start + BATCH]))
    return Measured(
        factory,
        build_seconds,
        (directory / VECTORS).stat().st_size / shards.count,
        1000 * statistics.median(times),
        neighbour_recall(np.concatenate(found), exact),
        ", ".join(f"{name} {value:g}" for name, value in index.manifest["search"]["parameters"].items()),
    )


_HEADER = f"{'index type':<46} {'build s':>8} {'bytes/vector':>13} {'ms/question':>12} {'recall@20':>10}  tuned"


def _line(result: Measured) -> str:
    return (
        f"{result.factory:<46} {result.build_seconds:>8,.0f} {result.bytes_per_vector:>13,.1f}"
        f" {result.ms_per_query:>12.3f} {result.recall:>10.4f}  {result.tuned}"
    )


def project(wikipedia: str, recommended: str, count: int, folder: Path) -> list[Row]:
    """Compute the bytes of the recommended index over Wikipedia, and check the formula at the size measured."""
    measured = (folder / "recommended" / VECTORS).stat().st_size
    computed = index_bytes(recommended, count, DIMENSION)
    projected = index_bytes(wikipedia, WIKIPEDIA, DIMENSION)
    print(
        f"\n{recommended}: {measured:,} bytes measured at {count:,} vectors, {computed:,} computed\n"
        f"{wikipedia}: {projected:,} bytes computed at {WIKIPEDIA:,}"
        f" = {projected / WIKIPEDIA:,.1f} bytes per vector; {measured / count:,.1f} measured x {WIKIPEDIA:,}"
        f" = {measured / count * WIKIPEDIA:,.0f}\n"
        "Only bytes are projected: recall is that of the size measured."
    )
    return [
        Row("retrieval.bytes_computed_over_measured", computed / measured, "x"),
        Row("retrieval.projected_gb_21m", projected / 1e9, "GB", f"<= {MEMORY / 1e9:g}"),
    ]


def compare_with_faiss(directory: Path, queries: np.ndarray) -> list[Row]:
    """Search time of our index, without and with passage texts, against FAISS with the same file and settings."""
    index = PassageIndex.load(directory)
    encoder = NumberedQuestions(index.encoder_name, queries)
    retriever = DenseRetriever(index, encoder)
    direct = faiss.read_index(str(directory / VECTORS), faiss.IO_FLAG_MMAP_IFC)
    set_parameters(direct, index.manifest["search"]["parameters"])
    batch, questions = queries[:BATCH], encoder.questions[:BATCH]
    # Our search retrieves one more passage, to handle ties, and the number of refined candidates is a multiple of that.
    expected = direct.search(batch, K + 1)[1][:, :K]
    if (same := neighbour_recall(index.search(batch, K)[1], expected)) < 0.99:
        raise RuntimeError(
            f"our search and FAISS, with the same index and settings, agree on only {same:.1%} of the passages"
        )
    times = interleaved_times(
        {
            "faiss": lambda: direct.search(batch, K),
            "index": lambda: index.search(batch, K),
            "retriever": lambda: retriever.retrieve(questions, K),
        },
        ROUNDS,
    )
    return [
        Row("retrieval.faiss_search", 1000 * times["faiss"] / BATCH, "ms/question"),
        Row("retrieval.time_ratio_to_faiss", times["index"] / times["faiss"], "x", "<= 1.1"),
        Row("retrieval.time_ratio_to_faiss_with_texts", times["retriever"] / times["faiss"], "x", "<= 1.1"),
    ]


def interleaved_times(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; all variants run in every round, and the first round is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare_with_default(count: int, folder: Path) -> list[Row]:
    """Time of exact search in FAISS with default settings, over ours; both must find the same rows."""
    corpus = ClusteredVectors(count)
    shards = write_shards(corpus, folder / "shards")
    np.save(folder / "queries.npy", corpus.queries(1_024))
    build_index(shards, folder / "index", factory="Flat")
    environment = os.environ | {"OMP_NUM_THREADS": str(_threads())}
    environment.pop("OPENBLAS_CORETYPE", None)
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {"default": [], "ours": []}
    for _ in range(PROCESSES):
        for name in times:
            found[name], _ = run_child(["-m", "benchmarks.flat_search", name, folder], environment)
            times[name].append(found[name]["ms"])
    default, ours = (statistics.median(taken) for taken in times.values())
    same = np.mean([set(a) == set(b) for a, b in zip(found["default"]["rows"], found["ours"]["rows"], strict=True)])
    if same < 0.99:  # ties and rounding may differ
        raise RuntimeError(f"our exact search and that of FAISS agree on only {same:.1%} of the questions")
    return [
        Row("retrieval.default_flat_search", default, "ms/question"),
        Row("retrieval.our_flat_search", ours, "ms/question"),
        Row("retrieval.speedup_over_default_flat", default / ours, "x", ">= 5"),
    ]


def measure_build(count: int, folder: Path) -> list[Row]:
    """Peak memory of `genpoe index build`."""
    directory = folder / f"shards-{count}"
    write_shards(ClusteredVectors(count), directory)
    out = folder / "built"
    delete_index(out)
    command = ["-m", "train_cli", "index", "build", "--shards", directory, "--out", out, "--memory", "4GB"]
    _, peak = run_child(command, os.environ)
    delete_index(out)
    return [Row("retrieval.build_vectors", count, ""), Row("retrieval.build_peak_gb", peak / 1e9, "GB", "<= 4")]


def delete_index(directory: Path) -> None:
    """Delete an index and the files of an interrupted build."""
    for path in (directory, building_directory(directory)):
        shutil.rmtree(path, ignore_errors=True)


def _threads() -> int:
    return faiss.omp_get_max_threads()
