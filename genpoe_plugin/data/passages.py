"""Passages, and the files that they come from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from genpoe_plugin.data.json_list import read_json_list
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import open_text, refuse_pickles

RESULTS_FORMAT, RESULTS_VERSION = "genpoe-retrieval", 1

# Who gives a passage its id calls it so: ours and DPR's results, BEIR, and DPR's retriever data (NQ and the others).
_ID_FIELDS = ("id", "_id", "passage_id", "psg_id")
# One JSON list, bare or as DPR's gold passages have it; anything else is JSON Lines.
_LIST = re.compile(r'\[|\{\s*"data"\s*:\s*\[')


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that can be retrieved. ``id`` is unique in its corpus; ``title`` may be empty."""

    id: str
    title: str
    text: str

    @property
    def string(self) -> str:
        """``title: text``, or the text alone: what reranker, hypernetwork, prompt and expert store all see."""
        return f"{self.title}: {self.text}" if self.title else self.text


def read_passages(path: str | Path) -> Iterator[Passage]:
    """Read passages one by one, in file order, from any of these files, each also as ``.gz``.

    - TSV as DPR's ``psgs_w100.tsv``: ``id<TAB>text<TAB>title``, quoted as CSV, one passage a line, with or without the
      header line;
    - JSON Lines of ``{"id" or "_id", "title", "text"}``;
    - DPR results, as JSON Lines (ours too) or as one JSON list of ``{"question", "answers", "ctxs": [...]}``: every
      question's passages. Several questions have the same passage there, so a passage comes once: an id that returns
      with the same title and text is left out, and so is a copy of an earlier title and text under another id.

    The kind of file is seen from its content.

    Raises:
        InputError: a line is malformed, a passage has no id or no text, or one id stands for two passages of a DPR
            result. That ids are unique in the other files is for `check_corpus` to see.
    """
    for passage, _ in located_passages(path):
        yield passage


def located_passages(path: str | Path) -> Iterator[tuple[Passage, str]]:
    """As `read_passages`, each passage with its ``file:line``, or what else tells where it is."""
    refuse_pickles(path)
    if not (start := beginning(path)):
        raise InputError(f"{path}: the file is empty; give a file of passages")
    if start[0] not in "{[":
        yield from _read_tsv(path)
        return
    ids: dict[str, bytes] = {}
    texts: set[bytes] = set()
    for record, where in read_json_objects(path):
        if "ctxs" not in record:
            yield passage_from_record(record, where), where
            continue
        for ctx, ctx_where in json_objects(record["ctxs"], f'{where}, "ctxs"'):
            passage = passage_from_ctx(ctx, ctx_where)
            digest = blake2b(f"{passage.title}\0{passage.text}".encode(), digest_size=16).digest()
            if ids.setdefault(passage.id, digest) != digest:
                raise InputError(f"{ctx_where}: id {passage.id!r} already stands for another passage; make ids unique")
            if digest not in texts:
                texts.add(digest)
                yield passage, ctx_where


def passage_from_record(record: Mapping[str, Any], where: str) -> Passage:
    """The passage in one JSON object; ``where`` (file and line) begins the message of the ``InputError``."""
    identifier = next((record[field] for field in _ID_FIELDS if field in record), None)
    if not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        raise InputError(f'{where}: a passage needs an "id", a string or a whole number, not {identifier!r}')
    title, text = record.get("title") or "", record.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        raise InputError(f'{where}: passage {identifier!r} needs a "text" (and perhaps a "title") that is a string')
    if not text.strip():
        raise InputError(f"{where}: passage {identifier!r} has no text; remove it")
    passage = Passage(str(identifier), title, text)
    check_characters(f"{passage.id}{title}{text}", where)
    return passage


def passage_from_ctx(record: Mapping[str, Any], where: str) -> Passage:
    """As `passage_from_record`, for a passage of a question: without an id, its content gives it one."""
    if all(record.get(field) is None for field in _ID_FIELDS):
        record = {**record, "id": content_id(str(record.get("title") or ""), str(record.get("text")))}
    return passage_from_record(record, where)


def content_id(title: str, text: str) -> str:
    """An id that the same passage always gets."""
    return blake2b(f"{title}\0{text}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


def check_characters(text: str, where: str) -> None:
    """Raise an ``InputError`` for characters that mark a damaged file and that no tokenizer or writer takes."""
    if "\0" in text:
        raise InputError(f"{where}: NUL character; the file is damaged")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {error.object[error.start]!r} is half a character (a lone surrogate)") from error


def beginning(path: str | Path) -> str:
    """The first characters of a text file, from the first that is not white space on; "" if there is none."""
    with open_text(path) as file:
        while text := file.read(1000):
            if stripped := text.lstrip():
                return stripped
    return ""


def read_tsv_rows(path: str | Path) -> Iterator[tuple[list[str], str]]:
    """The rows of a tab-separated, CSV-quoted file that are not blank, each with its ``file:line``.

    A row is one line: a quote that its line does not close would otherwise swallow the rows that follow.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                (row,) = csv.reader([line], delimiter="\t", strict=True)
            except csv.Error as error:
                raise InputError(f"{where}: broken quoting ({error}); quote fields as CSV does, on one line") from error
            yield row, where


def read_json_objects(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects of a JSON Lines file, each with its ``file:line``, or of a JSON list, each with its position.

    A list may also be the value of ``"data"``, as in ``{"data": [...]}``. One object at a time is in memory. The first
    line of our own result files, which names format and version, is checked and left out.
    """
    if _LIST.match(beginning(path)):
        with open_text(path) as file:
            yield from _objects(read_json_list(file, path), str(path))
        return
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                record = _parse(line.rstrip(), f"{path}:{number}")
                if not isinstance(record, dict):
                    raise InputError(f"{path}:{number}: expected one JSON object a line")
                if record.get("format") != RESULTS_FORMAT:
                    yield record, f"{path}:{number}"
                elif record.get("version") != RESULTS_VERSION:
                    raise InputError(
                        f"{path}:{number}: version {record.get('version')!r} of {RESULTS_FORMAT};"
                        f" version {RESULTS_VERSION} is what can be read here"
                    )


def json_objects(items: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects of a parsed JSON list, each with its position, counted from 1, after ``where``."""
    if not isinstance(items, list | tuple):
        raise InputError(f"{where}: expected a list of JSON objects")
    yield from _objects(items, where)


def _objects(items: Iterable[Any], where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise InputError(f"{where}, item {number}: expected a JSON object")
        yield item, f"{where}, item {number}"


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise InputError(f"{where}: not JSON (nested too deeply)") from error


def _read_tsv(path: str | Path) -> Iterator[tuple[Passage, str]]:
    columns = ["id", "text", "title"]
    for number, (row, where) in enumerate(read_tsv_rows(path)):
        if number == 0 and sorted(row) == sorted(columns):
            columns = row
        elif len(row) != len(columns):
            raise InputError(f"{where}: {len(row)} fields; a passage is id<TAB>text<TAB>title")
        else:
            yield passage_from_record(dict(zip(columns, row, strict=True)), where), where
