"""Free memory: of the machine, of its cgroups, and of devices that are not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from genpoe_plugin import device_memory
from genpoe_plugin.device_memory import available_memory
from genpoe_plugin.errors import InputError


def group(folder: Path, limit: str, used: int, cache: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{'' if version == 2 else 'total_'}inactive_file {cache}\n")


def test_a_cpu_has_no_more_than_the_machine() -> None:
    assert 0 < available_memory("cpu") <= psutil.virtual_memory().total


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500))
    for rooms, expected in (((), 500), ((700, 900), 500), ((700, 300), 300)):
        monkeypatch.setattr(device_memory, "_cgroup_room", lambda _, rooms=rooms: iter(rooms))
        assert available_memory("cpu") == expected


def rooms(root: Path, membership: str) -> list[int]:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(membership)
    return list(device_memory._cgroup_room(root))


def test_cgroups_of_the_second_version(tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup"
    group(mount / "jobs/mine", "1000", used=900, cache=150)
    group(mount / "jobs", "800", used=790, cache=0)
    group(mount, "max", used=5000, cache=0)
    assert rooms(tmp_path, "0::/jobs/mine\n") == [1000 - 900 + 150, 10]
    group(mount / "jobs", "800", used=900, cache=0)
    assert rooms(tmp_path, "0::/jobs/mine\n") == [250, 0], "never below nothing"


def test_cgroups_of_the_first_version_and_inside_a_container(tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup/memory"
    group(mount, "1000", used=400, cache=100, version=1)
    membership = "9:name=systemd:/\n5:cpu,memory:/docker/abc:d\n0::/\n"
    assert rooms(tmp_path, membership) == [700], "the group's own folder is not seen from inside"


def test_without_cgroups(tmp_path: Path) -> None:
    assert list(device_memory._cgroup_room(tmp_path)) == []
    assert rooms(tmp_path, "0::/\n") == []


def test_an_accelerators_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30) if device == "cuda:1" else None)
    assert available_memory("cuda:1") == 3 << 30


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(InputError, match=f"device {device}: cannot be used") as error:
        available_memory(device)
    assert "\n" not in str(error.value)
