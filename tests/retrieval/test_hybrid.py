from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.bm25_building import build_bm25
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval import loading
from genpoe_plugin.retrieval.bm25 import BM25Retriever
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.hybrid import HybridRetriever, fused
from genpoe_plugin.retrieval.loading import index_directories, load_retriever


def ranking(identifiers: str) -> list[RetrievedPassage]:
    return [RetrievedPassage(Passage(i, "", f"text {i}"), 9.0 - rank, rank) for rank, i in enumerate(identifiers, 1)]


def test_ranks_are_fused_by_hand() -> None:
    found = fused([ranking("abcd"), ranking("cbe")])
    # b: 1/62 + 1/62 = .032258; c: 1/63 + 1/61 = .032266; a: 1/61; e: 1/63; d: 1/64.
    assert [item.passage.id for item in found] == ["c", "b", "a", "e", "d"]
    expected = [1 / 63 + 1 / 61, 2 / 62, 1 / 61, 1 / 63, 1 / 64]
    assert [item.score for item in found] == pytest.approx(expected, rel=1e-12)
    assert [item.rank for item in found] == [1, 2, 3, 4, 5]


def test_a_tie_goes_to_the_earlier_ranking() -> None:
    assert [item.passage.id for item in fused([ranking("ab"), ranking("xy")])] == ["a", "x", "b", "y"]
    assert [item.passage.id for item in fused([ranking("xy"), ranking("ab")])] == ["x", "a", "y", "b"]
    assert fused([[], []]) == ()


@pytest.fixture
def built(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> tuple[DenseRetriever, BM25Retriever, list[Passage]]:
    rng = np.random.default_rng(0)
    passages, encoder = fixed_corpus(rng.standard_normal((300, 6)))
    words = ["fox", "dog", "opera", "lake"]
    passages = [Passage(p.id, "", " ".join(rng.choice(words, 9))) for p in passages]
    encoder.questions = {"fox opera": rng.standard_normal(6), "lake": rng.standard_normal(6), "?": np.ones(6)}
    dense = DenseRetriever(index_passages(passages, encoder, tmp_path / "dense", progress=False), encoder)
    return dense, build_bm25(passages, tmp_path / "bm25", progress=False), passages


@pytest.mark.parametrize("k", [1, 20, 150])
def test_both_rankings_decide(built: tuple[DenseRetriever, BM25Retriever, list[Passage]], k: int) -> None:
    dense, words, _ = built
    questions = ["fox opera", "lake", "?"]
    found = HybridRetriever([dense, words]).retrieve(questions, k)
    for question, result in zip(questions, found, strict=True):
        scores: dict[str, float] = {}
        for retriever in (dense, words):
            for position, item in enumerate(retriever.retrieve([question], max(k, 100))[0]):
                scores[item.passage.id] = scores.get(item.passage.id, 0) + 1 / (61 + position)
        best = sorted(scores.values(), reverse=True)[:k]
        assert [item.score for item in result] == pytest.approx(best, rel=1e-9)
        assert [item.score for item in result] == pytest.approx([scores[item.passage.id] for item in result], rel=1e-9)
        assert [item.rank for item in result] == list(range(1, k + 1))
    # Where the words say nothing, the vectors alone decide.
    assert [i.passage.id for i in found[2]] == [i.passage.id for i in dense.retrieve(["?"], k)[0]]


def test_what_it_says_of_itself(built: tuple[DenseRetriever, BM25Retriever, list[Passage]]) -> None:
    dense, words, passages = built
    hybrid, turned = HybridRetriever([dense, words]), HybridRetriever([words, dense])
    assert (hybrid.name, turned.name) == ("fixed+BM25", "BM25+fixed")
    assert hybrid.corpus == dense.corpus == words.corpus
    assert hybrid.passages.passage(7) == passages[7] and len(hybrid.passages) == 300
    # The order decides ties.
    assert len({hybrid.fingerprint, turned.fingerprint, dense.fingerprint, words.fingerprint}) == 4


def test_indexes_of_different_passages_are_refused(
    built: tuple[DenseRetriever, BM25Retriever, list[Passage]], tmp_path: Path
) -> None:
    dense, _, passages = built
    for name, other in {"fewer": passages[1:], "ids": [Passage(f"x{p.id}", p.title, p.text) for p in passages]}.items():
        words = build_bm25(other, tmp_path / name, progress=False)
        with pytest.raises(InputError, match=rf"dense and .*{name}: indexes of different passages \(300 and") as caught:
            HybridRetriever([dense, words])
        assert "\n" not in str(caught.value)


def test_directories_are_joined_by_plus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a+c", "x+y"):
        (tmp_path / name).mkdir()

    def names(index: str) -> Sequence[str]:
        return [str(path) for path in index_directories(index)]

    assert names("a") == ["a"] and names("a+b") == ["a", "b"] and names("a+b+a") == ["a", "b", "a"]
    assert names("a+c") == ["a+c"] and names("x+y") == ["x+y"]  # the names of directories
    assert names("a+c+b") == ["a+c", "b"] and names("b+x+y") == ["b", "x+y"]
    for index, missing in {"z": "z", "a+z": "z", "z+a": "z", "a+": "a+", "+a": "+a", "": "", "x+a": "x"}.items():
        with pytest.raises(InputError) as caught:
            index_directories(index)
        assert str(caught.value) == f"{missing}: no such directory; `genpoe index build` makes one"


def test_loaded_by_the_names_of_both(
    built: tuple[DenseRetriever, BM25Retriever, list[Passage]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, words, _ = built
    loads: list[str | None] = []

    def load(directory: Path, *, device: str, encoder: str | None) -> DenseRetriever:
        loads.append(encoder)
        return dense

    monkeypatch.setattr(DenseRetriever, "load", load)
    loaded = load_retriever(f"{tmp_path / 'dense'}+{tmp_path / 'bm25'}", encoder="moved")
    assert loaded.fingerprint == HybridRetriever([dense, words]).fingerprint and loads == ["moved"]
    (tmp_path / "bm25").rename(tmp_path / "words+more")
    assert load_retriever(tmp_path / "words+more").fingerprint == words.fingerprint
    with pytest.raises(InputError, match="2 of its indexes have an encoder; moved is for one"):
        load_retriever(f"{tmp_path / 'dense'}+{tmp_path / 'dense'}", encoder="moved")
    manifest = json.loads((tmp_path / "words+more" / "index.json").read_text())
    (tmp_path / "words+more" / "index.json").write_text(json.dumps({**manifest, "retriever": "oracle"}))
    with pytest.raises(InputError, match="an index of oracle, which this version does not know"):
        loading.load_retriever(tmp_path / "words+more")
