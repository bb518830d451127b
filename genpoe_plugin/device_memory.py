"""The free memory of a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from genpoe_plugin.errors import InputError


def available_memory(device: str) -> int:
    """Free bytes of an accelerator's memory, or of the machine's memory within the limits of its cgroups.

    Raises:
        InputError: the device does not exist or cannot be used.
    """
    try:
        backend = getattr(torch, torch.device(device).type, None)
        if backend is not None and hasattr(backend, "mem_get_info"):
            return int(backend.mem_get_info(device)[0])
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: cannot be used ({str(error).strip().splitlines()[0]})") from error
    return min([psutil.virtual_memory().available, *_cgroup_room(Path("/"))])


def _cgroup_room(root: Path) -> Iterator[int]:
    """Free bytes within each memory limit of this process's cgroup and of the cgroups above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = mount / name.strip("/")
        for folder in (folder for folder in (group, *group.parents) if folder.is_relative_to(mount)):
            try:
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # Cached files count as used, but the kernel drops them when memory is needed.
                free = int((folder / limit).read_text()) - int((folder / used).read_text()) + int(statistics[cache])
            except (OSError, ValueError, KeyError):  # no limit ("max"), or invisible inside a container
                continue
            yield max(0, free)
