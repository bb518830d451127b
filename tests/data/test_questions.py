from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import (
    Question,
    RetrievedPassage,
    passages_from_ctxs,
    read_header,
    read_questions,
    write_dpr_results,
    write_questions,
)
from genpoe_plugin.errors import InputError

DATA = Path(__file__).parents[3] / "shared/data"
CTX = {"id": "wiki:7", "title": "Opera", "text": "Rossini wrote it.", "score": "81.25", "has_answer": True}
RETRIEVED = RetrievedPassage(Passage("wiki:7", "Opera", "Rossini wrote it."), 81.25, 1, has_answer=True)
RESULT = {"question": "who wrote it", "answers": ["Rossini", "G. Rossini"], "ctxs": [CTX]}
QUESTION = Question("who wrote it", ("Rossini", "G. Rossini"), (RETRIEVED,))
POOLS = {
    "question": "who wrote it",
    "answers": ["Rossini"],
    "positive_ctxs": [{"title": "Opera", "text": "Gioachino wrote it.", "score": 1000, "passage_id": "7"}],
    "negative_ctxs": [{"title": "", "text": "Rossini again.", "score": 0, "psg_id": 9}],
    "hard_negative_ctxs": [{"title": "Verdi", "text": "Verdi did not.", "score": 8.5, "psg_id": "8"}],
}
POOLED = (
    RetrievedPassage(Passage("7", "Opera", "Gioachino wrote it."), 1000.0, 1, has_answer=True),
    RetrievedPassage(Passage("8", "Verdi", "Verdi did not."), 8.5, 2, has_answer=False),
    RetrievedPassage(Passage("9", "", "Rossini again."), 0.0, 3),
)
GOLD = {"question": "who", "short_answers": ["Rossini"], "example_id": 5, "title": "Opera", "context": "Rossini did."}
PLAIN = Question("who wrote it", ("Rossini", "G. Rossini"))
QAS = "who wrote it\t['Rossini', 'G. Rossini']\n"


def write(path: Path, text: str) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "question"),
    [
        ("results.json", json.dumps([RESULT], indent=4), QUESTION),
        ("results.json.gz", json.dumps([RESULT]), QUESTION),
        ("results.jsonl", json.dumps(RESULT) + "\n", QUESTION),
        ("results.jsonl.gz", json.dumps(RESULT), QUESTION),
        ("nq-test.qas.csv", QAS, PLAIN),
        ("nq-test.qas.tsv.gz", QAS, PLAIN),
        ("nq_open.jsonl", json.dumps({"question": "who wrote it", "answer": ["Rossini", "G. Rossini"]}), PLAIN),
        ("biencoder.json", json.dumps([POOLS]), Question("who wrote it", ("Rossini",), POOLED)),
        (
            "gold_info.json.gz",
            json.dumps({"data": [{**GOLD, "short_answers": []}, GOLD], "version": 1}, indent=1),
            Question("who", ("Rossini",), (RetrievedPassage(Passage("5", "Opera", "Rossini did."), 0.0, 1),)),
        ),
        ("gold_info.json", json.dumps({"data": [{**GOLD, "context": ""}]}), Question("who", ("Rossini",))),
        ("one_answer.jsonl", json.dumps({"question": "q", "answer": "a"}), Question("q", ("a",))),
    ],
)
def test_formats(tmp_path: Path, name: str, text: str, question: Question) -> None:
    assert list(read_questions(write(tmp_path / name, text))) == [question]


def test_qas_quoting(tmp_path: Path) -> None:
    line = '''"""What is """"x""""?"""\t"['it\\'s', ""the one's""]"\n'''
    assert list(read_questions(write(tmp_path / "q.tsv", line))) == [
        Question('"What is ""x""?"', ("it's", "the one's")),
    ]


def test_answers_are_never_evaluated(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    line = f"q\t[__import__('pathlib').Path({str(canary)!r}).touch() or 'a']\n"
    with pytest.raises(InputError, match=r"q\.tsv:1: answers"):
        list(read_questions(write(tmp_path / "q.tsv", line)))
    assert not canary.exists()


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(str.strip)
passages = st.builds(Passage, texts, texts | st.just(""), texts)
retrieved = st.builds(
    RetrievedPassage,
    passages,
    numbers,
    st.integers(1, 100),
    st.none() | numbers,
    st.none() | st.integers(1, 100),
    st.none() | st.booleans(),
)
questions = st.builds(
    Question, texts, st.lists(texts, min_size=1).map(tuple), st.lists(retrieved, max_size=3).map(tuple)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(questions, max_size=4), st.sampled_from(["out.jsonl", "out.jsonl.gz"]))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, asked: list[Question], name: str
) -> None:
    path = tmp_path_factory.mktemp("questions") / name
    write_questions(path, asked, encoder="some/encoder")
    assert list(read_questions(path)) == asked


def test_written_lines_are_dpr_results_with_ranks(tmp_path: Path) -> None:
    reranked = RetrievedPassage(RETRIEVED.passage, 81.25, 4, rerank_score=-2.5, rerank_rank=1, has_answer=True)
    write_questions(tmp_path / "out.jsonl", [Question("q", ("a",), (reranked,))], num_retrieved=20)
    header, line = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert header == {"format": "genpoe-retrieval", "version": 1, "num_retrieved": 20}
    ctx = {**CTX, "score": 81.25, "rank": 4, "rerank_score": -2.5, "rerank_rank": 1}
    assert line == {"question": "q", "answers": ["a"], "ctxs": [ctx]}


@settings(max_examples=60, deadline=None)
@given(st.lists(questions, max_size=4), st.sampled_from(["out.json", "out.json.gz"]))
def test_dpr_results_are_one_list_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, asked: list[Question], name: str
) -> None:
    path = tmp_path_factory.mktemp("questions") / name
    write_dpr_results(path, asked)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = json.loads(content)
    assert [set(row) for row in rows] == [{"question", "answers", "ctxs"}] * len(asked)
    assert all(type(ctx["score"]) is str for row in rows for ctx in row["ctxs"])
    assert list(read_questions(path)) == asked


def test_dpr_results_have_dprs_fields_and_others_only_where_needed(tmp_path: Path) -> None:
    second = RetrievedPassage(Passage("8", "", "Verdi."), 80.5, 2, has_answer=False)
    write_dpr_results(tmp_path / "out.json", [Question("q", ("a",), (RETRIEVED, second))])
    (row,) = json.loads((tmp_path / "out.json").read_text())
    other = {"id": "8", "title": "", "text": "Verdi.", "score": "80.5", "has_answer": False}
    assert row == {"question": "q", "answers": ["a"], "ctxs": [CTX, other]}

    reranked = RetrievedPassage(second.passage, 80.5, 2, rerank_score=1.5, rerank_rank=1, has_answer=False)
    write_dpr_results(tmp_path / "out.json", [Question("q", ("a",), (reranked,))])
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["ctxs"] == [{**other, "rank": 2, "rerank_score": 1.5, "rerank_rank": 1}]


@pytest.mark.parametrize("writer", [write_questions, write_dpr_results])
def test_a_failed_write_leaves_nothing(tmp_path: Path, writer) -> None:
    def broken():
        yield PLAIN
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path / "out.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


def test_the_header_of_our_files_only(tmp_path: Path) -> None:
    write_questions(tmp_path / "ours.jsonl.gz", [PLAIN], encoder="e", questions=3)
    assert read_header(tmp_path / "ours.jsonl.gz") == {"encoder": "e", "questions": 3}
    others = (json.dumps(RESULT) + "\n", json.dumps([RESULT]), json.dumps([RESULT], indent=4), QAS, "", "[" * 9999)
    for text in others:
        assert read_header(write(tmp_path / "other", text)) == {}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["nq-test.json", "nq-test.json.gz"])
def test_a_pickle_is_refused_unread(tmp_path: Path, name: str, protocol: int) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    data = pickle.dumps([RESULT, Bomb()], protocol)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError, match=rf"{name}: a pickle, which is not read, .* JSON") as caught:
        list(read_questions(tmp_path / name))
    assert "\n" not in str(caught.value) and not (tmp_path / "canary").exists()


def test_ctxs_without_score_and_rank_keep_their_order() -> None:
    ctxs = [{"id": 1, "text": "a"}, {"id": 2, "text": "b", "score": None}]
    assert [(p.passage.id, p.score, p.rank, p.has_answer) for p in passages_from_ctxs(ctxs, "doc")] == [
        ("1", 0.0, 1, None),
        ("2", 0.0, 2, None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.tsv", QAS + "no tab here\n", r"q\.tsv:2: 1 fields; a line must be question<TAB>"),
        ("q.tsv", QAS + "q\t['a'\n", r"q\.tsv:2: answers"),
        ("q.tsv", QAS + "q\tRossini\n", r"q\.tsv:2: answers"),
        ("q.tsv", QAS + "q\t[1, 2]\n", r"q\.tsv:2: .*list of answer strings"),
        ("q.tsv", QAS + "q\t[]\n", r"q\.tsv:2: .*list of answer strings"),
        ("q.tsv", QAS + "\"q\t['a']\n" + QAS, r"q\.tsv:2: broken quoting"),
        ("q.tsv", QAS + " \t['a']\n", r"q\.tsv:2: a question"),
        ("q.tsv", QAS + "q\0\t['a']\n", r"q\.tsv:2: NUL"),
        ("q.jsonl", json.dumps(RESULT) + '\n{"question": "q"}\n', r"q\.jsonl:2: .*list of answer strings"),
        ("q.jsonl", '{"answers": ["a"]}\n', r"q\.jsonl:1: a question"),
        ("q.jsonl", '{"question": "q", "answers": ["a"], "ctxs": [\n', r"q\.jsonl:1: not JSON"),
        ("q.jsonl", json.dumps({**RESULT, "ctxs": {}}).replace("{}", "3"), r"q\.jsonl:1, \"ctxs\": expected a list"),
        ("q.jsonl", json.dumps({**RESULT, "ctxs": [{**CTX, "text": ""}]}), r"q\.jsonl:1, \"ctxs\", item 1: .*no text"),
        ("q.jsonl", json.dumps({**RESULT, "ctxs": [{**CTX, "score": "x"}]}), r"item 1: \"score\" must be a number"),
        ("q.jsonl", json.dumps({**RESULT, "ctxs": [{**CTX, "score": "nan"}]}), r"item 1: \"score\" must be a number"),
        ("q.jsonl", json.dumps({**RESULT, "ctxs": [{**CTX, "rank": 0}]}), r"item 1: \"rank\" must be a whole number"),
        ("q.jsonl", '{"format": "genpoe-retrieval", "version": 2}\n', r"q\.jsonl:1: version 2 .* version 1"),
        ("q.json", json.dumps([RESULT, {"question": ""}]), r"q\.json, item 2: a question"),
        ("q.json", f"[\n{json.dumps(RESULT)},\n{{]", r"q\.json:3: not JSON .*column 2\)"),
        ("q.json", json.dumps([RESULT])[:-1], r"q\.json:1: not JSON"),
        ("q.json", json.dumps({"data": [GOLD, {**GOLD, "title": 3}]}), r"q\.json, item 2, \"ctxs\", item 1: "),
        ("q.json", json.dumps([{**POOLS, "negative_ctxs": ["b"]}]), r"q\.json, item 1, \"negative_ctxs\", item 1"),
        ("q.json", "", r"q\.json: the file is empty"),
    ],
)
def test_malformed_input_is_one_line_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(read_questions(write(tmp_path / name, text)))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not DATA.exists(), reason="the real questions (../shared/data) are not here")
@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("nq/dpr-nq.dev.qas.tsv.gz", 8757, "who sings does he love me with reba"),
        ("tqa/dpr-trivia.dev.qas.tsv.gz", 8837, "The VS-300 was a type of what?"),
        ("nq/nq-open-gold-passages.jsonl.gz", 1800, "where does the band imagine dragons come from"),
    ],
)
def test_real_questions(name: str, count: int, first: str) -> None:
    questions = list(read_questions(DATA / name))
    assert len(questions) == count
    assert questions[0].question == first
