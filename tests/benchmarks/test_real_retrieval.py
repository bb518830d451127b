"""The benchmark of real retrieval, with a few synthetic questions and an encoder that counts letters."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_retrieval
from benchmarks.options import Options
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.encoder_options import EncoderOptions

TOPICS = ["opera", "radium", "fox", "canberra", "volcano", "violin", "glacier", "harbour"]


class Letters:
    """Stands in for an encoder."""

    name = fingerprint = pooling = "letters"
    options = EncoderOptions("", "")
    precision = "float32"
    dimension = 26

    def _encode(self, text: str) -> np.ndarray:
        counts = Counter(text.lower())
        return np.array([counts[chr(97 + i)] for i in range(26)], np.float32) / 10

    def encode_questions(self, questions):
        return np.stack([self._encode(question) for question in questions])

    def encode_passages(self, passages):
        return np.stack([self._encode(passage.string) for passage in passages])


class ByTitle:
    """Stands in for a reranker that knows: the passage whose title is in the question."""

    fingerprint = "by-title"

    def score(self, pairs, *, progress=False):
        return np.array([passage.split(":")[0] in query for query, passage in pairs], np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "nq").mkdir(parents=True)
    rows, articles = [], []
    for number, topic in enumerate(TOPICS):
        context = f"The {topic} was known in {1900 + number}, and {'so ' * number}people came."
        ctx = {"id": topic, "title": topic, "text": context, "score": "0", "has_answer": True}
        rows.append({"question": f"when was the {topic} known", "answers": [str(1900 + number)], "ctxs": [ctx]})
        qas = [{"question": f"Who came to the {topic} {i}?", "answers": [{"text": "people"}] * 3} for i in range(2)]
        articles.append({"title": topic, "paragraphs": [{"context": context, "qas": qas}]})
    (folder / "nq" / "nq-open-gold-passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(folder / "squad-v1.1-part.json.gz", "wt") as file:
        json.dump({"data": articles}, file)
    return folder


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_retrieval, "encoder_name", lambda: "letters")
    monkeypatch.setattr(real_retrieval, "load_encoder", lambda name: Letters())
    monkeypatch.setattr(real_retrieval, "load_reranker", lambda name: ByTitle())


def test_rows_of_both_data_sets(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    rows = {row.name: row.value for row in real_retrieval.measure(Options(data=data, out=out, reranker="r"))}
    rankings = ("bm25", "dense", "hybrid", "reranked")
    measures = ("recall1", "recall5", "recall20", "mrr", "mrr10")
    assert {name.split(".", 2)[2] for name in rows if name.startswith("real_retrieval.nq.")} == {
        *(f"{ranking}.{kind}{key}" for ranking in rankings for kind in ("", "own_passage_") for key in measures),
        "questions",
    }
    assert rows["real_retrieval.passages"] == 8  # the same passages in both data sets
    for ranking in rankings:
        for key in measures:  # one question of NQ to two of SQuAD, in every topic
            nq, squad = (rows[f"real_retrieval.{name}.{ranking}.{key}"] for name in ("nq", "squad"))
            assert rows[f"real_retrieval.{ranking}.{key}"] == pytest.approx((nq + 2 * squad) / 3)
    # Only one passage has the year; the reranker knows which one.
    assert rows["real_retrieval.nq.reranked.recall1"] == rows["real_retrieval.nq.bm25.recall1"] == 1
    # Every passage of SQuAD's has the people, but only one is the question's.
    assert rows["real_retrieval.squad.dense.recall1"] == 1
    for name, questions in {"nq": 1, "squad": 2}.items():
        topics = [topic for topic in TOPICS if real_retrieval.zlib.crc32(topic.encode()) % 2]
        assert rows[f"real_retrieval.{name}.questions"] == questions * len(topics) and 0 < len(topics) < 8
        test, train = (list(read_questions(out / f"{name}.{part}.jsonl")) for part in ("test", "train"))
        assert len(test) == questions * len(topics) and len(train) == questions * (8 - len(topics))
        own = [next(topic for topic in TOPICS if topic in question.question) for question in test]
        assert set(own) == set(topics)
        # Own passages, by hand.
        encoder, ranks = Letters(), []
        passages = [
            Passage("", topic, f"The {topic} was known in {1900 + n}, and {'so ' * n}people came.")
            for n, topic in enumerate(TOPICS)
        ]
        for question, topic in zip(test, own, strict=True):
            scores = encoder.encode_passages(passages) @ encoder.encode_questions([question.question])[0]
            ranks.append(1 + sum(scores > scores[TOPICS.index(topic)]))
        assert rows[f"real_retrieval.{name}.dense.own_passage_mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
        assert rows[f"real_retrieval.{name}.reranked.own_passage_mrr"] == 1
    assert rows["real_retrieval.nq.dense.own_passage_mrr"] < 1
    assert "the question's own passage, among 8" in capsys.readouterr().out


def test_the_index_of_the_same_corpus_is_reused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(data=data / "nq", out=tmp_path / "out")
    first = real_retrieval.measure(options)
    encoded = []
    encode = Letters.encode_passages
    monkeypatch.setattr(Letters, "encode_passages", lambda self, items: encoded.extend(items) or encode(self, items))
    assert real_retrieval.measure(options) == first and not encoded
    path = data / "nq" / "nq-open-gold-passages.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    real_retrieval.measure(options)
    assert len(encoded) == 6


def test_bm25_equals_the_formula() -> None:
    passages = [
        Passage("1", "", "fox fox jumps"),
        Passage("2", "", "fox sleeps quietly tonight near water"),
        Passage("3", "", "dog jumps"),
    ]
    words = [passage.text.split() for passage in passages]
    mean = sum(map(len, words)) / 3
    scores = []
    for document in words:
        score = 0.0
        for word in ("fox", "jumps"):
            containing = sum(word in other for other in words)
            idf = math.log(1 + (3 - containing + 0.5) / (containing + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(score)
    (found,) = real_retrieval.BM25(passages).retrieve(["the Fox jumped"], 5)
    order = sorted(range(3), key=lambda row: -scores[row])
    assert [entry.passage for entry in found] == [passages[row] for row in order]
    assert [entry.score for entry in found] == pytest.approx([scores[row] for row in order], rel=1e-5)


def test_missing_data_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data FOLDER"):
        real_retrieval.measure(Options())
    with pytest.raises(InputError, match="neither nq-open"):
        real_retrieval.measure(Options(data=tmp_path))
