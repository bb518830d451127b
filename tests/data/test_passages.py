from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.errors import InputError

REAL = Path(__file__).parents[3] / "shared/data/nq/nq-open-gold-passages.jsonl.gz"
BARBER = Passage("1", "The Barber", 'Rossini wrote "The Barber" in 1816; naïve 東京.')
CURIE = Passage("2", "", "Marie Curie discovered radium.")
QUOTED = '"Rossini wrote ""The Barber"" in 1816; naïve 東京."'
TSV = f"id\ttext\ttitle\n1\t{QUOTED}\tThe Barber\n2\tMarie Curie discovered radium.\t\n"


def write(path: Path, text: str) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def test_string_is_title_and_text() -> None:
    assert BARBER.string == 'The Barber: Rossini wrote "The Barber" in 1816; naïve 東京.'
    assert CURIE.string == "Marie Curie discovered radium."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("psgs.tsv", TSV),
        ("psgs.tsv.gz", TSV),
        ("no_header.tsv", TSV.split("\n", 1)[1]),
        ("crlf.tsv", TSV.replace("\n", "\r\n")),
        ("blank_lines.tsv", TSV.replace("\n", "\n\n")),
        ("unquoted.tsv", TSV.replace(QUOTED, BARBER.text)),
        ("other_order.tsv", f"title\tid\ttext\nThe Barber\t1\t{QUOTED}\n\t2\t{CURIE.text}\n"),
    ],
)
def test_tsv(tmp_path: Path, name: str, text: str) -> None:
    assert list(read_passages(write(tmp_path / name, text))) == [BARBER, CURIE]


@pytest.mark.parametrize("name", ["passages.jsonl", "passages.jsonl.gz", "no_suffix"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [
        {"id": 1, "title": BARBER.title, "text": BARBER.text, "more": [1]},
        {"_id": "2", "text": CURIE.text},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    assert list(read_passages(write(tmp_path / name, text))) == [BARBER, CURIE]


characters = st.characters(exclude_categories=("Cs", "Cc"))
fields = st.text(characters, max_size=30)
texts = fields.filter(str.strip)
corpora = st.lists(st.builds(Passage, st.uuids().map(str), fields, texts), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(corpora)
def test_every_passage_survives_tsv_and_json(tmp_path_factory: pytest.TempPathFactory, corpus: list[Passage]) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerows([("id", "text", "title"), *((p.id, p.text, p.title) for p in corpus)])
    assert list(read_passages(write(directory / "p.tsv", buffer.getvalue()))) == corpus
    lines = "".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in corpus)
    assert list(read_passages(write(directory / "p.jsonl", lines))) == corpus


def test_dpr_results_give_each_passage_once(tmp_path: Path) -> None:
    a = {"id": "a", "title": "A", "text": "first", "score": "1.5", "has_answer": True}
    b = {"id": "b", "title": "B", "text": "second", "score": "0.5", "has_answer": False}
    copy_of_a = {**a, "id": "c"}
    results = [
        {"question": "q", "answers": ["x"], "ctxs": [a, b]},
        {"question": "r", "answers": ["y"], "ctxs": [b, copy_of_a]},
    ]
    expected = [Passage("a", "A", "first"), Passage("b", "B", "second")]
    assert list(read_passages(write(tmp_path / "r.json", json.dumps(results, indent=1)))) == expected
    lines = "\n".join(json.dumps(result) for result in results)
    assert list(read_passages(write(tmp_path / "r.jsonl", lines))) == expected
    header = json.dumps({"format": "genpoe-retrieval", "version": 1})
    assert list(read_passages(write(tmp_path / "ours.jsonl", f"{header}\n{lines}"))) == expected


def test_one_id_for_two_passages_of_a_result_is_refused(tmp_path: Path) -> None:
    ctxs = [{"id": "a", "text": "first"}, {"id": "a", "text": "second"}]
    line = json.dumps({"question": "q", "answers": ["x"], "ctxs": ctxs})
    with pytest.raises(InputError, match=r"r\.jsonl:1, \"ctxs\", item 2: id 'a' is already"):
        list(read_passages(write(tmp_path / "r.jsonl", line)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "id\ttext\ttitle\n1\tabc\tT\n2\tabc\n", r"a\.tsv:3: 2 fields; .*id<TAB>text<TAB>title"),
        ("a.tsv", "1\tabc\tT\n\n2\tabc\tT\tU\n", r"a\.tsv:3: 4 fields"),
        ("a.tsv", '1\tabc\tT\n2\t"abc\tT\n3\tdef\tU\n', r"a\.tsv:2: broken quoting"),
        ("a.tsv", '1\t"abc"d\tT\n', r"a\.tsv:1: broken quoting"),
        ("a.tsv", "1\tabc\tT\n2\ta\0c\tT\n", r"a\.tsv:2: NUL"),
        ("a.tsv", "1\tabc\tT\n2\t  \tT\n", r"a\.tsv:2: passage '2' has no text"),
        ("a.tsv", "1\tabc\tT\n\tabc\tT\n", r"a\.tsv:2: .*\"id\""),
        ("a.tsv.gz", "1\tabc\tT\n2\tabc\n", r"a\.tsv\.gz:2: 2 fields"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n\n{"id": 2, "text": "b"\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n[1]\n', r"a\.jsonl:2: expected one JSON object"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"text": "b"}\n', r"a\.jsonl:2: .*\"id\""),
        ("a.jsonl", '{"id": true, "text": "a"}\n', r"a\.jsonl:1: .*\"id\""),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": 2, "text": ""}\n', r"a\.jsonl:2: passage 2 has no text"),
        ("a.jsonl", '{"id": 1, "title": "a"}\n', r"a\.jsonl:1: .*\"text\""),
        ("a.jsonl", '{"id": 1, "title": 3, "text": "a"}\n', r"a\.jsonl:1: .*\"title\""),
        ("a.jsonl", '{"id": 1, "text": "a\\u0000b"}\n', r"a\.jsonl:1: NUL"),
        ("a.jsonl", '{"id": 1, "text": "a\\ud83d"}\n', r"a\.jsonl:1: .*is a lone surrogate"),
        ("a.jsonl", '{"ctxs": 3}\n', r"a\.jsonl:1, \"ctxs\": expected a list"),
        ("a.jsonl", '{"format": "genpoe-retrieval", "version": 9}\n', r"a\.jsonl:1: version 9"),
        ("a.json", '[\n{"ctxs": [\n', r"a\.json:3: not JSON"),
        ("a.json", '[{"ctxs": []}, 3]', r"a\.json, item 2: expected a JSON object"),
        ("a.tsv", " \n", r"a\.tsv: the file is empty"),
    ],
)
def test_malformed_input_is_one_line_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(read_passages(write(tmp_path / name, text)))
    assert "\n" not in str(caught.value)


def test_passages_before_a_malformed_line_are_read(tmp_path: Path) -> None:
    passages = read_passages(write(tmp_path / "a.tsv", "1\tabc\tT\nbroken\n"))
    assert next(passages) == Passage("1", "T", "abc")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tsv.gz", TSV * 100).read_bytes()
    (tmp_path / "a.tsv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.tsv").write_bytes(b"1\tab\xffc\tT\n")
    for name, message in [("a.tsv.gz", "gzip"), ("b.tsv", "UTF-8"), ("missing.tsv", "no such file")]:
        with pytest.raises(InputError, match=message):
            list(read_passages(tmp_path / name))


@pytest.mark.skipif(not REAL.exists(), reason="the real NQ passages (../shared/data) are not here")
def test_real_nq_passages() -> None:
    with gzip.open(REAL, "rt") as file:
        ctxs = [ctx for line in file for ctx in json.loads(line)["ctxs"]]
    passages = list(read_passages(REAL))
    assert len(ctxs) == 1800
    assert {(p.title, p.text) for p in passages} == {(ctx["title"], ctx["text"]) for ctx in ctxs}
    assert len(passages) == len({p.string for p in passages}) == len({p.id for p in passages})


@pytest.mark.parametrize("name", ["wikipedia_passages_0.pkl", "wikipedia_passages_0"])
def test_pickles_are_refused_with_advice(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps([("wiki:1", [0.5])]))
    with pytest.raises(InputError, match=rf"{name}: .*pickles.*data.wikipedia_split.psgs_w100.*genpoe index build"):
        next(read_passages(tmp_path / name))
