from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import clustered_vectors
from benchmarks.clustered_vectors import ClusteredVectors, NumberedQuestions, write_shards


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DIMENSION": 48, "HIDDEN": 64, "LATENT": 10, "BLOCK": 512}.items():
        monkeypatch.setattr(clustered_vectors, name, value)


def test_a_block_depends_only_on_the_seed_and_its_number() -> None:
    vectors = ClusteredVectors(1500)
    whole = vectors.vectors(0, 1500)
    assert whole.shape == (1500, 48) and whole.dtype == np.float32
    np.testing.assert_array_equal(ClusteredVectors(1500).vectors(1024, 1500), whole[1024:])
    assert not np.array_equal(ClusteredVectors(1500, seed=1).vectors(0, 512), whole[:512])
    assert len(np.unique(whole, axis=0)) == 1500
    with pytest.raises(ValueError, match="row 100 "):
        vectors.vectors(100, 200)


def test_queries_are_of_the_same_clusters_but_not_copies() -> None:
    vectors = ClusteredVectors(5000)
    corpus, queries = vectors.vectors(0, 5000), vectors.queries(100)
    unit = corpus / np.linalg.norm(corpus, axis=1, keepdims=True)
    nearest = (queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T).max(axis=1)
    chance = np.random.default_rng(0).standard_normal((100, 48))
    strangers = (chance / np.linalg.norm(chance, axis=1, keepdims=True) @ unit.T).max(axis=1)
    assert nearest.max() < 0.999 and np.median(nearest) > strangers.max()
    assert not np.array_equal(vectors.queries(100, part=1), queries)
    np.testing.assert_array_equal(vectors.queries(10), queries[:10])


def test_norms_are_about_one() -> None:
    norms = np.linalg.norm(ClusteredVectors(2000).vectors(0, 2000), axis=1)
    assert abs(norms.mean() - 1) < 0.01 and 0.03 < norms.std() < 0.07


def test_the_surface_is_curved() -> None:
    """The latent space has 10 dimensions; the vectors span more."""
    spectrum = np.linalg.svd(ClusteredVectors(2000).vectors(0, 2000), compute_uv=False) ** 2
    assert spectrum[:10].sum() < 0.95 * spectrum.sum()


def test_shards_hold_the_vectors_and_are_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumberedQuestions, "dimension", 48)
    vectors = ClusteredVectors(1500)
    shards = write_shards(vectors, tmp_path / "shards")
    stored = np.concatenate([shards.vectors(number) for number in shards.numbers])
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, vectors.vectors(0, 1500).astype(np.float16))
    calls = []
    monkeypatch.setattr(ClusteredVectors, "vectors", lambda self, *rows: calls.append(rows))
    write_shards(vectors, tmp_path / "shards")
    assert not calls
