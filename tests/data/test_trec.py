from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions
from genpoe_plugin.data.trec import identified, read_qrels, read_run, write_qrels, write_run
from genpoe_plugin.errors import InputError


def found(*entries: tuple[str, float], answers: str = "") -> tuple[RetrievedPassage, ...]:
    return tuple(
        RetrievedPassage(Passage(name, "", f"text {name}"), score, rank, has_answer=name in answers)
        for rank, (name, score) in enumerate(entries, 1)
    )


def test_runs_are_read_by_score(tmp_path: Path) -> None:
    lines = "q1 Q0 b 1 1.5 x\n\nq1 Q0 a 2 2e0 x\nq2\tQ0\td\t1\t-1\tx\nq1 Q0 c 3 1.5 x\n"
    (tmp_path / "run.txt").write_text(lines)
    with gzip.open(tmp_path / "run.txt.gz", "wt") as file:
        file.write(lines)
    for name in ("run.txt", "run.txt.gz"):
        run = read_run(tmp_path / name)
        assert {question: list(scores.items()) for question, scores in run.items()} == {
            "q1": [("a", 2.0), ("b", 1.5), ("c", 1.5)],
            "q2": [("d", -1.0)],
        }


def test_qrels_of_trec_and_of_beir(tmp_path: Path) -> None:
    (tmp_path / "trec").write_text("q1 0 a 1\nq1 0 b 0\nq2 0 a 2\n")
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\nq2\ta\t2\n")
    for name in ("trec", "beir.tsv"):
        assert read_qrels(tmp_path / name) == {"q1": {"a": 1, "b": 0}, "q2": {"a": 2}}


def test_what_is_written_is_read_in_the_same_order(tmp_path: Path) -> None:
    """Ties, scores that only 64 bits tell apart, and passages that are not in the order of their scores."""
    scores = [("c", 3.0), ("a", 3.0), ("b", 3.0 - 1e-12), ("e", 5.0), ("d", 0.1), ("f", -2e-9)]
    asked = [Question("first?", ("x",), found(*scores)), Question("second?", ("x",), found(("z", 0.0)), id="own")]
    write_run(tmp_path / "run", asked)
    run = read_run(tmp_path / "run")
    assert {question: list(scores) for question, scores in run.items()} == {"1": list("cabedf"), "own": ["z"]}
    # trec_eval keeps 32 bits and sorts ties by its own rule, so there must be none.
    values = np.array(list(run["1"].values()), np.float32)
    assert (np.diff(values) < 0).all()
    np.testing.assert_allclose(values[[0, 1, 2, 4]], [3, 3, 3, 0.1], rtol=1e-6)
    line = (tmp_path / "run").read_text().splitlines()[0].split()
    assert line == ["1", "Q0", "c", "1", "3.0", "genpoe"]


def test_scores_of_a_reranker_go_first(tmp_path: Path) -> None:
    (entry,) = found(("a", 3.0))
    asked = [Question("?", ("x",), (RetrievedPassage(entry.passage, 3.0, 1, rerank_score=-4.25, rerank_rank=1),))]
    write_run(tmp_path / "run", asked)
    assert read_run(tmp_path / "run") == {"1": {"a": -4.25}}


def test_qrels_say_which_passages_have_an_answer(tmp_path: Path) -> None:
    asked = [Question("?", ("x",), found(("a", 3.0), ("b", 2.0), answers="b")), Question("?", ("x",))]
    write_qrels(tmp_path / "qrels", asked)
    assert (tmp_path / "qrels").read_text() == "1 0 a 0\n1 0 b 1\n"
    assert read_qrels(tmp_path / "qrels") == {"1": {"a": 0, "b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 a 1 2.0\n", r"file:1: 5 fields; a line of a run is question Q0 passage rank score tag"),
        ("q Q0 a 1 2.0 x\nq Q0 a 2 1.0 x\n", r"file:2: passage 'a' is named twice for question 'q'"),
        ("q Q0 a 1 high x\n", r"file:1: 'high' is not a number"),
        ("q Q0 a 1 nan x\n", r"file:1: 'nan' is not a number"),
        ("\n", r"file: the file is empty; give a run"),
    ],
)
def test_what_is_no_run(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_run(tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q 0\n", r"file:1: 2 fields; a line of qrels is question 0 passage grade"),
        ("q 0 a 1\nq 0 a half\n", r"file:2: 'half' is not a number"),
        ("q 0 a 0.5\n", r"file:1: the grade must be a whole number, not '0.5'"),
        ("query-id\tcorpus-id\tscore\n", r"file: no judgements"),
    ],
)
def test_what_are_no_qrels(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_qrels(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_ids_that_trec_cannot_hold(tmp_path: Path) -> None:
    for question in (Question("?", ("x",), found(("a b", 1.0))), Question("?", ("x",), found(("a", 1.0)), id="q\t1")):
        for write in (write_run, write_qrels):
            with pytest.raises(InputError, match="split at white space, so ids cannot have any"):
                write(tmp_path / "out", [question])
            assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="question 2: another question has the id '2' too"):
        list(identified([Question("?", ("x",), id="2"), Question("!", ("x",))]))


def test_queries_of_beir_have_ids_and_no_answers(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text(
        '{"_id": "q7", "text": "where is zürich?", "metadata": {}}\n{"_id": 8, "text": "who?"}\n'
    )
    questions = list(read_questions(tmp_path / "queries.jsonl", need_answers=False))
    assert questions == [Question("where is zürich?", (), id="q7"), Question("who?", (), id="8")]
    with pytest.raises(InputError, match=r"queries.jsonl:1: a question needs a list of answer strings"):
        list(read_questions(tmp_path / "queries.jsonl"))


def test_corpora_of_beir_and_of_pyserini(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "title": "T", "text": "fox"}\n{"_id": "b", "text": "dog"}\n')
    (tmp_path / "pyserini.jsonl").write_text('{"id": "a", "contents": "T\\nfox"}\n')
    assert list(read_passages(tmp_path / "corpus.jsonl")) == [Passage("a", "T", "fox"), Passage("b", "", "dog")]
    assert list(read_passages(tmp_path / "pyserini.jsonl")) == [Passage("a", "", "T\nfox")]
