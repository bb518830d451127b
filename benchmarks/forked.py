"""Commands in forked processes: they begin at once, because this process has imported what they need."""

from __future__ import annotations

import atexit
import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

MODULES = (
    *("lm_eval._cli", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks", "sentence_transformers"),
    *("genpoe_plugin.lm.hf", "genpoe_plugin.comparison.page", "genpoe_plugin.comparison.leaderboard"),
    *("genpoe_plugin.comparison.matrix", "genpoe_plugin.comparison.output_files", "genpoe_plugin.indexing.encoding"),
    *(
        "genpoe_plugin.indexing.bm25_building",
        "genpoe_plugin.selection.rerankers",
        "genpoe_plugin.training.hypernetwork",
    ),
    *("genpoe_plugin.training.reranker", "genpoe_plugin.training.trials", "genpoe_plugin.training.validation"),
    *("train_cli.train_hypernetwork", "train_cli.train_reranker", "train_cli.compare", "train_cli.index"),
    *("train_cli.retrieve", "train_cli.rerank", "train_cli.experts"),
)


_OUTPUTS: list[TextIO] = []
"""The outputs of the forking process. If they were collected in a child, they would close the child's."""


@contextmanager
def prepared() -> Iterator[None]:
    """Import what the commands need. Nothing is computed here, so that no threads exist when a process is forked."""
    from genpoe_plugin import registration

    registration.install()
    for module in MODULES:
        import_module(module)
    gc.collect()
    gc.freeze()  # otherwise a collection in a child copies the memory of this process
    try:
        yield
    finally:
        gc.unfreeze()


class Forked:
    """A forked process.

    Args:
        work: what the process does; its exit status is that of ``python -c``.
        log: file for its output.
        own_group: whether it leads a new process group, or is in that of this process.
    """

    def __init__(self, work: Callable[[], object], log: Path, own_group: bool = True) -> None:
        self.log = log
        self.status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, log, own_group)
        self._file = os.pidfd_open(self.pid)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, negative for a signal, as `subprocess` has it; None if the process still runs."""
        if self.status is None and select.select([self._file], [], [], seconds)[0]:
            _, status, self.usage = os.wait4(self.pid, 0)
            os.close(self._file)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def signal_all(self, number: int) -> None:
        """Send a signal to the process and to all that it has started, as a terminal does for Ctrl-C."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has not called setsid yet
            os.kill(self.pid, number)

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process alone, as `subprocess.Popen.kill` does."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)


def _run(work: Callable[[], object], log: Path, own_group: bool) -> None:
    status = 1
    # They are of the forking process, and would delete its temporary folders.
    atexit._clear()
    try:
        if own_group:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _OUTPUTS.extend((sys.stdout, sys.stderr))
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        tqdm.set_lock(threading.RLock())  # another thread may hold the earlier one
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
