from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.indexing import tuning
from genpoe_plugin.indexing.encoding import encode_shards
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.indexing.tuning import nearest, query_vectors, tune
from genpoe_plugin.retrieval.faiss_setup import faiss, set_parameters

COUNT, DIMENSION = 600, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, DIMENSION), np.float32)


@pytest.fixture(scope="module")
def shards(fixed_corpus: Callable[..., tuple], vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    passages, encoder = fixed_corpus(vectors)
    folder = tmp_path_factory.mktemp("tuning") / "shards"
    return encode_shards(passages, encoder, folder, shard_size=250, dtype="float32", progress=False)


def brute_force(vectors: np.ndarray, queries: np.ndarray, at: int) -> list[set[int]]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [set(np.argsort(-line, kind="stable")[:at].tolist()) for line in scores]


def recall(index: object, queries: np.ndarray, relevant: list[set[int]], at: int) -> float:
    _, found = index.search(queries, at)
    return float(np.mean([len(set(rows) & wanted) / at for rows, wanted in zip(found.tolist(), relevant, strict=True)]))


def make(factory: str, vectors: np.ndarray) -> object:
    index = faiss.index_factory(DIMENSION, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    return index


def test_nearest_is_exact(shards: Shards, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CHUNK", 90)
    queries = np.random.default_rng(1).standard_normal((40, DIMENSION), np.float32)
    assert nearest(shards, queries, 7) == brute_force(vectors, queries, 7)
    assert nearest(shards, queries[:2], 5000) == [set(range(COUNT))] * 2


def test_what_ties_with_the_last_is_as_good(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    ties = np.array([[3], [2], [2], [2], [1], [1], [0], [0]], np.float32)
    passages, encoder = fixed_corpus(ties)
    shards = encode_shards(passages, encoder, tmp_path / "shards", progress=False)
    assert nearest(shards, np.ones((1, 1), np.float32), 2) == [{0, 1, 2, 3}]
    assert nearest(shards, np.ones((1, 1), np.float32), 4) == [{0, 1, 2, 3}]


def test_query_vectors_repeat_and_are_near_passages(shards: Shards, vectors: np.ndarray) -> None:
    queries = query_vectors(shards, 50)
    np.testing.assert_array_equal(queries, query_vectors(shards, 50))
    assert queries.shape == (50, DIMENSION) and queries.dtype == np.float32
    distances = np.linalg.norm(queries[:, None] - vectors, axis=2).min(axis=1)
    between = np.linalg.norm(vectors[:100, None] - vectors[None, 100:200], axis=2).mean()
    assert (distances > 0.05 * between).all() and 0.2 * between < distances.mean() < 0.5 * between
    assert query_vectors(shards).shape == (COUNT, DIMENSION)


@pytest.mark.parametrize(
    ("factory", "name"), [("IVF16,Flat", "nprobe"), ("HNSW4", "efSearch"), ("PCA8,IVF16,Flat", "nprobe")]
)
def test_no_less_thorough_search_reaches_the_recall(
    shards: Shards, vectors: np.ndarray, factory: str, name: str
) -> None:
    queries = query_vectors(shards, 200)
    relevant = brute_force(vectors, queries, 10)
    index = make(factory, vectors)
    set_parameters(index, {name: 1 if name == "nprobe" else 16})
    lowest = recall(index, queries, relevant, 10)
    set_parameters(index, {name: 16 if name == "nprobe" else 2048})
    target = (lowest + recall(index, queries, relevant, 10)) / 2
    found = tune(index, queries, relevant, target, at=10)
    set_parameters(index, found.parameters)
    assert found.recall == pytest.approx(recall(index, queries, relevant, 10)) and found.recall >= target
    lower = [1, 2, 3, 4, 6, 8, 12, 16] if name == "nprobe" else [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    chosen = found.parameters[name]
    assert chosen in lower
    for value in lower[: lower.index(chosen)]:
        set_parameters(index, {name: value})
        assert recall(index, queries, relevant, 10) < target


def test_refinement_and_probes_are_weighed(shards: Shards, vectors: np.ndarray) -> None:
    """Compared with every pair of them: none that costs less reaches the recall."""
    queries = query_vectors(shards, 200)
    relevant = brute_force(vectors, queries, 10)
    index = make("OPQ4_16,IVF16,PQ4x4fs,Refine(SQ8)", vectors)
    cheaper = 0
    for target in (0.4, 0.7, 0.9):
        found = tune(index, queries, relevant, target, at=10)

        def cost(probes: float, refined: float) -> float:
            return 8 * 16 * refined * 10 + probes * COUNT / 16 * 2  # bytes of an SQ8 vector and of a PQ4x4 code

        least = cost(found.parameters["nprobe"], found.parameters["k_factor_rf"])
        for probes, refined in product([1, 2, 3, 4, 6, 8, 12, 16], [1, 2, 4, 8, 16, 32, 64]):
            if cost(probes, refined) < least:
                cheaper += 1
                set_parameters(index, {"nprobe": probes, "k_factor_rf": refined})
                assert recall(index, queries, relevant, 10) < target
        set_parameters(index, found.parameters)
        assert recall(index, queries, relevant, 10) == pytest.approx(found.recall) and found.recall >= target
    assert cheaper > 10


def test_a_graph_of_centroids_is_searched_wider_than_it_finds(shards: Shards, vectors: np.ndarray) -> None:
    queries = query_vectors(shards, 100)
    index = make("IVF32_HNSW4,Flat", vectors)
    found = tune(index, queries, brute_force(vectors, queries, 10), 0.95, at=10)
    assert found.recall >= 0.95
    assert found.parameters["quantizer_efSearch"] >= found.parameters["nprobe"]


def test_a_recall_out_of_reach_gives_the_most(shards: Shards, vectors: np.ndarray) -> None:
    queries = query_vectors(shards, 100)
    relevant = brute_force(vectors, queries, 10)
    index = make("IVF16,PQ4x4fs", vectors)
    found = tune(index, queries, relevant, 0.99, at=10)
    every = []
    for probes in (1, 2, 3, 4, 6, 8, 12, 16):
        set_parameters(index, {"nprobe": probes})
        every.append(recall(index, queries, relevant, 10))
    assert found.recall == pytest.approx(max(every)) and found.recall < 0.99
    nothing_to_set = tune(make("PQ4x4", vectors), queries, relevant, 0.99, at=10)
    assert nothing_to_set.parameters == {} and nothing_to_set.recall < 0.99


def test_parts_are_all_set(vectors: np.ndarray) -> None:
    parts = [make("IVF16,Flat", vectors), make("IVF16,Flat", vectors)]
    together = faiss.IndexShards(DIMENSION, False, True)
    for part in parts:
        together.add_shard(part)
    found = tune(together, vectors[:50], brute_force(np.concatenate([vectors, vectors]), vectors[:50], 10), 0.9, at=10)
    assert [part.nprobe for part in parts] != [1, 1] and parts[0].nprobe == parts[1].nprobe
    assert found.recall >= 0.9
