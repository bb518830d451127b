"""The commands of genpoe and lm_eval without a new interpreter each, which would take minutes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from threading import Lock
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lm_eval._cli
from lm_eval.tasks._index import TaskIndex

import train_cli.main
from genpoe_plugin.registration import install, task_folder


def started_by(run: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for `subprocess.Popen` whose processes are over at once, with what ``run`` returns."""

    def popen(command: list[str], **options: Any) -> Any:
        done = run(command, **options)
        return SimpleNamespace(wait=lambda: done.returncode, kill=lambda: None)

    return popen


class InProcess:
    """Stands in for the subprocess module."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self) -> None:
        install()
        self.commands: dict[str, list[list[str]]] = {"lm_eval": [], "train_cli": []}
        self._lock = Lock()

    def run(self, command: list[str], **options: Any) -> Any:
        python, dash_m, module, *arguments = command
        assert (python, dash_m) == (sys.executable, "-m")
        with self._lock:
            self.commands[module].append(command)
            if module == "lm_eval":
                self._evaluate(arguments)
            else:
                train_cli.main.main(arguments, standalone_mode=False)
        return SimpleNamespace(returncode=0)

    def Popen(self, command: list[str], **options: Any) -> Any:
        return started_by(self.run)(command, **options)

    @staticmethod
    def _evaluate(arguments: list[str]) -> None:
        build = TaskIndex.build
        with (
            patch.object(sys, "argv", ["lm_eval", *arguments]),
            patch.object(TaskIndex, "build", staticmethod(lambda _, **options: build([task_folder()], **options))),
            patch("torch.utils.collect_env.get_pretty_env_info", return_value="not asked"),
        ):
            parser = lm_eval._cli.HarnessCLI()
            parser.execute(parser.parse_args())
