"""Read NarrativeQA from its authors' folder of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import numbered_lines

_CSV = {  # file: the columns that are read
    "documents.csv": ("document_id", "wiki_title"),
    "third_party/wikipedia/summaries.csv": ("document_id", "summary"),
    "qaps.csv": ("document_id", "set", "question", "answer1", "answer2"),
}


def read_narrativeqa(folder: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The test questions in the form of the hub's rows, each with its ``file:line`` (the end of its entry).

    Args:
        folder: a clone of deepmind/narrativeqa, with ``qaps.csv``, ``documents.csv`` and
            ``third_party/wikipedia/summaries.csv``.

    Raises:
        InputError: a file or a column is missing, or a question is about a document without a summary.
    """
    titles = {row["document_id"]: row["wiki_title"] for row, _ in _rows(folder, "documents.csv")}
    summaries = {row["document_id"]: row["summary"] for row, _ in _rows(folder, "third_party/wikipedia/summaries.csv")}
    for row, where in _rows(folder, "qaps.csv"):
        if row["set"] != "test":
            continue
        document = row["document_id"]
        if document not in summaries:
            raise InputError(f"{where}: document {document!r} has no summary in third_party/wikipedia/summaries.csv")
        yield (
            {
                "document": {"summary": {"text": summaries[document], "title": titles.get(document, "")}},
                "question": {"text": row["question"]},
                "answers": [{"text": row["answer1"]}, {"text": row["answer2"]}],
            },
            where,
        )


def _rows(folder: str | Path, name: str) -> Iterator[tuple[dict[str, str], str]]:
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path}: no such file; a folder of questions must be a clone of deepmind/narrativeqa")
    reader = csv.DictReader((line for _, line in numbered_lines(path)), strict=True)
    try:
        if missing := [column for column in _CSV[name] if column not in (reader.fieldnames or ())]:
            raise InputError(f"{path}: no column {missing[0]!r}; use the file of deepmind/narrativeqa")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in (row[column] for column in _CSV[name]):
                raise InputError(f"{where}: fewer fields than columns in the first line")
            yield row, where
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: broken quoting ({error})") from error
