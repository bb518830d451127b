"""Experts on disk against those that were written, whoever reads them."""

from __future__ import annotations

import os

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert_files import ExpertFiles

WEIGHTS = tuple(torch.randn(5, *shape, generator=torch.Generator().manual_seed(1)) for shape in ((3, 4), (2,)))
NAMES = ["one", "two", "three", "vier: 東京", "five"]


def equal(found, rows):
    return all(torch.equal(ours, weight[rows]) for ours, weight in zip(found, WEIGHTS, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written(tmp_path, dtype):
    files = ExpertFiles(tmp_path, "abc")
    weights = tuple(weight.to(dtype) for weight in WEIGHTS)
    files.write(NAMES[:3], tuple(weight[:3] for weight in weights))
    files.write(NAMES[3:], tuple(weight[3:] for weight in weights))
    for opened in (files, ExpertFiles(tmp_path, "abc")):
        assert len(opened) == 5 and all(name in opened for name in NAMES) and "six" not in opened
        asked = [4, 0, 3, 1]
        found = opened.read([NAMES[row] for row in asked])
        assert [weight.dtype for weight in found] == [dtype] * 2
        assert all(torch.equal(ours, weight[asked]) for ours, weight in zip(found, weights, strict=True))


def test_experts_that_are_made_otherwise_are_not_taken(tmp_path):
    ExpertFiles(tmp_path, "abc").write(NAMES, WEIGHTS)
    assert "one" not in ExpertFiles(tmp_path, "abd")


def test_two_writers_do_not_disturb_each_other(tmp_path):
    first, second = ExpertFiles(tmp_path, "abc"), ExpertFiles(tmp_path, "abc")
    first.write(NAMES[:3], tuple(weight[:3] for weight in WEIGHTS))
    second.write(NAMES[1:], tuple(weight[1:] for weight in WEIGHTS))
    assert equal(first.read(["three", "one"]), [2, 0]) and equal(second.read(["five", "two"]), [4, 1])
    assert equal(ExpertFiles(tmp_path, "abc").read(NAMES), slice(None))


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_damaged_file_is_named(tmp_path, keep):
    ExpertFiles(tmp_path, "abc").write(NAMES, WEIGHTS)
    (path,) = (tmp_path / "abc").iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{path.name}.*delete the file"):
        ExpertFiles(tmp_path, "abc")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"expert_store=.*cannot be written"):
        ExpertFiles(tmp_path / "file", "abc").write(NAMES, WEIGHTS)


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    files = ExpertFiles(tmp_path, "abc")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="no space left"):
        files.write(NAMES, WEIGHTS)
    assert not list((tmp_path / "abc").iterdir()) and "one" not in files
