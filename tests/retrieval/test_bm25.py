from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing import bm25_building
from genpoe_plugin.indexing.bm25_building import build_bm25
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval.bm25 import FILES, BM25Retriever, best_rows
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.loading import load_retriever
from genpoe_plugin.retrieval.manifest import MANIFEST
from genpoe_plugin.retrieval.passage_store import PASSAGES

# Each is its own stem.
WORDS = ["fox", "dog", "opera", "radium", "lake", "tundra", "violin", "harbour"]


def corpus(count: int, seed: int = 0) -> list[Passage]:
    rng = np.random.default_rng(seed)
    return [
        Passage(f"p{row}", WORDS[row % 8] if row % 3 else "", " ".join(rng.choice(WORDS, rng.integers(1, 30))))
        for row in range(count)
    ]


def naive(passages: Sequence[Passage], question: list[str], k1: float, b: float) -> list[float]:
    """Lucene's BM25 in float64, term by term."""
    documents = [f"{passage.title} {passage.text}".split() for passage in passages]
    mean = sum(len(document) for document in documents) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in question:
            containing = sum(word in other for other in documents)
            count = document.count(word)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.2, 0.0)])
def test_scores_equal_the_formula(tmp_path: Path, k1: float, b: float) -> None:
    passages = corpus(600)  # more than a record batch
    retriever = build_bm25(passages, tmp_path / "index", k1=k1, b=b, progress=False)
    questions = ["fox", "opera fox fox", "lake harbour radium unheard", *(f"{word} dog" for word in WORDS)] * 40
    found = BM25Retriever.load(tmp_path / "index").retrieve(questions, 50)
    assert found == retriever.retrieve(questions, 50) and len(found) == len(questions) > 256
    for question, result in list(zip(questions, found, strict=True))[-11:]:
        expected = dict(zip(passages, naive(passages, question.split(), k1, b), strict=True))
        assert [item.rank for item in result] == list(range(1, 51))
        assert [item.score for item in result] == pytest.approx([expected[item.passage] for item in result], rel=1e-5)
        best = sorted(expected.values(), reverse=True)[:50]
        assert [item.score for item in result] == pytest.approx(best, rel=1e-5)
    assert type(found[0][0].score) is float


def test_words_are_stemmed_in_lower_case_and_without_stop_words(tmp_path: Path) -> None:
    passages = [
        Passage("1", "The Foxes", "they were jumping"),
        Passage("2", "", "the and of was"),
        Passage("3", "", "Zürich, fox"),
    ]
    retriever = build_bm25(passages, tmp_path / "index", progress=False)
    found = retriever.retrieve(["Did the fox JUMP?", "zürich!", "the and of was", "", "unheard of"], 5)
    assert [[item.passage.id for item in result] for result in found] == [["1", "3"], ["3"], [], [], []]


@settings(max_examples=200)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40), st.integers(1, 45))
def test_ties_go_to_the_first_rows_and_nothing_without_a_score_is_found(scores: list[float], k: int) -> None:
    expected = sorted((row for row, score in enumerate(scores) if score > 0), key=lambda row: (-scores[row], row))[:k]
    assert best_rows(np.array(scores, np.float32), k).tolist() == expected


@pytest.mark.parametrize("k", [1, 20, 300])
@pytest.mark.parametrize("kinds", [3, 1000])
def test_the_best_of_many_rows(k: int, kinds: int) -> None:
    """With many ties and with few, where the best rows are looked for in blocks."""
    rng = np.random.default_rng(k)
    for count in (1, k, 16 * k, 40 * k + 7, 20_011):
        scores = (rng.integers(0, kinds, count) / 8).astype(np.float32)
        expected = sorted(np.flatnonzero(scores).tolist(), key=lambda row: (-scores[row], row))[:k]
        assert best_rows(scores, k).tolist() == expected
    scores = np.zeros(20_011, np.float32)
    scores[[7, 20_010]] = 1, 2
    assert best_rows(scores, k).tolist() == [20_010, 7][:k]


def test_scores_are_mapped_and_read_by_bm25s_itself(tmp_path: Path) -> None:
    passages = corpus(40)
    retriever = build_bm25(passages, tmp_path / "index", progress=False)
    assert all(isinstance(retriever.scores.scores[name], np.memmap) for name in ("data", "indices", "indptr"))
    theirs = bm25s.BM25.load(tmp_path / "index")
    rows, scores = theirs.retrieve([["fox", "lake"]], k=5, show_progress=False)
    (found,) = retriever.retrieve(["fox lake"], 5)
    assert [item.score for item in found] == scores[0].tolist()
    assert [item.passage for item in found] == [passages[row] for row in rows[0]]


def test_scores_are_not_read_before_they_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_bm25(corpus(5), tmp_path / "index", progress=False)
    monkeypatch.setattr(bm25s.BM25, "load", lambda *_, **__: pytest.fail("scores were read"))
    opened = load_retriever(tmp_path / "index")
    assert len(opened.passages) == 5 and opened.passages.passage(3).id == "p3" and opened.name == "BM25"


def test_fingerprint_is_of_scores_and_passages(tmp_path: Path) -> None:
    passages = corpus(30)
    first = build_bm25(passages, tmp_path / "a", progress=False)
    again = build_bm25(list(passages), tmp_path / "b", progress=False)
    assert (again.fingerprint, again.corpus) == (first.fingerprint, first.corpus)
    other_parameters = build_bm25(passages, tmp_path / "c", k1=0.9, progress=False)
    other_ids = build_bm25([Passage(f"x{p.id}", p.title, p.text) for p in passages], tmp_path / "d", progress=False)
    assert len({first.fingerprint, other_parameters.fingerprint, other_ids.fingerprint}) == 3
    assert other_parameters.corpus == first.corpus != other_ids.corpus


def test_a_build_that_fails_leaves_an_index_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = corpus(20)
    kept = build_bm25(passages, tmp_path / "index", progress=False).fingerprint
    for given_passages, message in [
        ([*passages, passages[1]], "passage 21: id 'p1' is also the id of passage 2"),
        ([], "no passages"),
        ([Passage("1", "", "the of")], "no words but stop words"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            build_bm25(given_passages, tmp_path / "index", progress=False)
        assert "\n" not in str(caught.value)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(bm25s.BM25, "save", interrupt)
        build_bm25(corpus(9), tmp_path / "index", progress=False)
    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"cannot be written .*No space left"):
        patched.setattr(bm25s.BM25, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        build_bm25(corpus(9), tmp_path / "index", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert BM25Retriever.load(tmp_path / "index").fingerprint == kept


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    work = tmp_path / "index.building-bm25"
    work.mkdir()
    (work / "data.csc.index.npy").write_bytes(b"half")
    assert len(build_bm25(corpus(9), tmp_path / "index", progress=False).passages) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_passages_that_change_during_the_build_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "passages.tsv"
    path.write_text("1\tfox\t\n2\tdog\t\n")
    check = bm25_building.check_corpus

    def change(*arguments, **options):
        result = check(*arguments, **options)
        path.write_text("1\tfox\t\n2\tdog\t\n3\tlake\t\n")
        return result

    monkeypatch.setattr(bm25_building, "check_corpus", change)
    with pytest.raises(InputError, match=r"passages.tsv: changed during the build"):
        build_bm25(path, tmp_path / "index", progress=False)


def test_only_an_index_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("precious")
    with pytest.raises(InputError, match="not an index; give another directory"):
        build_bm25(corpus(3), tmp_path / "thesis", progress=False)
    assert (tmp_path / "thesis" / "chapter").read_text() == "precious"
    assert len(build_bm25(corpus(3), tmp_path / "index", progress=False).passages) == 3
    assert len(build_bm25(corpus(4), tmp_path / "index", progress=False).passages) == 4


def edit_manifest(directory: Path, **changes: object) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Replace a file and its size in the manifest."""
    (directory / name).write_bytes(content)
    files = json.loads((directory / MANIFEST).read_text())["files"]
    files[name]["bytes"] = len(content)
    edit_manifest(directory, files=files)


def pickled(directory: Path) -> None:
    np.save(directory / "values.npy", np.array([print], object), allow_pickle=True)
    content = (directory / "values.npy").read_bytes()
    replace_file(directory, FILES[0], content)


def shortened(directory: Path) -> None:
    np.save(directory / "values.npy", np.load(directory / FILES[0])[:-1])
    replace_file(directory, FILES[0], (directory / "values.npy").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), r"not an index \(no index.json\)"),
        (lambda d: (d / FILES[1]).unlink(), r"indices.csc.index.npy: no file where"),
        (lambda d: (d / PASSAGES).write_bytes(b""), r"passages.arrow: 0 bytes where"),
        (lambda d: edit_manifest(d, version=99), r"index.json: version 99 instead of version"),
        (lambda d: edit_manifest(d, files={}), r"index.json: not a valid index manifest"),
        (lambda d: edit_manifest(d, k1="much"), r"index.json: not a valid index manifest"),
        (lambda d: edit_manifest(d, count=7), r"damaged index \(40 passages where index.json says 7"),
        (lambda d: edit_manifest(d, retriever="oracle"), r"an index of oracle"),
        (lambda d: edit_manifest(d, vocabulary=7), r"damaged index of BM25 \(its files do not match"),
        (shortened, r"damaged index of BM25 \(its files do not match"),
        (pickled, r"damaged index of BM25 \(.*Python objects"),
        (lambda d: replace_file(d, FILES[0], b"nothing"), r"damaged index of BM25"),
        (lambda d: replace_file(d, FILES[3], b"[]"), r"damaged index of BM25"),
        (lambda d: replace_file(d, FILES[4], b"{}"), r"damaged index of BM25"),
        (lambda d: replace_file(d, FILES[4], b'{"surprise": 1}'), r"damaged index of BM25"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    build_bm25(corpus(40), tmp_path / "index", progress=False)
    damage(tmp_path / "index")
    for load in (BM25Retriever.load, load_retriever):
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / "index").retrieve(["fox"], 1)
        assert "\n" not in str(caught.value)


def test_what_is_no_question_for_it_is_refused(tmp_path: Path) -> None:
    retriever = build_bm25(corpus(40), tmp_path / "index", progress=False)
    with pytest.raises(InputError, match="k is 0; it must be at least 1"):
        retriever.retrieve(["fox"], 0)
    with pytest.raises(InputError, match="index: 0 of its indexes have an encoder; some/encoder is for one"):
        load_retriever(tmp_path / "index", encoder="some/encoder")
    assert retriever.retrieve([], 5) == []


@pytest.mark.parametrize("name", [*FILES, PASSAGES])
def test_verify_finds_a_flipped_bit(tmp_path: Path, name: str) -> None:
    retriever = build_bm25(corpus(40), tmp_path / "index", progress=False)
    data = bytearray((tmp_path / "index" / name).read_bytes())
    data[-20] ^= 1
    (tmp_path / "index" / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: damaged"):
        retriever.verify()


def test_each_kind_of_index_is_opened_by_its_own_retriever(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    passages, encoder = fixed_corpus(np.eye(4, dtype=np.float32))
    index_passages(passages, encoder, tmp_path / "dense", progress=False)
    build_bm25(passages, tmp_path / "bm25", progress=False)
    with pytest.raises(InputError, match="dense: an index of dense retrieval, not of BM25"):
        BM25Retriever.load(tmp_path / "dense")
    with pytest.raises(InputError, match="bm25: an index of bm25, which has no vectors"):
        PassageIndex.load(tmp_path / "bm25")
    assert isinstance(load_retriever(tmp_path / "bm25"), BM25Retriever)
    build_bm25(passages, tmp_path / "dense", progress=False)  # an index may be replaced by one of another kind
    assert load_retriever(tmp_path / "dense").corpus == load_retriever(tmp_path / "bm25").corpus
