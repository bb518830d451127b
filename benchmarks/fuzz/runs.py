"""Run a reader on damaged files, each input by its seed, in child processes with limits of time and memory."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from benchmarks.fuzz.readers import READERS, damaged
from benchmarks.fuzz.watch import install, watching
from genpoe_plugin.errors import InputError

SECONDS = 20  # of a processor, for one input; the page of results needs two
PATIENCE = 300  # seconds of the clock for one input, on a machine with other work
MEMORY = 3 << 30  # bytes in excess of those before the first input; FAISS may allocate two thirds of it
INPUTS = 500  # per child process
LONGEST = 2500  # characters of an error message


@dataclass(frozen=True)
class Finding:
    """An input that a reader neither read nor refused in one line.

    Attributes:
        reader, seed: name of the reader and seed of the input.
        file: the damaged file.
        problem: the exception and where it was raised, or what happened to the process.
    """

    reader: str
    seed: int
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.reader} --seed {self.seed} ({self.file}): {self.problem}"


def attempt(name: str, valid: Path, seed: int, folder: Path) -> tuple[str, str | None]:
    """Damage a copy of valid files, and read them.

    Args:
        name: name of the reader.
        valid: folder with its valid files.
        seed: seed of the damage.
        folder: an empty folder for the copy.

    Returns:
        The damaged file, and the problem, which is None after a result or an `InputError` of one line.
    """
    rng = random.Random(f"{name} {seed}")
    reader = READERS[name]
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    path = damaged(reader, folder, rng)
    file = str(path.relative_to(folder))
    with watching(folder) as seen:
        try:
            reader.read(folder, path)
            problem = None
        except InputError as error:
            problem = _problem_of_message(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]} {_place(error)}"
    return file, problem or ", ".join(seen) or None


def _problem_of_message(error: InputError) -> str | None:
    message, cause = str(error), error
    if not message.isprintable() or not 0 < len(message) <= LONGEST:
        return f"not one printable line: {message[:200]!r} {_place(error)}"
    while (cause := cause.__cause__ or cause.__context__) is not None:
        if isinstance(cause, MemoryError) or "bad_alloc" in str(cause):
            return f"needs more memory than {MEMORY:,} bytes {_place(error)}"
    return None


def _place(error: BaseException) -> str:
    """The innermost line of this project that an exception came through."""
    places, step = [], error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if "genpoe_plugin" in code.co_filename or not places:
            places.append(f"{Path(code.co_filename).name}:{step.tb_lineno} in {code.co_name}")
        step = step.tb_next
    return f"[{places[-1]}]" if places else ""


def fuzz(
    name: str, *, first: int = 0, seconds: float | None = None, inputs: int | None = None
) -> Iterator[tuple[int, Finding | None]]:
    """Read damaged files with the reader ``name`` until ``seconds`` have passed, or for a number of ``inputs``.

    Args:
        name: name of the reader.
        first: seed of the first input; those of the others follow.

    Yields:
        The seed of each input, and what is wrong with it, if anything.
    """
    last = None if inputs is None else first + inputs
    with tempfile.TemporaryDirectory() as temporary:
        valid = Path(temporary) / "valid"
        valid.mkdir()
        READERS[name].make(valid)
        end = None if seconds is None else time.monotonic() + seconds
        seed = first
        while (end is None or time.monotonic() < end) and (last is None or seed < last):
            upto = seed + INPUTS if last is None else min(seed + INPUTS, last)
            for last_seed, finding in _in_child(name, valid, range(seed, upto), end):
                yield last_seed, finding
                seed = last_seed + 1


def _in_child(name: str, valid: Path, seeds: range, end: float | None) -> Iterator[tuple[int, Finding | None]]:
    """The results of a child process, which ends at the first input that it does not survive."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(name, valid, seeds, end, sending), daemon=True)
    child.start()
    sending.close()
    seed = seeds.start
    try:
        while _is_ready(receiving, child.pid or 0):
            seed, file, problem = receiving.recv()
            yield seed, None if problem is None else Finding(name, seed, file, problem)
            seed += 1
        yield seed, Finding(name, seed, "", f"not finished after {SECONDS} seconds")
    except EOFError:
        child.join()
        if child.exitcode:
            cause = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"status {child.exitcode}"
            yield seed, Finding(name, seed, "", f"the process died ({cause})")
    finally:
        child.kill()
        child.join()
        for folder in valid.parent.glob("input*"):  # of a child that was killed
            shutil.rmtree(folder, ignore_errors=True)


def _is_ready(results: Connection, process: int) -> bool:
    """Wait for a result of a process, or its end; false if it takes too long."""
    started, used = time.monotonic(), _seconds(process)
    while not results.poll(0.5):
        if _seconds(process) - used > SECONDS or time.monotonic() - started > PATIENCE:
            return False
    return True


def _seconds(process: int) -> float:
    """Processor time of a process, in seconds."""
    try:
        return sum(psutil.Process(process).cpu_times()[:2])
    except psutil.Error:  # it has ended
        return 0.0


def _work(name: str, valid: Path, seeds: range, end: float | None, results: Connection) -> None:
    """Run in the child process: read the inputs of ``seeds`` one by one."""
    install()
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bound = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    for seed in seeds:
        if end is not None and time.monotonic() >= end and seed > seeds.start:
            break
        folder = valid.parent / f"input{seed}"
        folder.mkdir()
        try:
            file, problem = attempt(name, valid, seed, folder)
        finally:
            with suppress(OSError):
                shutil.rmtree(folder)
        results.send((seed, file, problem))
    results.close()
    os._exit(0)  # without the exit handlers of the libraries, which are the parent's
