from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval import index as index_module
from genpoe_plugin.retrieval.faiss_setup import faiss
from genpoe_plugin.retrieval.index import VECTORS, PassageIndex
from genpoe_plugin.retrieval.manifest import MANIFEST
from genpoe_plugin.retrieval.passage_store import BLOCK, PASSAGES

Corpus = Callable[[np.ndarray], tuple[list[Passage], object]]


def build(corpus: Corpus, vectors: np.ndarray, directory: Path, **options: object) -> PassageIndex:
    passages, encoder = corpus(vectors)
    return index_passages(passages, encoder, directory, progress=False, **options)


def brute_force(passages: np.ndarray, questions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All inner products in float64; best first, ties by row."""
    scores = questions.astype(np.float64) @ passages.astype(np.float64).T
    rows = np.array([sorted(range(len(passages)), key=lambda row: (-line[row], row))[:k] for line in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("questions", [3, 64], ids=["few", "many"])  # below and above FAISS's threshold for BLAS
def test_flat_search_is_exact(fixed_corpus: Corpus, tmp_path: Path, questions: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((BLOCK + 100, 24), np.float32)
    wanted = rng.standard_normal((questions, 24), np.float32)
    scores, rows = build(fixed_corpus, vectors, tmp_path / "index").search(wanted, 20)
    expected_scores, expected_rows = brute_force(vectors, wanted, 20)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    assert scores.dtype == np.float32 and rows.dtype == np.int64


# Small whole numbers: inner products are exact, so that ties are real, and frequent.
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 70), st.sampled_from([1, 25]))
def test_ties_go_to_the_first_rows(
    fixed_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, k: int, questions: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (count, 3)).astype(np.float32)
    wanted = rng.integers(-1, 2, (questions, 3)).astype(np.float32)
    index = build(fixed_corpus, vectors, tmp_path_factory.mktemp("ties") / "index")
    scores, rows = index.search(wanted, k)
    expected_scores, expected_rows = brute_force(vectors, wanted, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


def test_ties_far_beyond_k(fixed_corpus: Corpus, tmp_path: Path) -> None:
    vectors = np.ones((1000, 4), np.float32)
    vectors[500:] *= 2
    _, rows = build(fixed_corpus, vectors, tmp_path / "index").search(np.ones((30, 4)), 5)
    np.testing.assert_array_equal(rows, np.tile(np.arange(500, 505), (30, 1)))


def test_what_is_loaded_is_what_was_built(fixed_corpus: Corpus, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2 * BLOCK + 7, 8), np.float32)
    passages, encoder = fixed_corpus(vectors)
    passages[BLOCK] = Passage(passages[BLOCK].id, "", 'naïve 東京 "quoted"\nsecond line')
    built = index_passages(passages, encoder, tmp_path / "index", progress=False)
    loaded = PassageIndex.load(tmp_path / "index")
    assert [loaded.passage(row) for row in range(len(loaded))] == passages
    for ours, theirs in zip(built.search(vectors[:30], 9), loaded.search(vectors[:30], 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (loaded.encoder_name, loaded.encoder_fingerprint) == (encoder.name, encoder.fingerprint)
    assert loaded.fingerprint == built.fingerprint
    loaded.verify()
    assert loaded.manifest["pooling"] == encoder.pooling
    for row in (-1, len(loaded)):
        with pytest.raises(IndexError):
            loaded.passage(row)


def test_an_index_of_version_2_is_read(fixed_corpus: Corpus, tmp_path: Path) -> None:
    """With the file of ids that it has, as part of its fingerprint."""
    directory = tmp_path / "index"
    built = build(fixed_corpus, np.eye(4, dtype=np.float32), directory)
    (directory / "ids.npy").write_bytes(b"ids")
    ids = {"bytes": 3, "sha256": hashlib.sha256(b"ids").hexdigest()}
    edit_manifest(directory, version=2, files={**built.manifest["files"], "ids.npy": ids})
    loaded = PassageIndex.load(directory)
    loaded.verify()
    assert loaded.search(np.eye(4), 1)[1][:, 0].tolist() == [0, 1, 2, 3] and loaded.passage(3).id == "p3"
    assert loaded.fingerprint != built.fingerprint


def test_fingerprint_is_of_encoder_vectors_and_passages(fixed_corpus: Corpus, tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    passages, encoder = fixed_corpus(vectors)
    fingerprint = index_passages(passages, encoder, tmp_path / "a", progress=False).fingerprint
    assert index_passages(passages, encoder, tmp_path / "b", progress=False).fingerprint == fingerprint
    other_text = [*passages[:3], Passage("p3", "", "other")]
    changed = [index_passages(other_text, encoder, tmp_path / "c", progress=False).fingerprint]
    changed.append(build(fixed_corpus, 2 * vectors, tmp_path / "d").fingerprint)
    encoder.fingerprint = "another"
    changed.append(index_passages(passages, encoder, tmp_path / "e", progress=False).fingerprint)
    edit_manifest(tmp_path / "b", search={"parameters": {"nprobe": 2}})
    changed.append(PassageIndex.load(tmp_path / "b").fingerprint)
    assert len({fingerprint, *changed}) == 5


@pytest.mark.parametrize("factory", ["SQfp16", "IVF8,Flat", "HNSW16,SQ8", "OPQ8_16,IVF8,PQ8x4fs,Refine(SQfp16)"])
def test_approximate_types_find_most(fixed_corpus: Corpus, tmp_path: Path, factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((8, 16)).repeat(60, axis=0) + 0.2 * rng.standard_normal((480, 16))
    vectors = vectors.astype(np.float32)
    index = build(fixed_corpus, vectors, tmp_path / "index", factory=factory)
    _, rows = index.search(vectors[::10], 5)
    _, expected = brute_force(vectors, vectors[::10], 5)
    found = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows.tolist(), expected.tolist(), strict=True)])
    assert found > 0.8


def test_rows_of_an_index_that_finds_fewer_end_in_minus_one(fixed_corpus: Corpus, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 8), np.float32)
    scores, rows = build(fixed_corpus, vectors, tmp_path / "index", factory="IVF4,Flat").search(vectors[:20], 200)
    for question, question_scores, question_rows in zip(vectors, scores, rows, strict=False):
        found = question_rows[question_rows >= 0]
        assert 0 < len(found) < 200 and len(set(found.tolist())) == len(found)
        assert set(question_rows[len(found) :].tolist()) == {-1}
        np.testing.assert_allclose(question_scores[: len(found)], vectors[found] @ question, atol=1e-5)


def test_search_refuses_what_it_cannot_answer(fixed_corpus: Corpus, tmp_path: Path) -> None:
    index = build(fixed_corpus, np.eye(4, dtype=np.float32), tmp_path / "index")
    with pytest.raises(InputError, match="k is 0; it must be at least 1"):
        index.search(np.ones((1, 4)), 0)
    with pytest.raises(InputError, match="the index has vectors of dimension 4"):
        index.search(np.ones((1, 5)), 1)
    assert index.search(np.ones((0, 4)), 3)[1].shape == (0, 3)


def test_a_build_that_fails_leaves_an_index_as_it_was(fixed_corpus: Corpus, tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    passages, encoder = fixed_corpus(vectors)
    not_finite = fixed_corpus(np.where(np.eye(4) > 0, np.nan, 1))[1]
    attempts: list[tuple[object, object, str, str]] = [
        ([*passages, passages[1]], encoder, "Flat", "passage 5: id 'p1' is also the id of passage 2"),
        ([], encoder, "Flat", "no passages"),
        (passages, not_finite, "Flat", "fixed: .*'p0' is not finite"),
        (passages, encoder, "Flt", "factory 'Flt'.*could not parse"),
    ]

    def build_all() -> None:
        for given_passages, given_encoder, factory, message in attempts:
            with pytest.raises(InputError, match=message) as caught:
                index_passages(given_passages, given_encoder, tmp_path / "index", factory=factory, progress=False)
            assert "\n" not in str(caught.value)

    build_all()
    assert list(tmp_path.iterdir()) == []
    kept = index_passages(passages, encoder, tmp_path / "index", progress=False).fingerprint
    build_all()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert PassageIndex.load(tmp_path / "index").fingerprint == kept


def test_only_an_index_is_replaced(fixed_corpus: Corpus, tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("thesis", "file"):
        with pytest.raises(InputError, match="not an index; give another directory"):
            build(fixed_corpus, vectors, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter").read_text() == (tmp_path / "file").read_text() == "precious"
    (tmp_path / "index").mkdir()
    assert len(build(fixed_corpus, vectors, tmp_path / "index")) == 4
    assert len(build(fixed_corpus, vectors[:3], tmp_path / "index")) == 3


def edit_manifest(directory: Path, **changes: object) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), r"index: not an index \(no index.json\)"),
        (lambda d: (d / VECTORS).unlink(), r"index.faiss: no file where"),
        (lambda d: (d / PASSAGES).unlink(), r"passages.arrow: no file where"),
        (lambda d: truncate(d / MANIFEST), r"index.json: not a valid index manifest"),
        (lambda d: (d / MANIFEST).write_text("{}"), r"index.json: another format"),
        (lambda d: (d / MANIFEST).write_text("[]"), r"index.json: not a valid index manifest"),
        (lambda d: (d / MANIFEST).write_bytes(b"\xff"), r"index.json: not a valid index manifest"),
        (lambda d: edit_manifest(d, version=1), r"index.json: version 1 instead of version 3 .*build the index again"),
        (lambda d: edit_manifest(d, format="recipe"), r"index.json: another format instead of version 3"),
        (lambda d: edit_manifest(d, search={}), r"index.json: not a valid index manifest"),
        (lambda d: edit_manifest(d, files={}), r"index.json: not a valid index manifest"),
        (lambda d: edit_manifest(d, count="4"), r"index.json: not a valid index manifest"),
        (lambda d: truncate(d / VECTORS), r"index.faiss: .* bytes where"),
        (lambda d: truncate(d / PASSAGES), r"passages.arrow: .* bytes where"),
        (lambda d: edit_manifest(d, count=5), r"index: damaged index .*build it again"),
        (lambda d: edit_manifest(d, dimension=5), r"index: damaged index .*build it again"),
        (lambda d: (d / VECTORS).write_bytes(bytes((d / VECTORS).stat().st_size)), r"index: damaged index"),
        (lambda d: (d / PASSAGES).write_bytes(bytes((d / PASSAGES).stat().st_size)), r"passages.arrow: damaged"),
    ],
)
def test_damage_is_one_line(
    fixed_corpus: Corpus, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    build(fixed_corpus, np.eye(4, dtype=np.float32), tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(InputError, match=message) as caught:
        PassageIndex.load(tmp_path / "index")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [VECTORS, PASSAGES])
def test_verify_finds_a_flipped_bit(fixed_corpus: Corpus, tmp_path: Path, name: str) -> None:
    index = build(fixed_corpus, np.eye(4, dtype=np.float32), tmp_path / "index")
    data = bytearray((tmp_path / "index" / name).read_bytes())
    data[-20] ^= 1
    (tmp_path / "index" / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: damaged"):
        index.verify()


def test_damage_within_the_vectors_is_one_line_when_they_are_searched(fixed_corpus: Corpus, tmp_path: Path) -> None:
    build(fixed_corpus, np.eye(4, dtype=np.float32), tmp_path / "index")
    path = tmp_path / "index" / VECTORS
    data = path.read_bytes()
    path.write_bytes(b"Ixxx" + data[4:])
    with pytest.raises(InputError, match=r"index.faiss: damaged .*build the index again") as caught:
        PassageIndex.load(tmp_path / "index").search(np.ones((1, 4)), 1)
    assert "\n" not in str(caught.value)


def test_vectors_are_not_read_before_they_are_searched(
    fixed_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some FAISS types cannot be mapped from the file, so opening them would take as long as reading them."""
    build(fixed_corpus, np.eye(4, dtype=np.float32), tmp_path / "index")
    monkeypatch.setattr(index_module, "open_vectors", lambda paths: pytest.fail("vectors were read"))
    opened = PassageIndex.load(tmp_path / "index")
    assert opened.passage(3).id == "p3" and len(opened) == 4


class OnGPUs:
    """Stands in for an index on GPUs, which finds a limited number of results."""

    def __init__(self, index: object) -> None:
        self.index, self.fetched = index, []

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.fetched.append(k)
        assert k <= index_module.MAX_GPU_RESULTS
        return self.index.search(vectors, k)


def test_gpus_search_where_there_are_any_and_they_can(
    fixed_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies: list[OnGPUs] = []
    monkeypatch.setattr(index_module, "MAX_GPU_RESULTS", 8)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: copies.append(OnGPUs(index)) or copies[0])
    index = build(fixed_corpus, np.ones((100, 4), np.float32), tmp_path / "index")
    _, rows = index.search(np.ones((3, 4)), 3)  # all tie, so that more and more are looked at
    np.testing.assert_array_equal(rows, [[0, 1, 2]] * 3)
    assert [copy.fetched for copy in copies] == [[4, 8]]

    def refuse(index: object) -> object:
        raise RuntimeError("Error: no such type on a GPU")

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuse)
    _, rows = PassageIndex.load(tmp_path / "index").search(np.ones((1, 4)), 3)
    np.testing.assert_array_equal(rows, [[0, 1, 2]])
    assert "searched on the CPU (no such type on a GPU)" in caplog.text
