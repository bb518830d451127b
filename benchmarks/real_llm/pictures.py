"""What sets of layers recover, over their number and over the bytes of a passage."""

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
    """Write a PNG of the recovered shares of F1 and nats, with their 95 % intervals.

    Args:
        points: of `benchmarks.real_llm.results.curve`.
        places: of each point on the horizontal axis, which ``axis`` names.
    """
    # Through the object interface: pyplot would keep the figure, and choose a backend for the whole process.
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
    axes.set(title=title, xlabel=axis, ylabel="share of the prompt's gain")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
