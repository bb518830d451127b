"""``genpoe rerank`` through the command line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from transformers import PreTrainedTokenizerFast

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_header, read_questions, write_questions
from genpoe_plugin.files import file_digest
from genpoe_plugin.selection import rerankers
from tests.gguf_llm import write_gguf
from train_cli.main import main

TEXTS = ["a fox", "a lazy dog", "the brown fox jumps", "over it"]


class ByLength:
    """Stands in for a reranker: long passages are good ones."""

    fingerprint = "by-length"

    def __init__(self) -> None:
        self.fails_at: str | None = None

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        if self.fails_at in {query for query, _ in pairs}:
            raise KeyboardInterrupt
        return np.array([len(passage.split()) for _, passage in pairs], np.float32)


@pytest.fixture
def reranker(monkeypatch: pytest.MonkeyPatch) -> ByLength:
    stand_in = ByLength()
    monkeypatch.setattr(rerankers, "load_reranker", lambda name, **options: stand_in)
    return stand_in


@pytest.fixture(params=["ours", "dpr"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three questions; has_answer is not said in our file, and said in DPR's."""
    passages = tuple(RetrievedPassage(Passage(str(i), "", text), 9.0 - i, i + 1) for i, text in enumerate(TEXTS))
    asked = [
        Question("q1", ("fox",), passages),
        Question("q2", ("lazy",), passages),
        Question("q3", ("cat",), passages),
    ]
    if request.param == "ours":
        write_questions(tmp_path / "results.jsonl.gz", asked, index="abc", num_retrieved=4)
        return tmp_path / "results.jsonl.gz"

    def ctx(i: int, text: str, answer: str) -> dict[str, object]:
        return {"id": str(i), "title": "", "text": text, "score": str(9.0 - i), "has_answer": answer in text}

    rows = [
        {
            "question": item.question,
            "answers": list(item.answers),
            "ctxs": [ctx(i, text, item.answers[0]) for i, text in enumerate(TEXTS)],
        }
        for item in asked
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows, indent=4))
    return tmp_path / "results.json"


def run(results: Path, out: Path, *arguments: object) -> Result:
    options = [results, "--reranker", "some/reranker", "--out", out, *arguments]
    return CliRunner().invoke(main, ["rerank", *map(str, options)])


def test_any_results_are_reranked_and_told_before_and_after(results: Path, tmp_path: Path, reranker: ByLength) -> None:
    result = run(results, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    written = list(read_questions(tmp_path / "out.jsonl"))
    assert [item.question for item in written] == ["q1", "q2", "q3"]
    for item, answer in zip(written, ["fox", "lazy", "cat"], strict=True):
        assert [p.passage.text for p in item.passages] == [TEXTS[2], TEXTS[1], TEXTS[0], TEXTS[3]]
        assert [p.rank for p in item.passages] == [3, 2, 1, 4]
        assert [p.score for p in item.passages] == [7.0, 8.0, 9.0, 6.0]
        assert [p.rerank_rank for p in item.passages] == [1, 2, 3, 4]
        assert [p.rerank_score for p in item.passages] == [4.0, 3.0, 2.0, 2.0]
        assert [p.has_answer for p in item.passages] == [answer in p.passage.text for p in item.passages]
    header = read_header(tmp_path / "out.jsonl")
    expected = {
        "results_sha256": file_digest(results),
        "reranker": "some/reranker",
        "reranker_fingerprint": "by-length",
    }
    assert header == expected | ({"index": "abc", "num_retrieved": 4} if results.suffix == ".gz" else {})
    # Answers at rank 1, 2 and nowhere; then at rank 1, 2 and nowhere as well.
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0] == ["3", "questions", "recall@1", "MRR", "nDCG@10"]
    # The first question has another answer at rank 3.
    ndcg = f"{((1 + 1 / 2) / (1 + 1 / np.log2(3)) + 1 / np.log2(3)) / 3:.4f}"
    assert table[1:3] == [[name, "0.3333", "0.5000", ndcg] for name in ("retrieved", "reranked")]


def test_gold_marks_of_the_file_are_kept(tmp_path: Path, reranker: ByLength) -> None:
    """As in HotpotQA, whose gold paragraphs need not have the answer's words, nor others lack them."""
    marks = (True, False, None, None)
    passages = tuple(
        RetrievedPassage(Passage(str(i), "", text), 9.0 - i, i + 1, has_answer=mark)
        for i, (text, mark) in enumerate(zip(TEXTS, marks, strict=True))
    )
    write_questions(tmp_path / "gold.jsonl", [Question("q1", ("lazy",), passages), Question("q2", ("fox",), passages)])
    assert run(tmp_path / "gold.jsonl", tmp_path / "out.jsonl").exit_code == 0
    for item, said in zip(read_questions(tmp_path / "out.jsonl"), [False, True], strict=True):
        assert {p.passage.id: p.has_answer for p in item.passages} == {"0": True, "1": False, "2": said, "3": False}


def test_dprs_format(results: Path, tmp_path: Path, reranker: ByLength) -> None:
    assert run(results, tmp_path / "out.jsonl").exit_code == 0
    assert run(results, tmp_path / "out.json", "--format", "dpr").exit_code == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["question"] for row in rows] == ["q1", "q2", "q3"]
    assert rows[1]["ctxs"][1]["score"] == "8.0" and rows[1]["ctxs"][1]["has_answer"] is True
    assert list(read_questions(tmp_path / "out.json")) == list(read_questions(tmp_path / "out.jsonl"))


def test_ctrl_c_and_again(results: Path, tmp_path: Path, reranker: ByLength, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpoe_plugin.selection.result_files.SCORE_BLOCK", 1)
    run(results, tmp_path / "whole.jsonl")
    reranker.fails_at = "q2"
    stopped = run(results, tmp_path / "out.jsonl")
    assert stopped.exit_code == 130 and not (tmp_path / "out.jsonl").exists()
    assert stopped.stderr.splitlines()[-1].startswith("interrupted; 1 questions are saved in ")
    reranker.fails_at = "q1"  # it is not scored again
    again = run(results, tmp_path / "out.jsonl")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, reranker: ByLength) -> None:
    files = {
        "none.jsonl": None,
        "empty.json": b"[]",
        "bare.jsonl": b'{"question": "q", "answers": ["a"]}',
        "cut.json": b'[{"question": "q", "answers": ["a"], "ctxs": [{"id": 1, "text": "t"}]}',
        "pickled.json": pickle.dumps([{"question": "q"}]),
    }
    messages = ["no such file", "no questions", "no question has passages; add them", "not JSON", "a pickle"]
    for (name, content), message in zip(files.items(), messages, strict=True):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        result = run(tmp_path / name, tmp_path / "out.jsonl")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert f"{name}" in result.stderr and message in result.stderr
        assert not list(tmp_path.glob("out*"))


def test_an_llm_cuts_the_passages(
    results: Path, tmp_path: Path, reranker: ByLength, tokenizer: PreTrainedTokenizerFast, make_llm
) -> None:
    long = RetrievedPassage(Passage("0", "", "word " * 900), 1.0, 1)
    write_questions(tmp_path / "long.jsonl", [Question("q", ("a",), (long,))])
    tokenizer.save_pretrained(tmp_path / "llm")
    write_gguf(tmp_path / "tiny.gguf", make_llm("llama"), tokenizer)
    of_file = ("--llm", tmp_path, "--gguf-file", "tiny.gguf")
    scores = {}
    for name, options in {"whole": (), "cut": ("--llm", tmp_path / "llm"), "cut-by-file": of_file}.items():
        result = run(tmp_path / "long.jsonl", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        (scores[name],) = (p.rerank_score for item in read_questions(tmp_path / name) for p in item.passages)
    assert 0 < scores["cut"] < 256 < scores["whole"] == 900
    assert scores["cut-by-file"] == scores["cut"]
    assert read_header(tmp_path / "cut-by-file")["gguf_file"] == "tiny.gguf"
    assert read_header(tmp_path / "cut")["llm"] == str(tmp_path / "llm") and "llm" not in read_header(
        tmp_path / "whole"
    )
    result = run(tmp_path / "long.jsonl", tmp_path / "out", "--gguf-file", "tiny.gguf")
    assert result.exit_code == 2 and "give --llm as well" in result.stderr
    result = run(tmp_path / "long.jsonl", tmp_path / "out", "--llm", tmp_path / "nothing")
    assert result.exit_code == 2 and "cannot be loaded" in result.stderr and result.stderr.count("\n") == 1
