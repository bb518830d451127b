from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing import corpus
from genpoe_plugin.indexing.corpus import check_corpus

PASSAGES = [Passage("1", "Opera", "the barber"), Passage("2", "", 'a "quoted" word'), Passage("x", "東京", "naïve")]
TSV = 'id\ttext\ttitle\n1\tthe barber\tOpera\n2\t"a ""quoted"" word"\t\nx\tnaïve\t東京\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_digest_is_of_the_passages_not_of_their_file(tmp_path: Path) -> None:
    found = check_corpus(write(tmp_path / "p.tsv", TSV))
    assert found.count == 3
    (tmp_path / "p.tsv.gz").write_bytes(gzip.compress(TSV.encode()))
    lines = [json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in PASSAGES]
    for same in [tmp_path / "p.tsv.gz", write(tmp_path / "p.jsonl", "".join(lines)), PASSAGES]:
        assert check_corpus(same) == found
    others = [
        PASSAGES[:2],
        [PASSAGES[1], PASSAGES[0], PASSAGES[2]],
        [Passage("1", "Oper", "athe barber"), *PASSAGES[1:]],
        [Passage("y", "Opera", "the barber"), *PASSAGES[1:]],
    ]
    assert len({found.digest, *(check_corpus(other).digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('1\tabc\tT\n2\t"broken\tT\n3\tabc\tT\n', "p.tsv:2: broken quoting"),
        ("1\tabc\tT\n2\ta\0c\tT\n", "p.tsv:2: NUL character"),
        ("1\tabc\tT\n2\t  \tT\n", "p.tsv:2: passage '2' has no text"),
        ("id\ttext\ttitle\n7\tabc\tT\n\n8\tabc\tT\n7\tother\tU\n", "p.tsv:5: id '7' is also the id of .*p.tsv:2"),
        ("id\ttext\ttitle\n", "p.tsv: no passages"),
    ],
)
def test_a_malformed_file_is_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_corpus(write(tmp_path / "p.tsv", text))
    assert "\n" not in str(caught.value)


def test_the_first_repetition_is_named_among_many(tmp_path: Path) -> None:
    lines = [f"{number % 3000}\ttext\t\n" for number in range(5000)]
    with pytest.raises(InputError, match=r"p.tsv:3001: id '0' is also the id of .*p.tsv:1;") as caught:
        check_corpus(write(tmp_path / "p.tsv", "".join(lines[:3000] + lines[3000:3900])))
    assert "unique" in str(caught.value)
    check_corpus(write(tmp_path / "p.tsv", "".join(lines[:3000])))


def test_hashes_that_collide_are_no_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "hash", lambda text: len(text), raising=False)
    assert check_corpus(PASSAGES).count == 3
    with pytest.raises(InputError, match="passage 4: id '2' is also the id of passage 2"):
        check_corpus([*PASSAGES, Passage("2", "", "other")])
