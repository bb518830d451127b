"""The benchmark for a GPU, here with tiny LLMs on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, random_llm
from benchmarks.options import Options
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import PRESETS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> gpu.Sizes:
    monkeypatch.setattr(random_llm, "WORDS", 500)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = replace(gpu.QUICK, small=(32, 3, 16), large=(64, 4, 16, 2))
    monkeypatch.setattr(gpu, "QUICK", sizes)
    return sizes


def test_every_part_has_its_rows(tiny: gpu.Sizes, tmp_path: Path) -> None:
    rows = {row.name: row for row in gpu.measure(Options(True, tmp_path, None, None))}
    # The device is the CPU, so nothing differs.
    for name in (*(f"gpu.score_difference_{preset}" for preset in PRESETS), "gpu.host_store_difference"):
        assert rows[name].value == 0 and rows[name].holds
    assert rows["gpu.expert_memory_ratio"].value == pytest.approx(1, abs=0.1)
    assert rows["gpu.rag_speedup_cached_2"].target == ">= 3"
    assert not any(name.startswith("real_size.") for name in rows)


def test_scores_that_differ_are_told(tiny: gpu.Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = gpu._scores
    calls = []

    def wrong(*arguments: object, **options: object) -> list[float]:
        calls.append(arguments)
        return (np.array(scores(*arguments, **options)) + 0.5 * (len(calls) == 2)).tolist()

    monkeypatch.setattr(gpu, "_scores", wrong)
    monkeypatch.setattr(gpu, "random_llm", lambda *sizes, device, **options: random_llm.random_llm(*sizes, **options))
    row = next(gpu.same_scores(tiny, "another"))
    assert row.value == pytest.approx(0.5) and row.holds is False


def test_the_full_size_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a GPU"):
        gpu.measure(Options(False, None, None, None))
