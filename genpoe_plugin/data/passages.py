"""Passages, and readers for files of passages."""

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
from genpoe_plugin.files import numbered_lines, open_text, refuse_pickles

RESULTS_FORMAT, RESULTS_VERSION = "genpoe-retrieval", 1

# Names of the id field: in our and DPR's results, in BEIR, and in DPR's retriever data (NQ and the other data sets).
_ID_FIELDS = ("id", "_id", "passage_id", "psg_id")
# The beginning of a JSON list, bare or as DPR's gold passages and SQuAD have it; other JSON files are JSON Lines.
_LIST = re.compile(r'\[|\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that can be retrieved.

    Attributes:
        id: id of the passage, unique in its corpus.
        title: title, which may be empty.
        text: text.
    """

    id: str
    title: str
    text: str

    @property
    def string(self) -> str:
        """``title: text``, or the text alone without a title: the input of reranker, hypernetwork, prompt and store."""
        return f"{self.title}: {self.text}" if self.title else self.text


def read_passages(path: str | Path) -> Iterator[Passage]:
    """Read passages one by one, in file order, from any of these formats, each also as ``.gz``.

    - TSV like DPR's ``psgs_w100.tsv``: ``id<TAB>text<TAB>title``, quoted as CSV, one passage per line, with or without
      a header line;
    - JSON Lines of ``{"id" or "_id", "title", "text"}``, such as BEIR's ``corpus.jsonl``, or of Pyserini's ``{"id",
      "contents"}``, whose contents are all text;
    - DPR results, as JSON Lines (ours too) or as one JSON list of ``{"question", "answers", "ctxs": [...]}``: the
      passages of all questions, without duplicates. A passage is a duplicate if an earlier one has the same title and
      text, with the same id or another one.

    The format is detected from the content.

    Raises:
        InputError: a line is malformed, a passage has no id or no text, or two passages of a DPR result have one id.
            In the other formats, `check_corpus` checks that ids are unique.
    """
    for passage, _ in located_passages(path):
        yield passage


def located_passages(path: str | Path) -> Iterator[tuple[Passage, str]]:
    """As `read_passages`, but each passage with its location, such as ``file:line``."""
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
                raise InputError(
                    f"{ctx_where}: id {passage.id!r} is already the id of another passage; make ids unique"
                )
            if digest not in texts:
                texts.add(digest)
                yield passage, ctx_where


def passage_from_record(record: Mapping[str, Any], where: str) -> Passage:
    """The passage in a JSON object.

    Args:
        record: the JSON object.
        where: location of the object, for error messages.

    Raises:
        InputError: the object has no valid id, title or text.
    """
    identifier = next((record[field] for field in _ID_FIELDS if field in record), None)
    if not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        raise InputError(f'{where}: the "id" of a passage must be a string or a whole number, not {identifier!r}')
    title, text = record.get("title") or "", record.get("text", record.get("contents"))
    if not isinstance(title, str) or not isinstance(text, str):
        raise InputError(f'{where}: the "text" of passage {identifier!r} (and its "title", if any) must be a string')
    if not text.strip():
        raise InputError(f"{where}: passage {identifier!r} has no text; remove it")
    passage = Passage(str(identifier), title, text)
    check_characters(f"{passage.id}{title}{text}", where)
    return passage


def passage_from_ctx(record: Mapping[str, Any], where: str) -> Passage:
    """As `passage_from_record`, for a passage of a question; a missing id is computed from the content."""
    if all(record.get(field) is None for field in _ID_FIELDS):
        record = {**record, "id": content_id(str(record.get("title") or ""), str(record.get("text")))}
    return passage_from_record(record, where)


def content_id(title: str, text: str) -> str:
    """An id computed from a passage's title and text."""
    return blake2b(f"{title}\0{text}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


def check_characters(text: str, where: str) -> None:
    """Raise an `InputError` for NUL characters and lone surrogates, which tokenizers and writers do not accept."""
    if "\0" in text:
        raise InputError(f"{where}: NUL character; the file is damaged")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {error.object[error.start]!r} is a lone surrogate; the file is damaged") from error


def beginning(path: str | Path) -> str:
    """The beginning of a text file after leading white space; "" if the file has nothing else."""
    with open_text(path) as file:
        while text := file.read(1000):
            if stripped := text.lstrip():
                return stripped
    return ""


def read_tsv_rows(path: str | Path) -> Iterator[tuple[list[str], str]]:
    """The non-blank rows of a tab-separated, CSV-quoted file, each with its ``file:line``.

    A row is one line, so that an unclosed quote does not swallow the following rows.
    """
    for number, line in numbered_lines(path):
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

    The list may also be the value of ``"data"``, as in ``{"data": [...]}`` or ``{"version": "v2.0", "data": [...]}``.
    Objects are read one at a time. The header line of our own result files is checked and skipped.

    Raises:
        InputError: the file is not JSON, an item is not an object, or a result file has another version.
    """
    if _LIST.match(beginning(path)):
        with open_text(path) as file:
            yield from _objects(read_json_list(file, path), str(path))
        return
    for number, line in numbered_lines(path):
        if not line.isspace():
            record = _parse(line.rstrip(), f"{path}:{number}")
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: expected one JSON object per line")
            if record.get("format") != RESULTS_FORMAT:
                yield record, f"{path}:{number}"
            elif record.get("version") != RESULTS_VERSION:
                raise InputError(
                    f"{path}:{number}: version {record.get('version')!r} of {RESULTS_FORMAT};"
                    f" only version {RESULTS_VERSION} is supported"
                )


def json_objects(items: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects of a parsed JSON list, each with its location: ``where`` and its position, from 1.

    Raises:
        InputError: it is not a list of objects.
    """
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
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error  # or a number of too many digits
        raise InputError(f"{where}: not JSON ({reason})") from error


def _read_tsv(path: str | Path) -> Iterator[tuple[Passage, str]]:
    columns = ["id", "text", "title"]
    for number, (row, where) in enumerate(read_tsv_rows(path)):
        if number == 0 and sorted(row) == sorted(columns):
            columns = row
        elif len(row) != len(columns):
            raise InputError(f"{where}: {len(row)} fields; a passage is id<TAB>text<TAB>title")
        else:
            yield passage_from_record(dict(zip(columns, row, strict=True)), where), where
