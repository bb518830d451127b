"""Every data set in every form that users have it in: the authors' files, the hub's Parquet files and rows of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from genpoe_plugin.data.passages import read_passages
from genpoe_plugin.data.questions import Question, read_questions, write_dpr_results, write_questions
from genpoe_plugin.errors import InputError
from tests.data_sets import (
    EXPECTED,
    EXPECTED_OF_OTHERS,
    HUB_ROWS,
    PARAGRAPH,
    TWO_WIKI_PARAGRAPHS,
    write_original,
    write_parquet,
)

DATA = Path(__file__).parents[3] / "shared/data"
ORIGINALS = ("squad", "narrativeqa", "hotpotqa", "2wiki", "mquake", "popqa")


def plain(questions: list[Question]) -> list[Any]:
    return [
        (
            question.question,
            list(dict.fromkeys(question.answers)),
            [(item.passage.title, item.passage.text, item.has_answer) for item in question.passages],
        )
        for question in questions
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_authors_files(tmp_path: Path, name: str) -> None:
    questions = list(read_questions(write_original(name, tmp_path)))
    assert plain(questions) == EXPECTED[name]
    assert [item.rank for item in questions[0].passages] == [*range(1, len(EXPECTED[name][0][2]) + 1)]


@pytest.mark.parametrize("name", ["squad", "hotpotqa", "popqa"])
def test_compressed(tmp_path: Path, name: str) -> None:
    path = write_original(name, tmp_path)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert plain(list(read_questions(packed))) == EXPECTED[name]


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_of_the_hub(tmp_path: Path, name: str) -> None:
    expected, need_answers = (EXPECTED | EXPECTED_OF_OTHERS)[name], name != "unanswerable"
    for path in (
        write_jsonl(tmp_path / "rows.jsonl", HUB_ROWS[name]),
        write_parquet(tmp_path / "rows", HUB_ROWS[name]),
    ):
        assert plain(list(read_questions(path, need_answers=need_answers))) == expected


def test_the_authors_file_of_squad_2(tmp_path: Path) -> None:
    """Questions without an answer are an error, unless they are asked for."""
    answered = {"question": "Who won?", "id": "1", "answers": [{"text": "Denver Broncos"}], "is_impossible": False}
    other = {
        **{"question": "Who lost Super Bowl 49?", "id": "2", "answers": [], "is_impossible": True},
        "plausible_answers": [{"text": "Carolina Panthers", "answer_start": 52}],
    }
    paragraph = {"context": PARAGRAPH, "qas": [answered, other]}
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Super_Bowl_50", "paragraphs": [paragraph]}]}))
    assert plain(list(read_questions(path, need_answers=False))) == [
        ("Who won?", ["Denver Broncos"], [("Super Bowl 50", PARAGRAPH, True)]),
        ("Who lost Super Bowl 49?", [], [("Super Bowl 50", PARAGRAPH, False)]),
    ]
    with pytest.raises(InputError, match="a question needs a list of answer strings"):
        list(read_questions(path))


def test_both_answers_of_a_conflict_are_kept(tmp_path: Path) -> None:
    questions = list(read_questions(write_jsonl(tmp_path / "rows.jsonl", HUB_ROWS["conflict"])))
    assert questions[0].original_answers == ("Denver Broncos", "Broncos")
    for write in (write_questions, write_dpr_results):
        write(tmp_path / "again", questions)
        assert list(read_questions(tmp_path / "again")) == questions


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_those_of_the_text(tmp_path: Path, name: str) -> None:
    """So the passages of all questions can be indexed, and a passage of several questions is one."""
    again = [
        *read_questions(write_original(name, tmp_path)),
        *read_questions(write_jsonl(tmp_path / "r", HUB_ROWS[name])),
    ]
    write_questions(tmp_path / "results.jsonl", again)
    passages = {(title, text) for _, _, ctxs in EXPECTED[name] for title, text, _ in ctxs}
    if not passages:
        return
    read = list(read_passages(tmp_path / "results.jsonl"))
    assert Counter((passage.title, passage.text) for passage in read) == Counter(passages)
    assert len({passage.id for passage in read}) == len(passages)


def test_the_wordings_of_a_case_are_told_from_other_cases(tmp_path: Path) -> None:
    (row,) = HUB_ROWS["mquake"]
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "case_id": 7}])
    questions = list(read_questions(path))
    assert [question.case for question in questions] == ["1561", "1561", "7", "7"]
    for write in (write_questions, write_dpr_results):
        write(tmp_path / "results.json", questions)
        assert list(read_questions(tmp_path / "results.json")) == questions
    assert "case" not in json.loads(path.with_name("results.json").read_text())[0]["ctxs"][0]


def test_what_has_passages_of_its_own_is_left_alone(tmp_path: Path) -> None:
    """Results made from a data set keep its other fields in some tools."""
    ctx = {"id": "7", "title": "T", "text": "t", "score": "1", "has_answer": False}
    (row,) = HUB_ROWS["hotpotqa"]
    (question,) = read_questions(write_jsonl(tmp_path / "q.jsonl", [{**row, "ctxs": [ctx]}]))
    assert [item.passage.id for item in question.passages] == ["7"]


@pytest.mark.parametrize(
    "other",
    [
        {"paragraphs": [{"idx": 0, "paragraph_text": "x"}]},
        {"document": "x"},
        {"context": "x"},
        {"case": 7},
        {"supporting_facts": []},
    ],
)
def test_fields_that_other_data_has_change_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "q", "answers": ["a"], **other}])
    assert list(read_questions(path)) == [Question("q", ("a",))]


def without(name: str, *fields: str) -> dict[str, Any]:
    return {key: value for key, value in HUB_ROWS[name][0].items() if key not in fields}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("squad", "title"), r"not a valid record of SQuAD \(KeyError: 'title'\)"),
        ({**without("squad"), "answers": {"text": []}}, "a question needs a list of answer strings"),
        ({"title": "T", "paragraphs": [{"context": "c"}]}, r"SQuAD's file \(KeyError: 'qas'\)"),
        (without("hotpotqa", "answer"), r"HotpotQA or 2WikiMultihopQA \(KeyError: 'answer'\)"),
        ({**without("2wiki"), "context": [["T", ["s"], 3]]}, r"2WikiMultihopQA \(ValueError: "),
        ({**without("2wiki"), "answer": None}, "a question needs a list of answer strings"),
        ({**without("narrativeqa"), "document": {}}, r"NarrativeQA \(KeyError: 'summary'\)"),
        (without("mquake", "new_answer"), r"MQuAKE \(KeyError: 'new_answer'\)"),
        ({**without("mquake"), "requested_rewrite": [7]}, r"MQuAKE \(TypeError: "),
        ({**without("popqa"), "possible_answers": "politician"}, r"PopQA \(JSONDecodeError: "),
        ({**without("popqa"), "question": ""}, "a question must be a non-empty string"),
        ({**without("tqa"), "answer": {}}, r"TriviaQA \(KeyError: 'value'\)"),
    ],
)
def test_a_malformed_record_is_one_line_with_its_place(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "q", "answers": ["a"]}, row])
    with pytest.raises(InputError, match=rf"q\.jsonl:2: .*{message}") as caught:
        list(read_questions(path))
    assert "\n" not in str(caught.value)


def test_a_broken_table_of_popqa(tmp_path: Path) -> None:
    path = write_original("popqa", tmp_path)
    path.write_text(path.read_text() + "1\tx\n")
    with pytest.raises(InputError, match=r"popQA\.tsv:3: 2 fields, but the first line has 17 columns"):
        list(read_questions(path))


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "q.parquet", HUB_ROWS["squad"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"q\.parquet: not a complete Parquet file") as caught:
        list(read_questions(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("qaps.csv", None, r"qaps\.csv: no such file; a folder of questions must be a clone of deepmind/narrativeqa"),
        ("qaps.csv", lambda text: text.replace("answer1,", "answer,"), r"qaps\.csv: no column 'answer1'"),
        ("qaps.csv", lambda text: text + "x,test\n", r"qaps\.csv:4: fewer fields"),
        ("qaps.csv", lambda text: text.replace("0025577", "9"), r"qaps\.csv:3: document '9043.*' has no summary"),
        ("third_party/wikipedia/summaries.csv", lambda text: text + 'x,test,"y', r"summaries\.csv:\d+: broken quoting"),
    ],
)
def test_a_broken_folder_of_narrativeqa(tmp_path: Path, file: str, edit: Any, message: str) -> None:
    folder = write_original("narrativeqa", tmp_path)
    path = folder / file
    if edit is None:
        path.unlink()
    else:
        path.write_bytes(edit(path.read_bytes().decode()).encode())
    with pytest.raises(InputError, match=message) as caught:
        list(read_questions(folder))
    assert "\n" not in str(caught.value)


def test_a_case_of_letters_outside_ascii(tmp_path: Path) -> None:
    """Bytes are UTF-8 whatever the machine's own encoding."""
    (title, _), *_ = TWO_WIKI_PARAGRAPHS
    (question,) = read_questions(write_original("2wiki", tmp_path))
    assert question.passages[0].passage.title == title == "Xawery Żuławski"


@pytest.mark.skipif(not DATA.exists(), reason="the real questions (../shared/data) are not here")
def test_the_real_squad() -> None:
    questions = list(read_questions(DATA / "squad/squad-v1.1-part.json.gz"))
    assert len(questions) == 4961
    assert all(question.answers[0] in question.passages[0].passage.text for question in questions)
    assert questions[0].passages[0].passage.string.startswith("Super Bowl 50: Super Bowl 50 was an American football")
