"""A few damaged files for every reader, and readers with faults that the fuzzer must find."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.fuzz import readers, runs
from benchmarks.fuzz.readers import READERS, Reader
from benchmarks.fuzz.runs import Finding, fuzz
from genpoe_plugin.errors import InputError

INPUTS = {"lm-eval": 3, "trace": 3, "checkpoint": 8}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name: str) -> None:
    inputs = INPUTS.get(name, 15)
    results = list(fuzz(name, inputs=inputs))
    assert [seed for seed, _ in results] == list(range(inputs))
    assert [str(finding) for _, finding in results if finding is not None] == []


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    READERS[name].make(tmp_path / "valid")
    files = [path for path in sorted((tmp_path / "valid").rglob("*")) if path.is_file()]
    assert files
    for path in files[:1] if name in INPUTS else files:  # these read all files whichever is damaged, or take seconds
        shutil.copytree(tmp_path / "valid", tmp_path / "copy")
        READERS[name].read(tmp_path / "copy", tmp_path / "copy" / path.relative_to(tmp_path / "valid"))
        shutil.rmtree(tmp_path / "copy")


def _make(folder: Path) -> None:
    (folder / "file.json").write_text(json.dumps({"a": [1, {"b": "text"}], "c": 2.5}))


def _fail(folder: Path, path: Path) -> None:
    json.loads(path.read_bytes())["a"][1]["b"]


def _two_lines(folder: Path, path: Path) -> None:
    error = InputError("")
    error.args = ("two\nlines",)
    raise error


def _die(folder: Path, path: Path) -> None:
    import os

    os.abort()


def _allocate(folder: Path, path: Path) -> None:
    try:
        bytearray(4 * runs.MEMORY)
    except MemoryError as error:
        raise InputError(f"{path.name}: too large") from error


def _unpickle(folder: Path, path: Path) -> None:
    pickle.loads(pickle.dumps(Path))


def _write_outside(folder: Path, path: Path) -> None:
    (folder / "../outside").write_text("")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (_fail, "Error: "),
        (_two_lines, "not one printable line"),
        (_die, "the process died (SIGABRT)"),
        (_allocate, "needs more memory than"),
        (_unpickle, "pickle.find_class"),
        (_write_outside, "open "),
        (lambda folder, path: time.sleep(60), "not finished after"),
    ],
    ids=["exception", "two lines", "death", "memory", "pickle", "outside", "hang"],
)
def test_faults_are_found(read: Callable[[Path, Path], None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READERS, "faulty", Reader(_make, read))
    monkeypatch.setattr(runs, "PATIENCE", 3 if "finished" in said else 300)
    found = [finding for _, finding in fuzz("faulty", inputs=2 if "finished" in said else 8) if finding is not None]
    assert found and all(said in finding.problem for finding in found)


def test_an_input_is_repeated_by_its_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(READERS, "faulty", Reader(_make, _fail))
    found = [finding for _, finding in fuzz("faulty", inputs=12) if finding is not None]
    assert isinstance(found[0], Finding)
    for finding in found[:2]:
        assert [again for _, again in fuzz("faulty", first=finding.seed, inputs=1)] == [finding]
    arguments = ["fuzz", "--reader", "faulty", "--seed", str(found[0].seed), "--json", str(tmp_path / "rows.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and str(found[0]) in result.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert (rows["fuzz.inputs"]["value"], rows["fuzz.unexpected"]["value"]) == (1, 1)
    assert rows["fuzz.unexpected"]["holds"] is False


def test_the_time_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", {name: READERS[name] for name in ("trec", "reranker")})
    result = CliRunner().invoke(main, ["fuzz", "--seconds", "1"])
    assert result.exit_code == 0, result.output
    assert "trec: " in result.output and "reranker: " in result.output and "fuzz.unexpected" in result.output
    assert CliRunner().invoke(main, ["fuzz", "--reader", "nothing"]).exit_code == 2
    assert CliRunner().invoke(main, ["fuzz", "--seed", "1"]).exit_code == 2
