"""A matrix of runs: its cells, and what is done of them when."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.comparison import matrix as module
from genpoe_plugin.comparison.leaderboard import compare
from genpoe_plugin.comparison.matrix import read_matrix, run_matrix
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import lock_file
from genpoe_plugin.prompts import EXPERT_MODES

DOCS = documents(8, passages=2)
FULL = """
out: {out}
tasks: t
options: {{device: cpu, batch_size: 4, metadata: {{genpoe_data: {data}}}}}
models:
  m: {{pretrained: llm, hypernetwork: experts}}
  hf: {{model: hf, pretrained: llm}}
modes: [closed_book, rag, genpoe, genpoe_rag]
passages: [retrieved, gold, shuffled, random, constant, none]
num_passages: [1, 2, 4]
seeds: [0, 1, 2]
"""


def declare(tmp_path: Path, text: str = FULL) -> Path:
    (tmp_path / "data.jsonl").write_text("{}")
    path = tmp_path / "matrix.yaml"
    path.write_text(text.format(out=tmp_path / "out", data=tmp_path / "data.jsonl"))
    return path


class LmEval:
    """Stands in for the subprocess module: lm_eval's command writes results as it would, or fails."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails: set[str] = set()

    def Popen(self, command: list[str], **options: object) -> SimpleNamespace:
        words = command[command.index("lm_eval") :]
        self.commands.append(words)
        options_of = dict(zip(words[1::2], words[2::2], strict=False))
        arguments = dict(pair.split("=") for pair in options_of["--model_args"].split(","))
        folder = Path(words[words.index("--output_path") + 1])
        if folder.name in self.fails:
            options["stdout"].write("Traceback\nValueError: no such thing\n")
            return SimpleNamespace(wait=lambda: 1)
        facts = None
        if options_of["--model"] == "genpoe":
            facts = genpoe_facts(
                arguments["mode"],
                arguments["passages"],
                int(arguments.get("num_passages", 4)),
                int(arguments.get("seed", 0)),
            )
        right = {"retrieved": 6, "gold": 8}.get(arguments.get("passages", ""), 1)
        em = [float(n < right) for n in range(8)]
        write_run(folder, {"em": em}, docs=DOCS, genpoe=facts, model_args=arguments, model=options_of["--model"])
        return SimpleNamespace(wait=lambda: 0)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> LmEval:
    stand_in = LmEval()
    monkeypatch.setattr(module, "subprocess", stand_in)
    monkeypatch.setattr(module, "checkpoint_fingerprint", lambda name: f"fingerprint of {name}")
    return stand_in


def test_every_different_cell_is_there_once(tmp_path: Path) -> None:
    """By the meaning of the controls, not by how they are left out."""
    matrix = read_matrix(declare(tmp_path))
    expected = {("closed_book", "none", None, None)}
    for mode in ("rag", *EXPERT_MODES):
        expected.add((mode, "none", None, None))
        expected |= {(mode, "constant", None, seed) for seed in range(3)}
        for number in (1, 2, 4):
            expected |= {(mode, control, number, None) for control in ("retrieved", "gold")}
            expected |= {(mode, control, number, seed) for control in ("shuffled", "random") for seed in range(3)}
    found = [
        tuple(cell.arguments.get(name) for name in ("mode", "passages", "num_passages", "seed"))
        for cell in matrix.cells
        if cell.kind == "genpoe"
    ]
    assert len(found) == len(set(found)) == 85 and set(found) == expected
    assert [cell.arguments for cell in matrix.cells if cell.kind == "hf"] == [{"pretrained": "llm"}]
    assert len({cell.name for cell in matrix.cells}) == 86


def test_the_command_is_what_one_would_type(tmp_path: Path) -> None:
    matrix = read_matrix(declare(tmp_path))
    cell = next(cell for cell in matrix.cells if cell.name == "m-genpoe-shuffled-K2-seed1")
    words = matrix.command(cell)
    options = dict(zip(words[1::2], words[2::2], strict=False))
    assert options["--model"] == "genpoe" and options["--tasks"] == "t" and options["--batch_size"] == "4"
    folder = tmp_path / "out" / cell.name
    assert dict(pair.split("=") for pair in options["--model_args"].split(",")) == {
        "pretrained": "llm",
        "hypernetwork": "experts",
        "mode": "genpoe",
        "passages": "shuffled",
        "num_passages": "2",
        "seed": "1",
        "trace": str(folder / "trace.jsonl"),
    }
    assert json.loads(options["--metadata"]) == {"genpoe_data": str(tmp_path / "data.jsonl")}
    assert words[-3:] == ["--log_samples", "--output_path", str(folder)]
    assert shlex.split(shlex.join(words)) == words


def test_what_is_there_is_not_run_again(tmp_path: Path, lm_eval: LmEval) -> None:
    matrix = read_matrix(declare(tmp_path))
    lm_eval.fails = {"m-rag-gold-K2"}
    with pytest.raises(InputError, match=r"m-rag-gold-K2: lm_eval stopped with status 1 \(ValueError: no such thing\)"):
        run_matrix(matrix, jobs=2)
    assert len(lm_eval.commands) == 86
    lm_eval.fails.clear()
    (killed,) = (matrix.out / "m-genpoe-none").rglob("samples_*.jsonl")
    killed.write_bytes(killed.read_bytes()[:-20])
    lm_eval.commands.clear()
    run_matrix(matrix)
    assert {Path(words[-1]).name for words in lm_eval.commands} == {"m-rag-gold-K2", "m-genpoe-none"}
    lm_eval.commands.clear()
    run_matrix(matrix)
    assert lm_eval.commands == []
    comparison = compare([matrix.out], draws=50)
    assert not comparison.left_out
    (board,) = comparison.boards
    assert sum(len(system.runs) for system in board.systems) == 86
    assert {len(system.runs) for system in board.systems if system.control in ("shuffled", "random", "constant")} == {3}


def test_a_name_that_is_too_long_for_a_file_is_a_name_of_the_hub(tmp_path: Path, lm_eval: LmEval) -> None:
    name = "9" * 5000
    text = f"out: {{out}}\ntasks: t\nmodels:\n  m: {{{{pretrained: '{name}', modes: [closed_book]}}}}\n"
    run_matrix(read_matrix(declare(tmp_path, text)))
    assert len(lm_eval.commands) == 1 and f"pretrained={name}," in " ".join(lm_eval.commands[0])


@pytest.mark.parametrize("what", ["data", "batch_size", "experts", "reranker_format"])
def test_a_folder_of_another_matrix_is_refused(
    tmp_path: Path, lm_eval: LmEval, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = FULL.replace("[closed_book, rag, genpoe, genpoe_rag]", "[genpoe]").replace("[1, 2, 4]", "[1]")
    template = tmp_path / "format.json"
    template.write_text("{}")
    text = text.replace("hypernetwork: experts", f"hypernetwork: experts, reranker: r, reranker_format: {template}")
    run_matrix(read_matrix(declare(tmp_path, text)))
    lm_eval.commands.clear()
    path = declare(tmp_path, text.replace("batch_size: 4", "batch_size: 5") if what == "batch_size" else text)
    if what == "data":
        (tmp_path / "data.jsonl").write_text("{} ")
    if what == "reranker_format":
        template.write_text("{} ")
    if what == "experts":
        monkeypatch.setattr(module, "checkpoint_fingerprint", lambda name: "another")
    with pytest.raises(InputError, match=r"made with another .*give another `out`, or delete it"):
        run_matrix(read_matrix(path))
    assert lm_eval.commands == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("models: [", "not YAML"),
        ("- a", "not a mapping"),
        ("tasks: t", "models: name at least one"),
        ("models: {m: {pretrained: a}}", "tasks: name at least one task"),
        ("models: {m: {pretrained: a}}\ntasks: t\nmods: [rag]", "mods: not one of"),
        ("models: {m: {pretrained: a}}\ntasks: t\nmodes: [ragg]", "modes: ragg: not one of closed_book"),
        ("models: {m: {pretrained: a}}\ntasks: t\nmodes: rag", "modes: give a list"),
        (
            "models: {m: {pretrained: a}}\ntasks: t\nmodes: [rag]\nnum_passages: [0]",
            "num_passages: 0: give a whole number of at least 1",
        ),
        ("models: {m: {pretrained: a}}\ntasks: t\nmodes: [genpoe]", "mode genpoe needs hypernetwork"),
        ("models: {m: {pretrained: 'a,b'}}\ntasks: t\nmodes: [rag]", "has a comma"),
        ("models: {m: {pretrained: a}}\ntasks: t\noptions: {limits: 3}", "options: limits: not one of"),
        ("models: {'a b': {model: hf}, a_b: {model: hf, x: 1}}\ntasks: t", "two of them would write to the folder a_b"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, wrong: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(wrong)
    with pytest.raises(InputError) as caught:
        read_matrix(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_ctrl_c_stops_the_runs(tmp_path: Path, lm_eval: LmEval, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would go on, and the command would wait for them."""
    stopped = threading.Event()

    class Endless:
        def wait(self) -> int:
            assert stopped.wait(60)
            return -9

        def kill(self) -> None:
            stopped.set()

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_eval, "Popen", lambda command, **options: Endless())
    monkeypatch.setattr(module, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"finished runs are saved; rerun the same command to resume"):
        run_matrix(read_matrix(declare(tmp_path)))
    assert stopped.is_set() and not (tmp_path / ".out.lock").exists()


def test_finished_runs_need_no_lock(tmp_path: Path, lm_eval: LmEval, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they can be compared in a folder that cannot be written; after a kill, the lock file is removed."""
    matrix = read_matrix(declare(tmp_path))
    run_matrix(matrix)
    lock_file(matrix.out).touch()
    run_matrix(matrix)
    assert not lock_file(matrix.out).exists()
    monkeypatch.setattr(module, "only_writer", None)
    run_matrix(matrix)
