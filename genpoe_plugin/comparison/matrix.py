"""A matrix of runs, declared in YAML and run with the ``lm_eval`` command, each distinct cell once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm import tqdm

from genpoe_plugin.arguments import ARGUMENTS, DEFAULTS, NON_DECIDING
from genpoe_plugin.checkpoints.checkpoint import checkpoint_fingerprint
from genpoe_plugin.comparison.runs import QuestionBook, read_runs
from genpoe_plugin.comparison.settings import deciding, key
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, file_digest, lock_file, only_writer, writing
from genpoe_plugin.json_text import read_json
from genpoe_plugin.prompts import EXPERT_MODES
from genpoe_plugin.retrieval.loading import index_directories

_VARIED = {"modes": "mode", "passages": "passages", "num_passages": "num_passages", "seeds": "seed"}
AXES: dict[str, Any] = {axis: [DEFAULTS[argument]] for axis, argument in _VARIED.items()}
"""The axes of a matrix, with their defaults; a model may have its own axes."""
OPTIONS = (
    *("batch_size", "max_batch_size", "device", "num_fewshot", "limit", "gen_kwargs", "metadata", "seed"),
    *("apply_chat_template", "system_instruction", "fewshot_as_multiturn", "include_path"),
)
"""Options of lm_eval that a matrix may set."""
_KEYS = ("out", "tasks", "options", "model_args", "models", *AXES)
_OURS = ("genpoe", "genpoe-vllm")
MOST_VALUES = 100_000  # of a matrix
_COLLECTIONS = (dict, list, set, tuple, bytes)
_LARGE = 1 << 24  # bytes; larger files in a folder (an LLM's weights) are compared by size only
RESUME_ADVICE = "finished runs are saved; rerun the same command to resume"
_LOG, _CELL = "lm_eval.log", "cell.json"


@dataclass(frozen=True)
class Cell:
    """One lm_eval run.

    Attributes:
        name: name of its folder.
        kind: value of lm_eval's ``--model``.
        arguments: lm_eval's ``--model_args``.
    """

    name: str
    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Matrix:
    """A matrix of runs.

    Attributes:
        out: folder of the results.
        tasks: tasks of all cells.
        options: lm_eval options of all cells.
        cells: the cells.
    """

    out: Path
    tasks: tuple[str, ...]
    options: dict[str, Any]
    cells: tuple[Cell, ...]

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's results."""
        return self.out / cell.name

    def command(self, cell: Cell) -> list[str]:
        """The words of a cell's lm_eval command."""
        arguments = cell.arguments | ({"trace": self.folder(cell) / "trace.jsonl"} if cell.kind in _OURS else {})
        words = ["lm_eval", "--model", cell.kind, "--model_args", _pairs(arguments), "--tasks", ",".join(self.tasks)]
        for name, value in self.options.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not False and value is not None:
                words += [f"--{name}", _option(name, value)]
        return [*words, "--log_samples", "--output_path", str(self.folder(cell))]


def _option(name: str, value: Any) -> str:
    if name == "metadata":
        return json.dumps(value, default=str)
    return _pairs(value) if isinstance(value, dict) else str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


def read_matrix(path: Path) -> Matrix:
    """Read a matrix from a YAML file.

    Raises:
        InputError: it is not YAML, or a value is invalid.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
        # Aliases of aliases are small in the file, and of any size in a command.
        if _size(declared, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, or one that contains itself")
        json.dumps(declared, ensure_ascii=False, default=str).encode()
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not YAML of a matrix ({' '.join(str(error).split())})") from error
    if not isinstance(declared, dict):
        raise InputError(f"{path}: not a mapping; docs/leaderboards.md has an example")
    _check_names(declared, _KEYS, str(path))
    if not isinstance(models := declared.get("models"), dict) or not models:
        raise InputError(f"{path}: models: name at least one, with its arguments (pretrained: ...)")
    tasks = declared.get("tasks")
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise InputError(f"{path}: tasks: name at least one task of lm_eval")
    options = _mapping(declared.get("options"), f"{path}: options")
    _check_names(options, OPTIONS, f"{path}: options")
    shared = _mapping(declared.get("model_args"), f"{path}: model_args")
    cells: dict[tuple[str, str], Cell] = {}
    if not isinstance(out := declared.get("out") or f"{path.stem}-runs", str) or "\0" in out:
        raise InputError(f"{path}: out: {out!r} is not the name of a folder")
    for name, model in models.items():
        model = _mapping(model, f"{path}: models: {name}")
        axes = {axis: model.pop(axis, declared.get(axis, default)) for axis, default in AXES.items()}
        kind = model.pop("model", "genpoe")
        for cell in _cells(str(name), kind, shared | model, axes, f"{path}: models: {name}"):
            cells.setdefault((cell.kind, key(cell.arguments)), cell)
    return Matrix(Path(out), tuple(tasks), options, _with_distinct_names(list(cells.values()), path))


def write_matrix(path: Path, declared: Mapping[str, Any]) -> Matrix:
    """Write a matrix to a YAML file, for ``genpoe compare --run``, and read it.

    Raises:
        InputError: a value is invalid.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")
    return read_matrix(path)


def _size(value: Any, sizes: dict[int, float]) -> float:
    """The number of values in a value with its aliases as copies; infinite if one contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf  # until it is known: here it contains itself
        inner = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(item, sizes) for item in inner)
    return sizes[id(value)]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r} is not a mapping")
    return dict(value)


def _check_names(mapping: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    if unknown := [name for name in mapping if name not in names]:
        raise InputError(f"{where}: {unknown[0]}: not one of {', '.join(names)}")


def _cells(name: str, kind: str, arguments: Mapping[str, Any], axes: Mapping[str, Any], where: str) -> list[Cell]:
    if not isinstance(kind, str):
        raise InputError(f"{where}: model: {kind!r} is not the name of a model class of lm_eval")
    if set(name) <= {"."} or len(name) > 150:
        raise InputError(f"{where}: cannot be the name of a folder; give the model another name")
    for argument, value in arguments.items():
        if not isinstance(argument, str) or isinstance(value, _COLLECTIONS) or "\0" in f"{argument}{value}":
            raise InputError(f"{where}: {argument!r}: {value!r} cannot be an argument of a command")
        if "," in str(value):
            raise InputError(f"{where}: {argument}: {value!r} has a comma, at which lm_eval would split it")
    if kind not in _OURS:
        return [Cell(_file_name(name), kind, dict(arguments))]
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: {axis}: give a list")
        for value in values:
            if wrong := ARGUMENTS[_VARIED[axis]].wrong_with(value):
                raise InputError(f"{where}: {axis}: {value}: {wrong}")
    cells = []
    for mode, passages, number, seed in product(*(axes[axis] for axis in AXES)):
        if mode in EXPERT_MODES and not arguments.get("hypernetwork"):
            raise InputError(f"{where}: mode {mode} needs hypernetwork: DIRECTORY; or give this model other modes")
        complete = {**arguments, "mode": mode, "passages": passages, "num_passages": number, "seed": seed}
        decides = deciding(complete)
        used = {
            argument: value for argument, value in complete.items() if argument in decides or argument in NON_DECIDING
        }
        words = [name, mode] + ([passages] if mode != "closed_book" else [])
        words += [f"K{number}"] if "num_passages" in decides else []
        words += [f"seed{seed}"] if "seed" in decides else []
        cells.append(Cell(_file_name("-".join(words)), kind, used | {"passages": decides["passages"]}))
    return cells


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=+-]", "_", name)


def _with_distinct_names(cells: Sequence[Cell], path: Path) -> tuple[Cell, ...]:
    """The cells, after a check that their names differ."""
    names = [cell.name for cell in cells]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: models: two of them would write to the folder {twice[0]}; give them other names")
    return tuple(cells)


def run_matrix(matrix: Matrix, jobs: int = 1) -> None:
    """Run every cell without complete results, ``jobs`` at a time. A failed cell does not stop the others.

    Waits while another process runs the same matrix.

    Raises:
        InputError: a folder holds another run than the matrix declares, cells have failed, or ``out`` cannot be
            written.
        KeyboardInterrupt: interrupted; unfinished runs are stopped.
    """
    inputs: dict[str, str] = {}
    definitions = {cell.name: _definition(matrix, cell, inputs) for cell in matrix.cells}
    finished = all(_is_done(matrix, cell, definitions[cell.name]) for cell in matrix.cells)
    if finished and not lock_file(matrix.out).exists():
        return  # `out` may be a folder that cannot be written
    failed: list[str] = []
    with only_writer(matrix.out, wait=lambda: _say_waiting(matrix)) as lock, writing(matrix.out, RESUME_ADVICE):
        missing = [cell for cell in matrix.cells if not _is_done(matrix, cell, definitions[cell.name])]
        title = f"Running lm_eval ({len(matrix.cells) - len(missing)} of {len(matrix.cells)} runs are finished)"
        processes = _Processes(lock.fileno(), jobs)
        with (
            ThreadPoolExecutor(jobs) as pool,
            tqdm(total=len(missing), desc=title, unit="run", disable=not missing) as bar,
        ):
            futures = [pool.submit(_run, matrix, cell, definitions[cell.name], processes) for cell in missing]
            try:
                for future in as_completed(futures):
                    if problem := future.result():
                        failed.append(problem)
                        bar.write(f"failed: {problem}", file=sys.stderr)
                    bar.update()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                processes.stop()
                if isinstance(error, KeyboardInterrupt):
                    raise KeyboardInterrupt(f"interrupted; {RESUME_ADVICE}") from error
                raise
    if failed:
        others = f" ({len(failed) - 1} more failed)" if failed[1:] else ""
        raise InputError(f"{failed[0]}{others}; rerun the same command to resume")


@dataclass
class _Processes:
    """The running lm_eval processes.

    Attributes:
        lock: descriptor of the lock, which they inherit: if this process is killed alone, they still write.
        jobs: the largest number of them.
    """

    lock: int
    jobs: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, command: Sequence[str], output: TextIO) -> int:
        """Run a command to its end, and return its exit status."""
        process = subprocess.Popen(
            command,
            env=processors_of_one(self.jobs),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            pass_fds=[self.lock],
        )
        self.running.append(process)
        if self.stopped.is_set():
            process.kill()
        return process.wait()

    def stop(self) -> None:
        """Kill all processes, which lose only unfinished runs."""
        self.stopped.set()
        for process in self.running:
            process.kill()


def _say_waiting(matrix: Matrix) -> None:
    print(f"{matrix.out}: waiting for the end of another process that runs this matrix", file=sys.stderr)


def processors_of_one(jobs: int) -> dict[str, str]:
    """The environment of one of ``jobs`` parallel processes, which share the processors."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return environment


def is_finished(matrix: Matrix, cell: Cell) -> bool:
    """Whether a cell has complete results.

    Raises:
        InputError: its folder holds another run than the matrix declares.
    """
    return os.path.exists(matrix.folder(cell)) and _is_done(matrix, cell, _definition(matrix, cell, {}))


def _definition(matrix: Matrix, cell: Cell, known: dict[str, str]) -> dict[str, Any]:
    """The definition of a cell's results: its command, and digests of the files that it names.

    Args:
        matrix: the matrix.
        cell: the cell.
        known: digests by path; new ones are added.
    """
    named = ("pretrained", "index", "reranker", "reranker_format", "peft")
    paths = {name: value for name, value in cell.arguments.items() if name in named}
    paths |= {f"metadata {name}": value for name, value in _files(matrix.options.get("metadata") or {})}
    contents = {}
    for name, value in paths.items():
        if value not in known:
            parts = index_directories(value) if name == "index" else [Path(str(value))]
            known[value] = "+".join(map(_content, parts))
        contents[name] = known[value]
    if checkpoint := cell.arguments.get("hypernetwork"):
        if checkpoint not in known:
            known[checkpoint] = checkpoint_fingerprint(checkpoint)
        contents["hypernetwork"] = known[checkpoint]
    return {"command": matrix.command(cell), "contents": contents}


def _files(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [file for key_, inner in value.items() for file in _files(inner, f"{name}.{key_}".lstrip("."))]
    return [(name, value)] if isinstance(value, str) and os.path.isfile(value) else []


def _content(path: Path) -> str:
    """A digest of a file or folder; a hub name is returned unchanged."""
    # Unlike those of Path, these two are also false for a name that is too long for a file.
    if os.path.isfile(path):
        return file_digest(path)
    if not os.path.isdir(path):
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = file.stat().st_size
        content = file_digest(file) if size < _LARGE else ""
        digest.update(f"{file.relative_to(path)}\0{size}\0{content}\n".encode())
    return digest.hexdigest()


def _is_done(matrix: Matrix, cell: Cell, definition: Mapping[str, Any]) -> bool:
    folder = matrix.folder(cell)
    if not os.path.exists(folder) or not [file for file in folder.iterdir() if not file.name.startswith(".")]:
        return False
    try:
        existing = read_json(folder / _CELL)
        recorded, command = existing["contents"], _without_device(existing["command"])
        contents = definition["contents"]
        different = [name for name in contents if recorded.get(name) != contents[name]]
        if command != _without_device(definition["command"]):
            different.append(f"command ({shlex.join(command)})")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: not a run of a matrix; give another `out`, or delete it") from error
    if different:
        raise InputError(f"{folder}: made with another {', '.join(different)}; give another `out`, or delete it")
    return _problem(folder) is None


def _without_device(command: Sequence[str]) -> list[str]:
    """A command without its ``--device``, because a matrix may be resumed on another machine."""
    place = command.index("--device") if "--device" in command else len(command)
    return [*command[:place], *command[place + 2 :]]


def _problem(folder: Path) -> str | None:
    """The problem with the results in a folder; None if they are complete."""
    try:
        _, left_out = read_runs([folder], QuestionBook())
    except InputError as error:
        return str(error)
    return f"{left_out[0].path}: {left_out[0].reason}" if left_out else None


def _run(matrix: Matrix, cell: Cell, definition: Mapping[str, Any], processes: _Processes) -> str | None:
    """Run a cell; return the problem if it failed."""
    folder = matrix.folder(cell)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with atomic_file(folder / _CELL) as temporary:
        temporary.write_text(json.dumps(definition, indent=1) + "\n", encoding="utf-8")
    log = folder / _LOG
    with log.open("w", encoding="utf-8") as output:
        status = processes.run([sys.executable, "-m", *matrix.command(cell)], output)
    if status:
        return f"{cell.name}: lm_eval stopped with status {status} ({_last_line(log)}); see {log}"
    problem = _problem(folder)
    return f"{cell.name}: {problem}; see {log}" if problem else None


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"
