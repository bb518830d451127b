"""Plots of the recovered fraction over the number of layers and over bytes per passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from genpoe_plugin.files import atomic_file

COLOURS = {"f1": "#005a9c", "nats": "#d55e00"}
TITLES = {"f1": "F1", "nats": "nats per answer token"}


def draw_curve(
    points: Sequence[Mapping[str, Any]], places: Sequence[float], path: Path, *, title: str, axis: str
) -> None:
    """Write a PNG of the recovered fractions of F1 and nats with 95 % intervals.

    Args:
        points: result of `benchmarks.real_llm.results.curve`.
        places: x coordinate of each point.
        axis: label of the x axis.
    """
    # Not pyplot, which keeps every figure and selects a backend for the whole process.
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for measure, colour in COLOURS.items():
        shown = [
            (place, point["recovered"][measure])
            for place, point in zip(places, points, strict=True)
            if point["recovered"][measure] is not None
        ]
        if shown:
            values = [share["value"] for _, share in shown]
            below = [share["value"] - share["low"] for _, share in shown]
            above = [share["high"] - share["value"] for _, share in shown]
            axes.errorbar(
                [place for place, _ in shown],
                values,
                yerr=[below, above],
                marker="o",
                capsize=3,
                color=colour,
                label=TITLES[measure],
            )
    for level in (0, 1):
        axes.axhline(level, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(title=title, xlabel=axis, ylabel="recovered fraction")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
