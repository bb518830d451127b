from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.factory import (
    POINTS_PER_CENTROID,
    centroids,
    choose_factory,
    describe_factory,
    index_bytes,
    train,
    training_rows,
)
from genpoe_plugin.retrieval.faiss_setup import faiss, make_index

COUNTS = [10, 300_000, 300_001, 2_000_000, 100_000_000]
DIMENSIONS = [4, 96, 384, 768, 1024]


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "SQfp16",
        "SQ6",
        "PQ8x4",
        "PQ8x4fs",
        "IVF8,Flat",
        "IVF8,SQ4",
        "IVF8_HNSW8,SQ8",
        "OPQ8_16,IVF8,PQ8x4fs,Refine(SQfp16)",
        "OPQ8_16,IVF8_HNSW8,PQ8x4fs,Refine(SQ6)",
        "PCA16,IVF8,SQ8,RFlat",
        "HNSW16",
        "HNSW8,SQ8",
        "RR16,IVF8,RaBitQfs4",
    ],
)
def test_bytes_are_those_of_the_file(tmp_path: Path, factory: str) -> None:
    count, dimension = 4000, 32
    vectors = np.random.default_rng(0).standard_normal((count, dimension), np.float32)
    index = make_index(factory, dimension)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    assert index_bytes(factory, count, dimension) == pytest.approx(os.path.getsize(tmp_path / "index"), rel=0.02)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("count", COUNTS)
def test_what_is_chosen_fits_and_can_be_made(count: int, dimension: int) -> None:
    best = choose_factory(count, dimension)
    seen = []
    for memory in (10**9, 4 * 10**9, 16 * 10**9, 64 * 10**9, 10**12):
        try:
            choice = choose_factory(count, dimension, memory)
        except InputError as error:
            # The advice, with as much as it says, is what is chosen then.
            assert "\n" not in str(error) and f"{memory / 1e9:.1f} GB of memory: too little" in str(error)
            advised = str(error).split("; ")[1].split(" needs ")[0]
            needed = describe_factory(advised, count, dimension).peak
            assert needed > memory and choose_factory(count, dimension, needed).peak <= needed
            continue
        assert choice.bytes < choice.peak <= memory
        assert choice.bytes == index_bytes(choice.factory, count, dimension)
        assert f"{choice.bytes / 1e9:.1f} GB" in choice.reason and "\n" not in choice.reason
        index = make_index(choice.factory, dimension)
        assert training_rows(index, count) >= POINTS_PER_CENTROID * centroids(index)
        seen.append(choice.bytes)
    assert seen[-1] == best.bytes and seen == sorted(seen)
    assert (best.factory == "Flat") == (count <= 300_000 or dimension < 8)


def test_wikipedia_in_sixteen_gigabytes() -> None:
    assert choose_factory(21_015_324, 768, 16 * 10**9).factory == "OPQ96_384,IVF65536_HNSW32,PQ96x4fs,Refine(SQ6)"
    # By hand: 6-bit vectors; codes and rows in lists; OPQ's matrix, the centroids and their graph.
    expected = 21_015_324 * (576 + 48 + 8) + 65536 * (16 * 48 + 4 * 384 + 4 * 66) + 4 * 768 * 384
    assert choose_factory(21_015_324, 768, 16 * 10**9).bytes == pytest.approx(expected, rel=0.002)
    assert choose_factory(21_015_324, 768).factory == "OPQ96_384,IVF65536_HNSW32,PQ96x4fs,Refine(SQfp16)"


def test_training_stays_within_memory() -> None:
    index = make_index("IVF65536,Flat", 768)
    wanted = POINTS_PER_CENTROID * 65536
    assert training_rows(index, 10**8) == wanted
    assert training_rows(index, 1000) == 1000
    rows = training_rows(index, 10**8, 4 * 10**9)
    assert rows < wanted and 2.5e9 < rows * 4 * 768 < 3.3e9


def test_a_rotation_is_learned_for_the_codes_behind_it(capfd: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((1500, 6)) @ rng.standard_normal((6, 16))).astype(np.float32)

    def error(index: object) -> float:
        """Of what codes keep of the vectors."""
        return float(((index.sa_decode(index.sa_encode(vectors)) - vectors) ** 2).sum() / (vectors**2).sum())

    ours, theirs = make_index("OPQ4_16,PQ4x4", 16), make_index("OPQ4_16,PQ4x4", 16)
    train("OPQ4_16,PQ4x4", ours, vectors)
    assert "WARNING" not in capfd.readouterr().err
    theirs.train(vectors)
    assert error(ours) < 0.95 * error(theirs)
    ours.add(vectors)
    assert ours.search(vectors[:3], 1)[1].shape == (3, 1)


def test_what_cannot_be_trained_is_one_line() -> None:
    with pytest.raises(InputError, match=r"factory 'IVF64,Flat': FAISS cannot train it .*training points") as caught:
        train("IVF64,Flat", make_index("IVF64,Flat", 4), np.zeros((4, 4), np.float32))
    assert "\n" not in str(caught.value)


def test_k_means_is_for_gpus_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def on_gpus(index: object) -> object:
        made.append(index)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", on_gpus)
    index = make_index("IVF4,Flat", 4)
    train("IVF4,Flat", index, np.random.default_rng(0).standard_normal((200, 4), np.float32))
    assert index.is_trained and [type(used) for used in made] == [faiss.IndexFlat]


def test_what_faiss_cannot_make_is_one_line() -> None:
    for call in (make_index, lambda factory, d: index_bytes(factory, 10, d)):
        with pytest.raises(InputError, match=r"factory 'Flt': .*could not parse") as caught:
            call("Flt", 8)
        assert "\n" not in str(caught.value)
