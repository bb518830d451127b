from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.indexing.bm25_building import build_bm25
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval.encoder import load_encoder
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.loading import load_retriever
from genpoe_plugin.selection import rerankers
from train_cli.main import main

WORDS = ["rossini", "barber", "curie", "radium", "polonium", "fox", "opera", "pesaro"]
PASSAGES = [
    Passage("1", "barber", "rossini barber opera"),
    Passage("2", "curie", "curie radium polonium"),
    Passage("3", "", "fox fox"),
    *(Passage(f"filler {i}", "", " ".join(WORDS[i % 8 :] + WORDS[: i % 3])) for i in range(27)),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retrieve")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    encoder = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=16)], device="cpu")
    encoder.save(str(directory / "encoder"))
    loaded = load_encoder(str(directory / "encoder"))
    index_passages(PASSAGES, loaded, directory / "index", progress=False)
    return directory / "index"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.tsv"
    path.write_text("barber opera\t['Rossini']\nfox\t['quagga', 'FOX']\nradium\t['fox']\npolonium\t['tungsten']\n")
    return path


def run(index: Path | str, questions: Path, out: Path, *arguments: object) -> Result:
    options = ["--index", index, "--questions", questions, "--out", out, *arguments]
    return CliRunner().invoke(main, ["retrieve", *map(str, options)])


def figures(ranked: Sequence[Sequence[bool]]) -> list[str]:
    """Those of a printed line, from the questions' passages that hold an answer."""
    recall = [np.mean([any(row[:k]) for row in ranked]) for k in (1, 5, 20)]
    mrr = np.mean([1 / (1 + row.index(True)) if any(row) else 0 for row in ranked])
    gains = [sum(hit / np.log2(rank + 2) for rank, hit in enumerate(row[:10])) for row in ranked]
    best = [sum(1 / np.log2(rank + 2) for rank in range(min(10, sum(row)))) for row in ranked]
    ndcg = np.mean([gain / most if most else 0 for gain, most in zip(gains, best, strict=True)])
    return [f"{value:.4f}" for value in (*recall, mrr, ndcg)]


def test_retrieved_passages_are_written_and_counted(index: Path, questions: Path, tmp_path: Path) -> None:
    result = run(index, questions, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    header = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert (header["format"], header["version"], header["num_retrieved"]) == ("genpoe-retrieval", 1, 20)
    assert header["index"] == PassageIndex.load(index).fingerprint

    encoder = load_encoder(str(index.parent / "encoder"))
    written = list(read_questions(tmp_path / "out.jsonl"))
    asked = list(read_questions(questions))
    assert [(q.question, q.answers) for q in written] == [(q.question, q.answers) for q in asked]
    hits = []
    for question in written:
        scores = encoder.encode_passages(PASSAGES) @ encoder.encode_questions([question.question])[0]
        order = np.argsort(-scores, kind="stable")[:20]
        assert [item.score for item in question.passages] == pytest.approx(scores[order].tolist(), abs=1e-5)
        assert [item.rank for item in question.passages] == list(range(1, 21))
        words = [set(item.passage.text.split()) for item in question.passages]
        hits.append([bool(w & {answer.lower() for answer in question.answers}) for w in words])
        assert [item.has_answer for item in question.passages] == hits[-1]
        assert all(item.rerank_rank is None for item in question.passages)
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0] == ["4", "questions", "recall@1", "recall@5", "recall@20", "MRR", "nDCG@10"]
    assert table[1] == ["retrieved", *figures(hits)] and len(table) == 3
    assert 0 < np.mean([row[0] for row in hits]) < 1


class ByLength:
    """Stands in for a reranker: long passages are good ones, and questions must come with their own passages."""

    fingerprint = "by-length"

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        assert {query for query, _ in pairs} == {"barber opera", "fox", "radium", "polonium"}
        return np.array([len(passage.split()) for _, passage in pairs], np.float32)


def test_reranked_passages(index: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerankers, "load_reranker", lambda name, **options: ByLength())
    result = run(index, questions, tmp_path / "out.jsonl", "--reranker", "some/reranker")
    assert result.exit_code == 0, result.output
    run(index, questions, tmp_path / "before.jsonl")
    hits = []
    written, before = read_questions(tmp_path / "out.jsonl"), read_questions(tmp_path / "before.jsonl")
    for question, dense in zip(written, before, strict=True):
        expected = sorted(dense.passages, key=lambda item: (-len(item.passage.string.split()), item.rank))
        assert [(item.passage, item.score, item.rank) for item in question.passages] == [
            (item.passage, item.score, item.rank) for item in expected
        ]
        assert [item.rerank_rank for item in question.passages] == list(range(1, 21))
        assert [item.rerank_score for item in question.passages] == [
            len(item.passage.string.split()) for item in expected
        ]
        hits.append([bool(item.has_answer) for item in question.passages])
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[1][0] == "retrieved" and table[2] == ["reranked", *figures(hits)]
    header = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert (header["reranker"], header["reranker_fingerprint"]) == ("some/reranker", "by-length")


def test_words_retrieve_alone_and_with_vectors(index: Path, questions: Path, tmp_path: Path) -> None:
    build_bm25(PASSAGES, tmp_path / "bm25", progress=False)
    for given, name in [
        (tmp_path / "bm25", "BM25"),
        (f"{index}+{tmp_path / 'bm25'}", f"{index.parent / 'encoder'}+BM25"),
    ]:
        result = run(given, questions, tmp_path / "out.jsonl")
        assert result.exit_code == 0, result.output
        retriever = load_retriever(given)
        header = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
        assert (header["retriever"], header["index"]) == (name, retriever.fingerprint)
        written = list(read_questions(tmp_path / "out.jsonl"))
        for question, expected in zip(written, retriever.retrieve([q.question for q in written], 20), strict=True):
            assert [(item.passage, item.score, item.rank) for item in question.passages] == [
                (item.passage, item.score, item.rank) for item in expected
            ]
    build_bm25(PASSAGES[1:], tmp_path / "fewer", progress=False)
    for given, options, message in [
        (f"{index}+{tmp_path / 'fewer'}", [], "indexes of different passages (30 and 29)"),
        (f"{index}+{tmp_path / 'none'}", [], "none: no such directory"),
        (tmp_path / "bm25", ["--encoder", "x"], "0 of its indexes have an encoder"),
    ]:
        result = run(given, questions, tmp_path / "refused.jsonl", *options)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "refused.jsonl").exists()


def test_dprs_format_has_the_same(index: Path, questions: Path, tmp_path: Path) -> None:
    assert run(index, questions, tmp_path / "out.jsonl").exit_code == 0
    assert run(index, questions, tmp_path / "out.json", "--format", "dpr").exit_code == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [set(ctx) for row in rows for ctx in row["ctxs"]] == [{"id", "title", "text", "score", "has_answer"}] * 80
    assert list(read_questions(tmp_path / "out.json")) == list(read_questions(tmp_path / "out.jsonl"))


def test_recall_is_printed_only_as_far_as_was_retrieved(index: Path, questions: Path, tmp_path: Path) -> None:
    result = run(index, questions, tmp_path / "out.jsonl", "--num-retrieved", 5)
    assert "recall@5" in result.stdout and "recall@20" not in result.stdout


def test_bad_input_is_one_line_and_leaves_nothing(index: Path, questions: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tsv"
    broken.write_text("fox\t['fox']\nfox\n")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    for arguments, message in [
        ((index, broken), "broken.tsv:2: 1 fields"),
        ((index, empty), "empty.json: no questions"),
        ((index, tmp_path / "none.tsv"), "none.tsv: no such file"),
        ((tmp_path, questions), "not an index"),
        ((index, questions, "--num-retrieved", 0), "--num-retrieved"),
        ((index, questions, "--encoder", "no-such/encoder"), "no-such/encoder: "),
        ((index, questions, "--reranker-format", "bge"), "give --reranker as well"),
    ]:
        index_directory, question_file, *options = arguments
        result = run(index_directory, question_file, tmp_path / "out.jsonl", *options)
        assert result.exit_code == 2
        last = result.stderr.splitlines()[-1]
        assert last.lower().startswith("error: ") and message in last and "Traceback" not in result.stderr
        assert not (tmp_path / "out.jsonl").exists()
