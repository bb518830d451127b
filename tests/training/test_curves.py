"""The curves of a training: CSVs that read back exactly, and a picture that shows what it should."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from genpoe_plugin.training.curves import running_mean, write_curves

LOSS, STEPS, RATE, FIRST, SECOND = (
    "C0",
    "#b5cfe5",
    "#a08060",
    "C1",
    "C2",
)  # colours of the lines, as the picture has them


def losses(steps: int) -> list[tuple[int, float, float]]:
    return [(step, 3 * math.exp(-step / steps) + 0.1 * math.sin(step), 1e-4 / step) for step in range(1, steps + 1)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path, colour: str) -> int:
    """How many pixels of a picture have nearly this colour."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        image = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    return int((np.abs(image - to_rgb(colour)).max(axis=-1) < 0.03).sum())


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    curve = losses(7)
    validations = [{"step": 3, "em": 1 / 3, "f1": 0.5}, {"step": 7, "em": 2 / 3, "mrr@10": 0.1}]
    write_curves(tmp_path / "out", curve, validations)
    found = rows(tmp_path / "out" / "loss.csv")
    assert [tuple(row) for row in found] == [("step", "loss", "learning_rate")] * 7
    assert [(int(row["step"]), float(row["loss"]), float(row["learning_rate"])) for row in found] == curve
    assert rows(tmp_path / "out" / "validation.csv") == [
        {"step": "3", "em": repr(1 / 3), "f1": "0.5", "mrr@10": ""},
        {"step": "7", "em": repr(2 / 3), "f1": "", "mrr@10": "0.1"},
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"loss.csv", "validation.csv", "curves.png"}


@pytest.mark.parametrize("steps", [1, 2, 500])
@pytest.mark.parametrize("validated", [False, True])
def test_the_picture_shows_every_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, validated: bool
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)  # it has every colour, whether its curve is there or not
    validations = [{"step": step, "em": step / steps / 2, "loss": 4.0 - step / steps} for step in {1, steps}]
    write_curves(tmp_path, losses(steps), validations if validated else [])
    picture = tmp_path / "curves.png"
    least = 8 if steps == 1 else 100
    assert pixels(picture, LOSS) > least
    assert pixels(picture, RATE) > least
    assert (pixels(picture, SECOND) > least) == validated
    if steps > 1:  # single points are in the middle of both axes, one over the other
        assert (pixels(picture, FIRST) > least) == validated
    assert (tmp_path / "validation.csv").exists() == validated
    if steps == 500:
        assert pixels(picture, STEPS) > 300, "single steps, beside their running mean"


def test_a_measure_that_is_no_number_is_a_gap(tmp_path: Path) -> None:
    write_curves(tmp_path, losses(3), [{"step": 1, "em": math.nan}, {"step": 2, "em": 0.5}, {"step": 3, "em": 0.6}])
    assert pixels(tmp_path / "curves.png", FIRST) > 20
    assert rows(tmp_path / "validation.csv")[0]["em"] == "nan"


def test_nothing_is_half_written_where_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_curves(tmp_path, losses(2), [])
    before = (tmp_path / "curves.png").read_bytes()

    def fail(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half a picture")
        raise MemoryError

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(MemoryError):
        write_curves(tmp_path, losses(3), [])
    assert (tmp_path / "curves.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"loss.csv", "curves.png"}
    assert len(rows(tmp_path / "loss.csv")) == 3


@pytest.mark.parametrize("window", [1, 3, 50])
def test_running_mean_by_hand(window: int) -> None:
    values = np.random.default_rng(0).normal(size=20)
    by_hand = [math.fsum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(20)]
    np.testing.assert_allclose(running_mean(values, window), by_hand, rtol=1e-9)
