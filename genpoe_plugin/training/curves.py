"""Training curves beside the checkpoint: loss and validation as CSV, and a picture of both."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from genpoe_plugin.checkpoints.card import LOSS, PICTURE, VALIDATION
from genpoe_plugin.files import atomic_file

MAX_MARKED_POINTS = 60  # curves with fewer points have a mark at each point


def write_curves(
    directory: str | Path, losses: Sequence[tuple[int, float, float]], validations: Sequence[Mapping[str, float]]
) -> None:
    """Write ``loss.csv``, ``validation.csv`` (only if there are validations) and ``curves.png`` into ``directory``.

    Each file is replaced atomically. Numbers in the CSV files have full precision.

    Args:
        directory: directory of the checkpoint.
        losses: step, loss and learning rate of every optimizer step; at least one.
        validations: ``{"step": ..., measure: value, ...}`` of every validation; measures may be missing.
    """
    directory = Path(directory)
    measures = list(dict.fromkeys(name for row in validations for name in row if name != "step"))
    _write_csv(directory / LOSS, ["step", "loss", "learning_rate"], losses)
    if measures:
        columns = ["step", *measures]
        _write_csv(directory / VALIDATION, columns, ([row.get(name, "") for name in columns] for row in validations))
    figure = _draw(losses, validations, measures)
    with atomic_file(directory / PICTURE) as temporary:
        figure.savefig(temporary, format="png")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to ``window - 1`` values before it, ``[n]``."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _write_csv(path: Path, header: list[str], rows: Iterable[Sequence[Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def _draw(
    losses: Sequence[tuple[int, float, float]], validations: Sequence[Mapping[str, float]], measures: Sequence[str]
) -> Figure:
    # Not with pyplot, which would keep the figure and choose a backend for the whole process.
    figure = Figure(figsize=(8, 7 if measures else 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if measures else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_losses(panels[0], np.array(losses, dtype=np.float64))
    if measures:
        _draw_validations(panels[1], validations, measures)
    last = losses[-1][0]
    panels[-1].set_xlabel("optimizer step")
    panels[-1].set_xlim(-max(0.5, 0.02 * last), last + max(0.5, 0.02 * last))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _explain(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Add the legend above the panel, where it hides no curve."""
    axes.legend(handles=lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, markerscale=2)


def _draw_losses(axes: Axes, table: np.ndarray) -> None:
    """Draw the loss of every step (faint), its running mean, and the learning rate on a second axis."""
    steps, losses, rates = table.T
    window = max(1, len(steps) // 50)
    mark = "." if len(steps) < MAX_MARKED_POINTS else ""
    lines = []
    if window > 1:
        # Dots instead of a line: Agg cannot draw a line through a hundred thousand noisy values.
        lines += axes.plot(steps, losses, ".", color="#b5cfe5", markersize=2, label="loss of a step")
    label = f"loss, mean of {window} steps" if window > 1 else "loss"
    lines += axes.plot(steps, running_mean(losses, window), color="C0", marker=mark, label=label)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    lines += right.plot(steps, rates, color="#a08060", linestyle="--", linewidth=1, marker=mark, label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _explain(axes, lines)


def _draw_validations(axes: Axes, validations: Sequence[Mapping[str, float]], measures: Sequence[str]) -> None:
    """Draw every measure; those above 1, such as losses, on a second axis, so that they do not flatten the others."""
    curves = {
        name: np.array([(row["step"], row[name]) for row in validations if name in row], dtype=np.float64).T
        for name in measures
    }
    beyond = [name for name, (_, values) in curves.items() if np.nanmax(values, initial=0) > 1]
    right = axes.twinx() if 0 < len(beyond) < len(curves) else axes
    lines = []
    for number, (name, (steps, values)) in enumerate(curves.items(), start=1):
        panel, style = (right, "--") if name in beyond else (axes, "-")
        mark = "o" if len(steps) < MAX_MARKED_POINTS else ""
        lines += panel.plot(steps, values, color=f"C{number}", linestyle=style, marker=mark, markersize=4, label=name)
    if right is not axes:
        right.set_ylabel("  ".join(beyond))
    axes.set_ylabel("validation")
    axes.grid(alpha=0.3)
    _explain(axes, lines)
