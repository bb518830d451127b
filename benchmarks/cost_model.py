"""A linear model of the time per batch, and a plot of model and measurements.

    seconds = fixed + row · B + expert · B·K                   experts in the store
            + start + passage · B·K + token · B·K·L            with generation of experts

B is the number of questions per batch, K the number of experts per question, and L the number of words (tokens) per
passage. ``fixed`` covers reading the LLM's weights and the fixed overhead of the decoding steps, ``row`` the arithmetic
per question, ``expert`` reading and applying an expert, ``start`` reading the hypernetwork once, ``passage`` generating
and writing an expert, and ``token`` reading a passage token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from scipy.optimize import nnls

from benchmarks.row import Row
from genpoe_plugin.files import atomic_file

TERMS = {
    "fixed": "ms/batch",
    "row": "ms/question",
    "expert": "ms/expert",
    "start": "ms/batch",
    "passage": "ms/passage",
    "token": "ms/token",
}


@dataclass(frozen=True)
class Point:
    """A measured batch.

    Attributes:
        batch, experts, words: B, K and L; K is 0 for closed-book answering.
        cold: whether the experts were generated in this batch.
        seconds: time of the whole batch.
    """

    batch: int
    experts: int
    words: int
    cold: bool
    seconds: float

    @property
    def terms(self) -> tuple[float, ...]:
        """The factor of each of `TERMS`."""
        generated = self.cold * self.batch * self.experts
        return 1, self.batch, self.batch * self.experts, float(self.cold), generated, generated * self.words


@dataclass(frozen=True)
class CostModel:
    """Coefficients of `TERMS`, in seconds."""

    coefficients: tuple[float, ...]

    @classmethod
    def fitted(cls, points: Sequence[Point]) -> CostModel:
        """Fit non-negative coefficients by least squares of the relative deviations."""
        shares = np.array([point.terms for point in points]) / np.array([[point.seconds] for point in points])
        scale = shares.max(0)
        scale[scale == 0] = 1
        found, _ = nnls(shares / scale, np.ones(len(points)))
        return cls(tuple(float(value) for value in found / scale))

    def seconds(self, batch: int, experts: int, words: int, cold: bool) -> float:
        terms = Point(batch, experts, words, cold, 0.0).terms
        return sum(coefficient * term for coefficient, term in zip(self.coefficients, terms, strict=True))

    def deviation(self, points: Sequence[Point]) -> float:
        """Median relative deviation of the model from the measurements."""
        predicted = [self.seconds(point.batch, point.experts, point.words, point.cold) for point in points]
        return statistics.median(abs(value / point.seconds - 1) for value, point in zip(predicted, points, strict=True))

    def rows(self, points: Sequence[Point]) -> list[Row]:
        return [
            *(
                Row(f"evaluation.cost_{name}", 1000 * value, unit)
                for (name, unit), value in zip(TERMS.items(), self.coefficients, strict=True)
            ),
            Row("evaluation.cost_model_deviation", 100 * self.deviation(points), "%"),
        ]


def draw(points: Sequence[Point], model: CostModel, path: Path) -> None:
    """Write a PNG of milliseconds per question over batch size, number of experts and passage length.

    Marks are measurements, lines the model.
    """
    figure = Figure(figsize=(15, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    # Passage length varies only at one batch size and number of experts; the other panels show the usual length.
    words = statistics.mode(point.words for point in points)
    at = next(point for point in points if point.words != words)
    usual = [point for point in points if point.words == words]
    for number, count in enumerate(sorted({point.experts for point in usual})):
        chosen = [point for point in usual if point.experts == count]
        _curve(panels[0], chosen, model, "batch", f"K = {count}" if count else "closed-book", f"C{number}")
    for number, batch in enumerate(sorted({point.batch for point in usual})):
        chosen = [point for point in usual if point.batch == batch and point.experts]
        _curve(panels[1], chosen, model, "experts", f"batch {batch}", f"C{number}")
    chosen = [point for point in points if (point.batch, point.experts) == (at.batch, at.experts)]
    _curve(panels[2], chosen, model, "words", f"batch {at.batch}, K = {at.experts}", "C0")
    for axes, label in zip(panels, ("questions per batch", "experts per question", "words per passage"), strict=True):
        axes.set(xlabel=label, ylabel="ms per question")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize="small")
    for axes in panels[:2]:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    panels[2].set_ylim(bottom=0)
    figure.suptitle(
        "marks: measurements (filled: experts in the store; hollow: generated); lines: model (solid, dashed)"
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _curve(axes: Axes, points: Sequence[Point], model: CostModel, over: str, label: str, colour: str) -> None:
    for cold in (False, True):
        chosen = sorted((point for point in points if point.cold == cold), key=lambda point: getattr(point, over))
        if not chosen:
            continue
        x = [getattr(point, over) for point in chosen]
        measured = [1000 * point.seconds / point.batch for point in chosen]
        face = "none" if cold else colour
        axes.plot(x, measured, "o", color=colour, markerfacecolor=face, label=None if cold else label)
        steps = np.geomspace(x[0], x[-1], 60)
        shape = {"batch": chosen[0].batch, "experts": chosen[0].experts, "words": chosen[0].words, "cold": cold}
        predicted = [
            1000 * model.seconds(**{**shape, over: step}) / (step if over == "batch" else shape["batch"])
            for step in steps
        ]
        axes.plot(steps, predicted, "--" if cold else "-", color=colour, linewidth=1)
