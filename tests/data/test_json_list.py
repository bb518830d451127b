"""A JSON list read item by item, against the standard library's decoder given all of the text at once."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any, TextIO, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genpoe_plugin.data import json_list
from genpoe_plugin.data.json_list import MARGIN, read_json_list
from genpoe_plugin.errors import InputError

texts = st.text(st.characters(exclude_categories=()) | st.sampled_from('\\"\n[{,😀'), max_size=40)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


def read(text: str) -> list[Any]:
    return list(read_json_list(io.StringIO(text, newline=""), "x.json"))


@pytest.fixture(params=[1, 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So few characters at a time that nearly everything is cut somewhere."""
    monkeypatch.setattr(json_list, "CHUNK", request.param)
    return request.param


@settings(max_examples=60, deadline=None)
@given(
    st.lists(values, max_size=6),
    st.sampled_from([None, 1, 4]),
    st.booleans(),
    st.sampled_from([1, 7, 64]),
)
@example(["😀" * 20, -1.5e-300, True, float("inf")], None, True, 1)
def test_items_are_those_of_the_whole(items: list[Any], indent: int | None, ascii_only: bool, chunk: int) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "CHUNK", chunk)
        assert read(text) == json.loads(text)
        assert read(f' \r\n{{"data" :{text}, "version": [1]}}') == json.loads(text)


GOOD = json.dumps([{"a": [1, "x\n"], "b": -0.5}, {"d": "é😀" * 8}, {"e": None}], indent=1)


@pytest.mark.parametrize("character", ["}", "]", '"', ",", ":", "\\", "x", "\n", ""])
def test_errors_have_the_place_that_the_decoder_of_the_whole_gives(chunk: int, character: str) -> None:
    """One character replaced, or left out, anywhere."""
    wrong = 0
    for position in range(2, len(GOOD) - 2):
        text = GOOD[:position] + character + GOOD[position + 1 :]
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            wrong += 1
            with pytest.raises(InputError) as caught:
                read(text)
            # json_list and newer versions of Python differ in where they see a comma too many.
            if "comma" not in error.msg:
                assert str(caught.value) == f"x.json:{error.lineno}: not JSON ({error.msg}, column {error.colno})"
        else:
            assert read(text) == expected
    assert wrong > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: not JSON (no list, column 1)"),
        ('{"data": 3}\n', "2: not JSON (no list, column 1)"),
        ("[", "1: not JSON (Expecting value, column 2)"),
        ("[{}, ]", "1: not JSON (Expecting value, column 6)"),
        ("[{}\n{}]", "2: not JSON (Expecting ',' delimiter, column 1)"),
        ("[{}", "1: not JSON (Expecting ',' delimiter, column 4)"),
        ("[{}]\n[]", "2: not JSON (Extra data, column 1)"),
        ('[{"a": "b', "1: not JSON (Unterminated string starting at, column 8)"),
        ("[" * 100_000, "1: not JSON (nested too deeply, column 2)"),
    ],
)
def test_what_is_no_list_is_an_error_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert str(caught.value) == f"x.json:{message}"


class Endless(io.TextIOBase):
    """A file of items without an end, which counts the characters that are read."""

    def __init__(self, start: str, item: str) -> None:
        self.text = start + item * 20
        self.item = item
        self.read_so_far = 0

    def read(self, size: int | None = -1) -> str:
        assert size is not None and size > 0
        self.text += self.item * (size // len(self.item) + 1)
        text, self.text = self.text[:size], self.text[size:]
        self.read_so_far += size
        return text


def items(file: Endless) -> Iterator[Any]:
    return read_json_list(cast(TextIO, file), "x.json")


def test_no_more_is_read_ahead_than_a_chunk_or_an_item() -> None:
    item = json.dumps({"text": "word " * 2_000}) + ","
    file = Endless("[", item)
    for number, value in zip(range(1, 200), items(file), strict=False):
        assert value == {"text": "word " * 2_000}
        assert file.read_so_far <= number * len(item) + max(json_list.CHUNK, 2 * len(item)) + MARGIN


def test_an_error_is_raised_where_it_is_and_not_at_the_end_of_the_file() -> None:
    file = Endless('[{"a": 1}, {"b" 2}, ', '{"a": 1},')
    reading = items(file)
    assert next(reading) == {"a": 1}
    with pytest.raises(InputError, match=r"x\.json:1: not JSON \(Expecting ':' delimiter, column 17\)"):
        next(reading)
    assert file.read_so_far == json_list.CHUNK


def test_memory_does_not_grow_with_the_list() -> None:
    file = Endless("[", json.dumps({"text": "word " * 200}) + ",")
    reading = items(file)
    tracemalloc.start()
    for _ in range(4_000):
        next(reading)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.read_so_far > 4_000_000 > 8 * peak
