from __future__ import annotations

import json

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.selection.pipeline import Selection
from genpoe_plugin.selection.trace import Trace


def selection(task: str, question: str) -> Selection:
    kept = RetrievedPassage(Passage("p2", "Zürich", "text"), 0.5, 2, rerank_score=3.0, rerank_rank=1, has_answer=True)
    other = RetrievedPassage(Passage("p1", "", "text"), 0.75, 1, rerank_score=-1.0, rerank_rank=2, has_answer=False)
    return Selection(task, Question(question, ("a",)), (kept, other), (kept,), ("Zürich: text",), (1.0,))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_all(tmp_path):
    trace = Trace(tmp_path / "trace.jsonl")
    trace.add(7, selection("nq", "who"), mode="genpoe", hypernetwork="abc")
    trace.write()
    (line,) = read(tmp_path / "trace.jsonl")
    kept = {"id": "p2", "rank": 2, "score": 0.5, "rerank_rank": 1, "rerank_score": 3.0, "has_answer": True}
    other = {"id": "p1", "rank": 1, "score": 0.75, "rerank_rank": 2, "rerank_score": -1.0, "has_answer": False}
    assert line == {
        "task": "nq",
        "doc_id": 7,
        "question": "who",
        "mode": "genpoe",
        "hypernetwork": "abc",
        "retrieved": [kept, other],
        "passages": [{**kept, "title": "Zürich", "words": 1, "gate": 1.0}],
    }


def test_calls_add_up_and_a_new_run_replaces(tmp_path):
    path = tmp_path / "sub" / "trace.jsonl"
    trace = Trace(path)
    trace.add(0, selection("nq", "who"))
    trace.add(0, selection("nq", "who"))
    trace.write()
    trace.add(0, selection("tqa", "who"))
    trace.write()
    assert [line["task"] for line in read(path)] == ["nq", "tqa"], "one line a sample"
    again = Trace(path)
    again.add(1, selection("nq", "who"))
    again.write()
    assert [line["doc_id"] for line in read(path)] == [1]
    assert [file.name for file in path.parent.iterdir()] == ["trace.jsonl"], "no temporary file is left"


def test_every_process_has_its_own_file(tmp_path):
    trace = Trace(tmp_path / "trace.jsonl", rank=2)
    trace.add(0, selection("nq", "who"))
    trace.write()
    assert len(read(tmp_path / "trace.rank2.jsonl")) == 1


def test_processes_join_their_lines_in_the_order_of_one(tmp_path):
    first, second = (Trace(tmp_path / "trace.jsonl", rank) for rank in (0, 1))
    for task in ("tqa", "nq"):
        for trace, docs in ((first, (0, 2)), (second, (1, 1))):
            for doc in docs:
                trace.add(doc, selection(task, "who"))
            trace.write()
        first.join([first.lines, second.lines])
        second.join(None)
    assert [(line["task"], line["doc_id"]) for line in read(tmp_path / "trace.jsonl")] == [
        (task, doc) for task in ("tqa", "nq") for doc in range(3)
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["trace.jsonl"]


def test_what_was_asked_otherwise_has_a_line_of_its_own(tmp_path):
    trace = Trace()
    for asked, prompt in (("a", "Q"), ("b", ""), ("a", "Knowledge: Q")):
        trace.add(0, selection("nq", "who"), prompt_hash=asked, prompt=prompt)
    trace.write()
    trace.write(tmp_path / "out" / "trace.jsonl")
    assert [line["prompt"] for line in read(tmp_path / "out" / "trace.jsonl")] == ["Knowledge: Q", ""]


def test_without_a_file_processes_join_their_lines_all_the_same():
    first, second = Trace(), Trace(rank=1)
    second.add(0, selection("nq", "who"))
    first.add(1, selection("nq", "who"))
    first.join([first.lines, second.lines])
    second.join(None)
    assert [json.loads(line)["doc_id"] for line in first.lines.values()] == [0, 1]


def test_lines_of_an_earlier_run_are_replaced_in_their_place():
    earlier, trace = Trace(), Trace()
    lines = [earlier.add(doc, selection("nq", "who"), mode="rag") for doc in (0, 1)]
    trace.keep(lines)
    trace.add(0, selection("nq", "who"), mode="genpoe")
    assert [(line["doc_id"], line["mode"]) for line in map(json.loads, trace.lines.values())] == [
        (0, "genpoe"),
        (1, "rag"),
    ]
