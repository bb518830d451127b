"""The study of the whole pipeline: its corpus, its files of questions, and the runs that it declares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.real_llm import pipeline_data
from benchmarks.real_llm.pipeline import COUNTS, PURPOSES, matrix
from benchmarks.real_llm.pipeline_data import (
    DATA_SETS,
    PARAGRAPHS,
    WITH_PASSAGES,
    evaluated_file,
    needed_passages,
    retrieved_file,
    write_corpus,
    write_evaluated,
)
from benchmarks.real_llm.questions import NEGATIVES, with_hard_negatives
from genpoe_plugin.comparison.matrix import read_matrix
from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.errors import InputError
from train_cli.main import main as genpoe

SHARP = {"gates": "retriever", "gate_temperature": 0.25}


def ctx(number: int, text: str, **more: object) -> dict[str, object]:
    return {"id": str(number), "title": f"T{number}", "text": text, "score": "0", "has_answer": False, **more}


@pytest.fixture
def data(tmp_path):
    """A folder of data in which every file has one question and two passages, one of them the same in all."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, pattern in enumerate(WITH_PASSAGES):
        name = pattern.replace("*", "")
        own = {
            "question": f"q{number}?",
            "answers": ["blue"],
            "ctxs": [ctx(0, "shared"), ctx(number + 1, f"p {number}")],
        }
        if pattern == WITH_PASSAGES[1]:  # SQuAD's own form
            paragraph = {"context": "p 1", "qas": [{"question": "q1?", "answers": [{"text": "p"}]}]}
            text = json.dumps({"data": [{"title": "T2", "paragraphs": [paragraph]}]})
        else:
            text = json.dumps(own) + "\n"
        (folder / name).write_text(text)
    lines = [{"id": "1", "title": "T0", "text": "shared"}, {"id": "2", "title": "W", "text": "one\nmore"}]
    (folder / PARAGRAPHS.replace("*", "")).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_corpus_has_every_passage_once_and_is_not_written_twice(data, tmp_path):
    path = tmp_path / "corpus.tsv"
    write_corpus(data, path)
    passages = list(read_passages(path))
    own = {(f"T{number + 1}", f"p {number}") for number in range(len(WITH_PASSAGES))}
    assert len(passages) == len(own) + 2
    assert {(passage.title, passage.text) for passage in passages} == own | {("T0", "shared"), ("W", "one more")}
    assert [passage.id for passage in passages] == [str(number) for number in range(1, len(passages) + 1)]
    path.write_text("kept")
    write_corpus(data, path)
    assert path.read_text() == "kept"


def test_a_missing_data_set_is_named(data, tmp_path):
    next(data.glob("2wiki.dev*")).unlink()
    with pytest.raises(InputError, match=r"no 2wiki\.dev"):
        write_corpus(data, tmp_path / "corpus.tsv")


def retrieved(question: str, *found: bool) -> Question:
    passages = (
        RetrievedPassage(Passage(str(rank), "", f"text {rank}"), 1.0, rank, has_answer=answer)
        for rank, answer in enumerate(found, 1)
    )
    return Question(question, ("blue",), tuple(passages))


def test_the_first_questions_are_evaluated_and_of_trivia_those_that_the_corpus_answers(data, tmp_path):
    for name in DATA_SETS:
        questions = [retrieved("q4?", False), retrieved("b?", False, True), retrieved("c?", True)]
        write_questions(retrieved_file(tmp_path, name, "bm25"), questions)
    gold = [ctx(1, "is blue", gold=True), ctx(2, "not"), ctx(3, "is red", gold=True)]
    next(data.glob("hotpotqa_distractor*")).write_text(json.dumps({"question": "q4?", "answers": [], "ctxs": gold}))
    write_evaluated(data, tmp_path, tmp_path, "bm25", list(DATA_SETS), 2)
    evaluated = {
        name: [q.question for q in read_questions(evaluated_file(tmp_path, name, "retrieved"))] for name in DATA_SETS
    }
    assert evaluated == {name: ["b?", "c?"] if name == "tqa" else ["q4?", "b?"] for name in DATA_SETS}
    (both,) = read_questions(evaluated_file(tmp_path, "hotpotqa", "hops"))
    (other,) = read_questions(evaluated_file(tmp_path, "hotpotqa", "reversed"))
    assert [entry.passage.text for entry in both.passages] == ["is blue", "is red"]
    assert [entry.passage.text for entry in other.passages] == ["is red", "is blue"]
    assert [entry.has_answer for entry in both.passages] == [True, False]
    assert not evaluated_file(tmp_path, "2wiki", "hops").exists()  # none of its questions marks two passages
    write_evaluated(data, tmp_path, tmp_path, "bm25", ["nq"], 1)  # replaces files of another limit and data sets
    assert len(list(read_questions(evaluated_file(tmp_path, "nq", "retrieved")))) == 1
    assert not evaluated_file(tmp_path, "squad", "retrieved").exists()


def test_needed_passages_are_those_marked_gold(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({"question": "q", "ctxs": [ctx(1, "a"), ctx(2, "b", gold=True)]}) + "\n")
    assert needed_passages(path) == {"q": (Passage("2", "T2", "b"),)}


@pytest.mark.parametrize("purpose", PURPOSES)
def test_runs_are_a_matrix_of_compare(purpose, tmp_path):
    options = {"device": "cpu", "metadata": {"genpoe_data": {"genpoe_nq": "nq.jsonl"}}}
    path = tmp_path / "matrix.yaml"
    path.write_text(
        yaml.safe_dump(
            matrix(purpose, {"pretrained": "llm", "hypernetwork": "experts"}, COUNTS, SHARP, tmp_path, options)
        )
    )
    declared = read_matrix(path)
    assert declared.tasks == ("genpoe_nq",) and declared.out == tmp_path / purpose
    gates = {
        (cell.arguments.get("num_passages"), cell.arguments.get("gate_temperature"))
        for cell in declared.cells
        if cell.arguments["mode"] == "genpoe" and cell.arguments.get("passages") == "retrieved"
    }
    if purpose == "retrieved":
        assert gates == {*((count, None) for count in COUNTS), *((count, 0.25) for count in COUNTS[1:])}
        assert any(cell.arguments.get("passages") == "shuffled" for cell in declared.cells)
    else:
        assert gates == {(1, None), (2, None)}


def test_one_passage_needs_no_sharp_gates(tmp_path):
    declared = matrix("retrieved", {"pretrained": "llm"}, (1,), SHARP, tmp_path, {"metadata": {"genpoe_data": {}}})
    assert "sharp" not in declared["models"] and declared["models"]["rag"]["num_passages"] == [1]
    without = matrix("retrieved", {"pretrained": "llm"}, COUNTS, None, tmp_path, {"metadata": {"genpoe_data": {}}})
    assert "sharp" not in without["models"] and without["models"]["equal"]["num_passages"] == list(COUNTS)


def test_the_matrix_beside_the_results_is_that_of_the_command():
    file = Path(pipeline_data.__file__).parents[1] / "real" / "pipeline.yaml"
    files = {f"genpoe_{name}": f"PIPELINE/questions/{name}.retrieved.jsonl" for name in ("nq", "squad", "tqa")}
    options = {
        "device": "cpu",
        "batch_size": 20,
        "gen_kwargs": {"max_gen_toks": 16},
        "metadata": {"genpoe_data": files},
    }
    models = {"pretrained": "LLM", "hypernetwork": "EXPERTS", "dtype": "float32"}
    assert yaml.safe_load(file.read_text()) == matrix("retrieved", models, (1,), None, Path("PIPELINE"), options)


@pytest.mark.parametrize("counts", ["0", "1,x", ""])
def test_wrong_numbers_of_passages_are_refused(counts, tmp_path):
    words = ["--llm", "x", "--hypernetwork", "y", "--data", tmp_path, "--retrieval", "r", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, ["real-llm", "pipeline", *map(str, words), "--num-passages", counts])
    assert result.exit_code == 2 and "is not whole numbers from 1" in result.output


def test_hard_negatives_are_near_the_question_and_have_no_answer():
    words = (
        "river",
        "rivers",
        "the river bank",
        "river blue",
        "mountain",
        "sea",
        "lake",
        "hill",
        "wood",
        "field",
        "moor",
    )
    texts = [f"{word} number {number} of all" for number, word in enumerate(words)]
    questions = [
        Question(f"which {text}?", (f"{number}",), (RetrievedPassage(Passage(str(number), "", text), 0.0, 1),))
        for number, text in enumerate(texts)
    ]
    for question in with_hard_negatives(questions):
        own, *negatives = question.passages
        assert len(negatives) == NEGATIVES and own.passage.text in question.question
        assert not any(has_answer(entry.passage.text, question.answers) for entry in negatives)
        assert [entry.rank for entry in negatives] == list(range(2, 2 + NEGATIVES))
        assert all(entry.has_answer is False for entry in negatives)
    first = with_hard_negatives(questions)[0].passages[1:4]
    assert all("river" in entry.passage.text for entry in first)


def test_an_unknown_data_set_is_refused(tmp_path):
    words = ["--llm", "x", "--hypernetwork", "y", "--data", tmp_path, "--retrieval", "r", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, ["real-llm", "pipeline", *map(str, words), "--data-sets", "nq,trivia"])
    assert result.exit_code == 2 and "'trivia' is not one of nq, squad" in result.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_reranker_is_refused_before_anything_is_built(llm_dir, data, tmp_path):
    created = ["experts", "create", "--llm", str(llm_dir), "--layers", "0,2", "--out", str(tmp_path / "experts")]
    assert CliRunner().invoke(genpoe, created).exit_code == 0
    words = ["--llm", llm_dir, "--hypernetwork", tmp_path / "experts", "--data", data, "--reranker", llm_dir]
    words += ["--retrieval", tmp_path / "retrieval", "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, ["real-llm", "pipeline", *map(str, words)])
    assert result.exit_code == 2 and "--reranker-format" in result.output, result.output
    assert not (tmp_path / "retrieval").exists() and not (tmp_path / "out").exists()


def test_hybrid_retrieval_and_a_reranker(data, tmp_path, monkeypatch):
    """The commands of users: both indexes, retrieval over both, and the reranker over what is evaluated."""
    commands = []

    def run(*words):
        words = list(map(str, words))
        commands.append(words)
        if words[:2] == ["index", "build"]:
            Path(words[words.index("--out") + 1]).mkdir()
        elif words[0] == "retrieve":
            found = [retrieved("q0?", False, True, True), retrieved("q1?", True)]
            write_questions(words[words.index("--out") + 1], found)
        elif words[0] == "rerank":
            questions = [replace(one, passages=one.passages[::-1]) for one in read_questions(words[1])]
            write_questions(words[words.index("--out") + 1], questions)

    monkeypatch.setattr(pipeline_data, "run_genpoe", run)
    pipeline_data.retrieve(data, tmp_path, "hybrid", ["nq", "2wiki"], "minilm", "cpu")
    built = [words[words.index("--out") + 1] for words in commands[:2]]
    assert built == [str(tmp_path / "index"), str(tmp_path / "bm25")]
    indexes = {words[words.index("--index") + 1] for words in commands[2:]}
    assert indexes == {"+".join(built)} and len(commands) == 4
    write_evaluated(data, tmp_path, tmp_path, "hybrid", ["nq"], 1, 2)
    files = pipeline_data.rerank(tmp_path, ["nq", "squad"], "scorer", "likelihood", "cpu")
    assert files == {"nq": evaluated_file(tmp_path, "nq", "reranked")}
    (question,) = read_questions(files["nq"])
    assert [entry.passage.text for entry in question.passages] == ["text 2", "text 1"]
    assert commands[-1][:4] == ["rerank", str(evaluated_file(tmp_path, "nq", "retrieved")), "--reranker", "scorer"]
    assert commands[-1][-2:] == ["--reranker-format", "likelihood"]
