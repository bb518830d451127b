"""The benchmark of retrieval, over a few vectors of few dimensions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import clustered_vectors, flat_search, retrieval
from benchmarks.child import run_child
from benchmarks.clustered_vectors import ClusteredVectors, NumberedQuestions, write_shards
from benchmarks.options import Options
from genpoe_plugin.indexing.factory import Choice, choose_factory, index_bytes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DIMENSION": 48, "HIDDEN": 64, "LATENT": 10, "BLOCK": 512}.items():
        monkeypatch.setattr(clustered_vectors, name, value)
    monkeypatch.setattr(NumberedQuestions, "dimension", 48)
    monkeypatch.setattr(retrieval, "DIMENSION", 48)


def naive_neighbours(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[set[int]]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [set(np.argsort(-row)[:k].tolist()) for row in scores]


def test_exact_neighbours_over_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpoe_plugin.indexing.shards.Shards.rows", lambda self, number: (512, 512, 76)[number])
    monkeypatch.setattr("genpoe_plugin.indexing.shards.Shards.__len__", lambda self: 3)
    corpus = ClusteredVectors(1100)
    shards = write_shards(corpus, tmp_path / "shards")
    stored = np.concatenate([shards.vectors(number) for number in shards.numbers])
    assert len(stored) == 1100 and len(list(shards.numbers)) == 3
    found = retrieval.exact_neighbours(shards, corpus.queries(30), 20)
    assert [set(row) for row in found.tolist()] == naive_neighbours(stored, corpus.queries(30), 20)


def test_the_number_of_lists_follows_the_size() -> None:
    factory = "OPQ96_384,IVF65536_HNSW32,PQ96x4fs,Refine(SQ6)"
    assert retrieval.with_lists_for(factory, 1_000_000) == "OPQ96_384,IVF4096,PQ96x4fs,Refine(SQ6)"
    assert retrieval.with_lists_for("IVF4096,RaBitQfs4", 60_000) == "IVF256,RaBitQfs4"
    assert retrieval.with_lists_for("Flat", 60_000) == "Flat"


def test_offered_types_need_less_and_less_memory() -> None:
    factories = list(dict.fromkeys(retrieval.offered(1_000_000)))
    assert len(factories) > 2
    assert factories[0] == retrieval.with_lists_for(choose_factory(retrieval.WIKIPEDIA, 48).factory, 1_000_000)
    assert all("IVF4096," in factory for factory in factories)
    sizes = [index_bytes(factory, 1_000_000, 48) for factory in factories]
    assert sizes == sorted(sizes, reverse=True)


def test_variants_run_interleaved() -> None:
    calls: list[str] = []
    times = retrieval.interleaved_times({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 4 and set(times) == {"a", "b"} and min(times.values()) >= 0


def run_in_process(arguments, environment):
    """`flat_search`, in this process instead of a subprocess."""
    assert environment["OMP_NUM_THREADS"].isdigit() and "OPENBLAS_CORETYPE" not in environment
    _, module, name, folder = arguments
    assert module == "benchmarks.flat_search"
    search = {"default": flat_search.default_search, "ours": flat_search.our_search}[name](folder)
    queries = np.load(folder / "queries.npy")[:200]
    rows = search(queries)
    stored = np.concatenate([np.load(path) for path in sorted((folder / "shards").glob("*.npy"))])
    assert [set(row) for row in rows] == naive_neighbours(stored, queries, 20)
    return {"ms": {"default": 60.0, "ours": 4.0}[name], "rows": rows}, 1


def test_every_row_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds = []

    def child(arguments, environment):
        if arguments[1] == "benchmarks.flat_search":
            return run_in_process(arguments, environment)
        builds.append(arguments)
        Path(arguments[arguments.index("--out") + 1]).mkdir()
        return None, 3_000_000_000

    # Without a rotation, whose training takes longer than everything else.
    wikipedia = Choice("IVF65536_HNSW32,PQ24x4fs,Refine(SQ8)", 0, 0, "")
    monkeypatch.setattr(retrieval, "choose_factory", lambda count, *_: wikipedia)
    monkeypatch.setattr(retrieval, "run_child", child)
    monkeypatch.setattr(retrieval, "QUICK", retrieval.Sizes(vectors=4000, queries=128, flat=1500, build=600))
    rows = {row.name: row for row in retrieval.measure(Options(quick=True, out=tmp_path))}
    targets = {name.removeprefix("retrieval."): row.target for name, row in rows.items() if row.target}
    assert targets == {
        "recall20_recommended": ">= 0.95",
        "projected_gb_21m": "<= 16",
        "time_ratio_to_faiss": "<= 1.1",
        "time_ratio_to_faiss_with_texts": "<= 1.1",
        "speedup_over_default_flat": ">= 5",
        "build_peak_gb": "<= 4",
    }
    assert rows["retrieval.speedup_over_default_flat"].value == 15
    assert rows["retrieval.build_peak_gb"].value == 3 and rows["retrieval.build_vectors"].value == 600
    assert rows["retrieval.Flat.recall20"].value == 1
    assert rows["retrieval.Flat.size"].value == pytest.approx(4 * 48, rel=0.01)
    assert 0.9 < rows["retrieval.recall20_recommended"].value <= 1
    assert rows["retrieval.bytes_computed_over_measured"].value == pytest.approx(1, abs=0.1)
    assert builds[0][-2:] == ["--memory", "4GB"]
    out = capsys.readouterr().out
    assert "Only bytes are projected" in out and "21,015,324" in out
    assert (tmp_path / "recommended").is_dir() and not (tmp_path / "other").exists()


def test_the_subprocess_prints_times_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flat_search, "BATCH", 8)
    corpus = ClusteredVectors(600)
    write_shards(corpus, tmp_path / "shards")
    np.save(tmp_path / "queries.npy", corpus.queries(100))
    flat_search.main("default", tmp_path)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ms"] > 0 and len(printed["rows"]) == 8 * (1 + flat_search.BATCHES)


def test_the_default_search_does_not_import_our_faiss_setup(tmp_path: Path) -> None:
    write_shards(ClusteredVectors(100), tmp_path / "shards")
    code = (
        "import sys; from pathlib import Path; from benchmarks.flat_search import default_search; "
        "default_search(Path(sys.argv[1])); "
        "print(int('genpoe_plugin.retrieval.faiss_setup' in sys.modules))"
    )
    assert run_child(["-c", code, tmp_path], os.environ)[0] == 0
