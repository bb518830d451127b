"""TREC's and BEIR's files through `genpoe retrieve` and `genpoe rerank`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from genpoe_plugin.data.questions import read_header, read_questions
from genpoe_plugin.data.trec import read_qrels, read_run
from genpoe_plugin.files import file_digest
from genpoe_plugin.selection import rerankers
from train_cli.main import main

WORDS = ["fox", "dog", "opera", "lake", "tundra", "violin", "glacier", "harbour"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class ByLength:
    """Stands in for a reranker: long passages are good ones."""

    fingerprint = "by-length"

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        return np.array([len(passage) for _, passage in pairs], np.float32)


@pytest.fixture
def beir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in BEIR's files, with an index of words; grades are drawn, and one query has none."""
    monkeypatch.setattr(rerankers, "load_reranker", lambda name, **options: ByLength())
    rng = np.random.default_rng(0)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"d{row}", "title": "", "text": " ".join(rng.choice(WORDS, rng.integers(2, 40)))} for row in range(80)
    ]
    queries = [{"_id": f"q{i}", "text": f"{a} {b}"} for i, (a, b) in enumerate(pairwise(WORDS))]
    for name, rows in {"corpus": corpus, "queries": queries}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore"]
    for query in queries[1:]:
        for row in rng.choice(80, 12, replace=False):
            lines.append(f"{query['_id']}\td{row}\t{rng.integers(0, 4)}")
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    command = ["index", "build", "--retriever", "bm25", "--passages", folder / "corpus.jsonl"]
    assert run(*command, "--out", folder / "index").exit_code == 0
    return folder


def retrieve(beir: Path, out: Path, *arguments: object) -> Result:
    return run("retrieve", "--questions", beir / "queries.jsonl", "--out", out, *arguments)


def figures(result: Result) -> dict[str, dict[str, float]]:
    """The printed measures by ranking."""
    titles, *lines = [line.split() for line in result.stdout.splitlines()[:-1]]
    names = titles[2:]
    return {line[0]: dict(zip(names, map(float, line[1:]), strict=True)) for line in lines}


def test_measures_agree_with_trec_eval(beir: Path, tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    qrels = beir / "qrels" / "test.tsv"
    out = tmp_path / "run"
    options = ["--index", beir / "index", "--qrels", qrels, "--format", "trec", "--num-retrieved", 30]
    for extra in ([], ["--reranker", "some/reranker"]):
        result = retrieve(beir, out, *options, *extra)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("6 questions ")
        theirs = pytrec_eval.RelevanceEvaluator(read_qrels(qrels), {"recall", "recip_rank", "ndcg_cut"})
        scores = theirs.evaluate({question: dict(found) for question, found in read_run(out).items()}).values()
        names = {"recall@5": "recall_5", "recall@20": "recall_20", "MRR": "recip_rank", "nDCG@10": "ndcg_cut_10"}
        ours = figures(result)["reranked" if extra else "retrieved"]
        for name, their_name in names.items():
            assert ours[name] == pytest.approx(np.mean([score[their_name] for score in scores]), abs=5e-5), name
        assert 0 < ours["recall@5"] < ours["recall@20"] < 1


def test_measures_by_answers_agree_with_trec_eval(beir: Path, tmp_path: Path) -> None:
    """Recall is trec_eval's success then, and nDCG's best order is that of what was retrieved."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    questions = tmp_path / "questions.tsv"
    questions.write_text("".join(f"{word}\t['{other}']\n" for word in WORDS for other in (WORDS[0], "tundra fox")))
    options = ["--index", beir / "index", "--questions", questions, "--num-retrieved", 20]
    written = ["--write-qrels", tmp_path / "qrels"]
    result = run("retrieve", *options, "--out", tmp_path / "run", "--format", "trec", *written)
    assert result.exit_code == 0, result.output
    theirs = pytrec_eval.RelevanceEvaluator(read_qrels(tmp_path / "qrels"), {"success", "recip_rank", "ndcg_cut"})
    scores = theirs.evaluate(read_run(tmp_path / "run")).values()
    names = {"recall@1": "success_1", "recall@5": "success_5", "MRR": "recip_rank", "nDCG@10": "ndcg_cut_10"}
    for name, their_name in names.items():
        ours = figures(result)["retrieved"][name]
        assert ours == pytest.approx(np.mean([score[their_name] for score in scores]), abs=5e-5), name
    assert 0 < figures(result)["retrieved"]["recall@1"] < 1


def test_questions_without_answers_are_retrieved_and_judged_by_qrels(beir: Path, tmp_path: Path) -> None:
    qrels = beir / "qrels" / "test.tsv"
    result = retrieve(beir, tmp_path / "out.jsonl", "--index", beir / "index", "--qrels", qrels)
    assert result.exit_code == 0, result.output
    assert read_header(tmp_path / "out.jsonl")["qrels_sha256"] == file_digest(qrels)
    grades = read_qrels(qrels)
    for question in read_questions(tmp_path / "out.jsonl", need_answers=False):
        assert question.answers == () and question.passages
        marks = [item.has_answer for item in question.passages]
        if question.id == "q0":
            assert marks == [None] * len(marks)
        else:
            assert marks == [grades[question.id].get(item.passage.id, 0) > 0 for item in question.passages]
    again = run("rerank", tmp_path / "out.jsonl", "--reranker", "r", "--out", tmp_path / "ranked", "--qrels", qrels)
    assert again.exit_code == 0 and figures(again)["retrieved"] == figures(result)["retrieved"]
    result = retrieve(beir, tmp_path / "unjudged.jsonl", "--index", beir / "index")
    assert result.exit_code == 0 and "nothing to measure" in result.stdout


@pytest.mark.parametrize("source", ["index", "passages"])
def test_a_run_of_another_system_is_read(beir: Path, tmp_path: Path, source: str) -> None:
    texts = {"d3": "", "d70": "", "d5": ""}
    texts |= {row["_id"]: row["text"] for row in map(json.loads, (beir / "corpus.jsonl").open())}
    (tmp_path / "run").write_text(
        "q2 Q0 d3 1 0.5 other\nq2 Q0 d70 2 0.75 other\nq2 Q0 d5 3 0.25 other\nq4 Q0 d5 1 9 other\n"
    )
    where = ["--index", beir / "index"] if source == "index" else ["--passages", beir / "corpus.jsonl"]
    result = retrieve(beir, tmp_path / "out.jsonl", "--run", tmp_path / "run", *where, "--num-retrieved", 2)
    assert result.exit_code == 0, result.output
    assert read_header(tmp_path / "out.jsonl")["run_sha256"] == file_digest(tmp_path / "run")
    found = {q.id: q for q in read_questions(tmp_path / "out.jsonl", need_answers=False)}
    assert [(p.passage.id, p.passage.text, p.score, p.rank) for p in found["q2"].passages] == [
        ("d70", texts["d70"], 0.75, 1),
        ("d3", texts["d3"], 0.5, 2),
    ]
    assert [p.passage.id for p in found["q4"].passages] == ["d5"] and found["q1"].passages == ()

    options = ["--reranker", "r", "--questions", beir / "queries.jsonl", *where, "--format", "trec"]
    result = run("rerank", tmp_path / "run", *options, "--out", tmp_path / "reranked")
    assert result.exit_code == 0, result.output
    expected = sorted(("d3", "d70", "d5"), key=lambda name: -len(texts[name]))
    assert list(read_run(tmp_path / "reranked")["q2"]) == expected


def test_questions_without_ids_are_numbered(beir: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.tsv").write_text("fox dog\t['dog']\nlake\t['opera']\n")
    (tmp_path / "run").write_text("2 Q0 d1 1 1.0 other\n1 Q0 d2 1 1.0 other\n")
    where = ["--passages", beir / "corpus.jsonl", "--questions", tmp_path / "questions.tsv"]
    assert run("retrieve", "--run", tmp_path / "run", *where, "--out", tmp_path / "out.jsonl").exit_code == 0
    questions = read_questions(tmp_path / "out.jsonl")
    assert [[p.passage.id for p in q.passages] for q in questions] == [["d2"], ["d1"]]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("retrieve --run {run}", "a run has no texts; give the passages that were searched"),
        ("retrieve --run {run} --index {index} --passages {corpus}", "a run has no texts"),
        ("retrieve --run {run} --index {index} --encoder x", "--encoder: nothing is encoded for a --run"),
        ("retrieve", "give --index to search, or --run"),
        ("retrieve --index {index} --passages {corpus}", "--passages: for the texts of a --run"),
        ("retrieve --run {others} --index {index}", "1 questions that are not in the file of questions, such as 'q99'"),
        (
            "retrieve --run {missing} --index {index}",
            "1 of 2 passages of the run are not among the passages",
        ),
        ("retrieve --run {none} --index {index}", "no such file"),
        ("retrieve --index {index} --qrels {run}", "run:1: 6 fields; a line of qrels"),
        ("rerank {run} --reranker r --index {index}", "--index: for the texts of a TREC run; give its --questions"),
        ("rerank {run} --reranker r --passages {corpus}", "--passages: for the texts of a TREC run"),
    ],
)
def test_refusals_are_one_line(beir: Path, tmp_path: Path, command: str, message: str) -> None:
    files = {"run": "q2 Q0 d3 1 0.5 x\n", "others": "q99 Q0 d3 1 0.5 x\n", "missing": "q1 Q0 x 1 1 x\nq1 Q0 d1 2 0 x\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = {name: tmp_path / name for name in (*files, "none")}
    words = command.format(**names, index=beir / "index", corpus=beir / "corpus.jsonl").split()
    if words[0] == "retrieve":
        words += ["--questions", str(beir / "queries.jsonl")]
    result = run(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
