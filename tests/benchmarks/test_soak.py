from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.options import Options


def test_no_answer_differs_from_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "QUICK", 3.0)
    monkeypatch.setattr(soak, "ANSWERERS", {"transformers": soak.Transformers})
    rows = {row.name: row.value for row in soak.measure(Options(quick=True))}
    assert rows["soak.transformers.requests"] >= rows["soak.transformers.distinct"] > 20
    assert rows["soak.transformers.different"] == 0
    assert rows["soak.transformers.memory"] > 100


def test_an_answer_that_changes_is_counted(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsteady:
        modes = ("genpoe",)

        def __init__(self, folder):
            self.calls = 0

        def answer(self, requests):
            self.calls += 1
            return [float(self.calls)] * len(requests)

    monkeypatch.setattr(soak, "ANSWERERS", {"unsteady": Unsteady})
    monkeypatch.setattr(soak, "POOL", 5)
    found = soak.run("unsteady", tmp_path, 0.2)
    assert found["changed"] > 0 and len(found["answers"]) <= len(soak.every(("genpoe",))) == 50
    again = soak.run("unsteady", tmp_path, 0)
    assert {number for number, _ in again["answers"]} == {number for number, _ in found["answers"]}


def test_growth_is_that_of_the_second_half() -> None:
    times = np.linspace(0, 7200, 4000)
    noise = np.random.default_rng(0).normal(0, 1, 4000)
    memory = np.where(times < 3600, times, 3600) + noise
    slope, error = soak.growth(times, memory)
    assert abs(slope) < 3 * error and error < 1
    slope, error = soak.growth(times, memory + times / 3600 * 50)
    assert slope == pytest.approx(50, abs=1) and slope > 20 * error


def test_all_kinds_of_requests_are_drawn() -> None:
    rng = random.Random(0)
    drawn = [request for _ in range(400) for request in soak.draw(rng, soak.MODES)]
    assert {(r.mode, r.scores, r.passages) for r in drawn} == {
        (mode, scores, passages) for mode in soak.MODES for scores in (False, True) for passages in range(5)
    }
    assert set(drawn) <= set(soak.every(soak.MODES))
