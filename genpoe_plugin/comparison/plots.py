"""The plots of a leaderboard as SVG, each for wide and for narrow screens.

The colours are close to Okabe and Ito's, which are distinct for any colour vision and visible on white. The plots are
readable without colours: systems have numbers, modes have markers, and controls are hollow.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.breakdown import Estimate
from genpoe_plugin.comparison.leaderboard import Board, System
from genpoe_plugin.comparison.settings import key

COLOURS = {
    "closed_book": "#4d4d4d",
    "rag": "#d55e00",
    "genpoe": "#005a9c",
    "genpoe_rag": "#00a06a",
    "other": "#cc79a7",
}
MARKERS = {"closed_book": "v", "rag": "o", "genpoe": "s", "genpoe_rag": "D", "other": "P"}
_SIDES = (
    ((5, 4), "left", "bottom"),
    ((-5, -4), "right", "top"),
    ((5, -4), "left", "top"),
    ((-5, 4), "right", "bottom"),
)
_LINES = ("-", "--", ":", "-.")
_STYLE: Any = {
    "svg.fonttype": "none",  # keeps text searchable and readable by screen readers
    "svg.hashsalt": "genpoe",
    "font.family": "DejaVu Sans",  # a wide font, so that the browser's own font fits as well
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.parse_math": False,
}
MOST_LINES = 6
"""Largest number of systems in a plot with one line per system."""


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        title: title of the plot.
        note: explanation below the plot.
        wide, narrow: ``<svg>`` elements for wide and for narrow screens.
    """

    title: str
    note: str
    wide: str
    narrow: str


def plots(board: Board, prefix: str) -> list[Plot]:
    """All plots for which a board has data.

    Args:
        board: the board.
        prefix: prefix of the ids in the SVG, different for every board of a page.
    """
    drawn = [_estimates(board, metric, f"{prefix}-{metric}") for metric in board.metrics]
    drawn += [
        plot
        for plot in (
            _given(board, f"{prefix}-given"),
            _known(board, f"{prefix}-known"),
            _ranks(board, f"{prefix}-ranks"),
            _lengths(board, f"{prefix}-lengths"),
            _numbers(board, f"{prefix}-numbers"),
            _cost(board, f"{prefix}-seconds", memory=False),
            _cost(board, f"{prefix}-memory", memory=True),
        )
        if plot is not None
    ]
    return drawn


def _mode(system: System) -> str:
    mode = system.settings.get("mode", "other")
    return mode if mode in COLOURS else "other"


def _look(system: System) -> dict[str, Any]:
    colour = COLOURS[_mode(system)]
    return {
        "marker": MARKERS[_mode(system)],
        "color": colour,
        "markerfacecolor": "white" if system.control else colour,
        "markeredgewidth": 1.3,
        "markersize": 6,
    }


def _bar(estimate: Estimate, scale: float) -> list[list[float]]:
    return [[scale * (estimate.mean - estimate.low)], [scale * (estimate.high - estimate.mean)]]


def _scale(board: Board, metric: str) -> tuple[float, str]:
    share = cells.is_share(metric, board)
    return (100.0 if share else 1.0), cells.unit(metric, False) + (" (%)" if share else "")


def _pad(low: float, high: float, board: Board, metric: str) -> tuple[float, float]:
    margin = 0.04 * (high - low) or 1.0
    if cells.is_share(metric, board):
        # If an end of the scale is near, it is shown with some margin, so that markers at it are not cut.
        return -1.5 if low < 15 else low - margin, 101.5 if high > 85 else high + margin
    return low - margin, high + margin


def _name(system: System, most: int) -> str:
    """Number and label, cut to ``most`` characters; the table has the whole label."""
    name = f"{system.number}  {system.label}"
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"


def _rows(axes: Axes, systems: Sequence[System], narrow: bool, beside: bool = False) -> None:
    """Set up one row per system, with its name beside the row, or above it on narrow screens.

    Args:
        axes: the axes.
        systems: the systems, from top to bottom.
        narrow: whether the screen is narrow.
        beside: whether the line of the name contains other text as well.
    """
    names = [_name(system, (26 if beside else 40) if narrow else 60) for system in systems]
    axes.set_ylim(len(systems) - 0.4, -0.8 if narrow else -0.6)
    if narrow:
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        for place, name in enumerate(names):
            axes.text(0.012, place - 0.22, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8.5)
    else:
        axes.set_yticks(range(len(systems)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    ranked = sum(system.control is None for system in systems)
    if 0 < ranked < len(systems):
        axes.axhline(ranked - (0.65 if narrow else 0.5), color="#999999", linewidth=0.8)


def _height(systems: Sequence[System], narrow: bool) -> float:
    return (0.42 if narrow else 0.27) * len(systems) + 1.0


def _estimates(board: Board, metric: str, prefix: str) -> Plot:
    scale, unit = _scale(board, metric)

    def draw(narrow: bool) -> Figure:
        figure, axes = _figure(narrow, _height(board.systems, narrow))
        for place, system in enumerate(board.systems):
            value = system.estimates[metric]
            bar = _bar(value, scale)
            axes.errorbar(scale * value.mean, place, xerr=bar, capsize=2.5, linewidth=1.4, **_look(system))
        values = [system.estimates[metric] for system in board.systems]
        ends = scale * min(v.low for v in values), scale * max(v.high for v in values)
        axes.set_xlim(*_pad(*ends, board, metric))
        _rows(axes, board.systems, narrow)
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(f"{unit}, n = {board.n:,} questions")
        return figure

    note = f"Mean and 95 % interval over {board.n:,} questions; hollow: controls."
    return _both(f"{cells.unit(metric, False)} with 95 % intervals", note, draw, prefix)


@dataclass(frozen=True)
class _Halves:
    """A division of the questions into two groups.

    Attributes:
        part: the attribute of a system with the scores of both groups.
        filled, hollow: the names of the groups in it; the first has filled markers.
        counted: what the numbers beside the rows count.
    """

    part: str
    filled: str
    hollow: str
    counted: str


def _given(board: Board, prefix: str) -> Plot | None:
    systems = [s for s in board.systems if s.by_given and s.settings.get("passages") != "none"]
    note = (
        "Filled: questions with the answer in a passage that the LLM was given; hollow: without it. "
        "n: number of questions in each of the two groups; intervals are 95 %."
    )
    halves = _Halves("by_given", "present", "absent", "answer given / not given")
    return _two_groups(board, systems, halves, "By whether the answer was retrieved", note, prefix)


def _known(board: Board, prefix: str) -> Plot | None:
    systems = [system for system in board.systems if len(system.by_known) == 2]
    note = (
        "Filled: questions that the same LLM answers without passages; hollow: the others. "
        "n: number of questions in each of the two groups; intervals are 95 %."
    )
    halves = _Halves("by_known", "known", "unknown", "known / not known")
    return _two_groups(board, systems, halves, "By whether closed-book answering is right", note, prefix)


def _two_groups(
    board: Board, systems: Sequence[System], halves: _Halves, title: str, note: str, prefix: str
) -> Plot | None:
    """A row per system, with the scores of both groups of questions."""
    if not systems:
        return None
    scale, unit = _scale(board, board.metric)
    groups = (halves.filled, halves.hollow)
    parts: list[dict[str, Estimate]] = [getattr(system, halves.part) for system in systems]

    def draw(narrow: bool) -> Figure:
        figure, axes = _figure(narrow, _height(systems, narrow) + 0.3)
        for place, (system, part) in enumerate(zip(systems, parts, strict=True)):
            for name in groups:
                if name not in part:
                    continue
                value, filled = part[name], name == halves.filled
                at = place + (-0.1 if filled else 0.1) + (0.1 if narrow else 0)
                look = _look(system) | {"markerfacecolor": COLOURS[_mode(system)] if filled else "white"}
                axes.errorbar(scale * value.mean, at, xerr=_bar(value, scale), capsize=2, linewidth=1.2, **look)
        axes.set_xlim(*_pad(0, 100 if scale == 100 else 1, board, board.metric))
        _rows(axes, systems, narrow, beside=True)
        for place, part in enumerate(parts):
            text = " / ".join(f"{part[name].n:,}" if name in part else "0" for name in groups)
            if narrow:
                where: Any = {"y": place - 0.22, "ha": "right", "va": "bottom", "x": 1.0}
            else:
                where = {"y": place, "ha": "left", "va": "center", "x": 1.01}
            axes.text(s=f"n = {text}", transform=axes.get_yaxis_transform(), fontsize=8, color="#444444", **where)
        axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 10, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(f"{unit}; n: {halves.counted}")
        return figure

    return _both(title, note, draw, prefix)


@dataclass(frozen=True)
class _Line:
    """A line of a plot.

    Attributes:
        system: the system whose look the line has.
        name: name in the legend.
        values: the points, by position on the x-axis.
    """

    system: System
    name: str
    values: dict[int, Estimate]


def _ranks(board: Board, prefix: str) -> Plot | None:
    title = "By the rank of the passage with the answer"
    label = "best rank of a retrieved passage with the answer"
    return _groups(board, "by_rank", title, "by the rank of the answer", label, prefix)


def _lengths(board: Board, prefix: str) -> Plot | None:
    title, label = "By the length of the passage", "words of the first passage"
    return _groups(board, "by_length", title, "by the length of the first passage", label, prefix)


def _groups(board: Board, part: str, title: str, by: str, label: str, prefix: str) -> Plot | None:
    """A line per system over groups of questions, which are the same for all systems."""
    ranked = [system for system in board.systems if system.control is None and len(getattr(system, part)) > 1]
    if not ranked:
        return None
    systems = _most_different(ranked)
    groups: dict[str, Estimate] = getattr(systems[0], part)
    lines = [_Line(s, _name(s, 36), dict(enumerate(getattr(s, part).values()))) for s in systems]
    note = f"The same questions for all systems, {by}; intervals are 95 %; n = {board.n:,}."
    if len(ranked) > len(systems):
        note += f" {len(systems)} of {len(ranked)} ranked systems: the best of every mode, then the next best."
    ticks = [f"{name}\nn={group.n:,}" for name, group in groups.items()]
    return _lines(board, lines, ticks, label, title, note, prefix)


def _numbers(board: Board, prefix: str) -> Plot | None:
    """A line per series of systems that differ only in the number of passages."""
    series: dict[str, list[System]] = {}
    for system in board.systems:
        if "num_passages" in system.settings:
            others = {name: value for name, value in system.settings.items() if name != "num_passages"}
            series.setdefault(key(others), []).append(system)
    several = [systems for systems in series.values() if len(systems) > 1]
    if not several:
        return None
    shown = several[:MOST_LINES]
    numbers = sorted({int(system.settings["num_passages"]) for systems in shown for system in systems})
    lines = [
        _Line(
            systems[0],
            f"{', '.join(f'{system.number}' for system in systems)}  {_without_number(systems[0])}",
            {
                numbers.index(int(system.settings["num_passages"])): system.estimates[board.metric]
                for system in sorted(systems, key=lambda system: int(system.settings["num_passages"]))
            },
        )
        for systems in shown
    ]
    note = f"Systems that differ only in the number of passages; intervals are 95 %; n = {board.n:,}."
    if len(several) > len(shown):
        note += f" {len(shown)} of {len(several)} such series."
    label = f"number of passages (K); n = {board.n:,} questions"
    unit = cells.unit(board.metric, False)
    return _lines(board, lines, [f"{k}" for k in numbers], label, f"{unit} by the number of passages", note, prefix)


def _without_number(system: System) -> str:
    """A system's label without its number of passages, cut to fit a legend."""
    label = " ".join(word for word in system.label.split(" ") if not word.startswith("K="))
    return label if len(label) <= 30 else f"{label[:29]}\u2026"


def _lines(
    board: Board, lines: Sequence[_Line], ticks: Sequence[str], label: str, title: str, note: str, prefix: str
) -> Plot:
    scale, unit = _scale(board, board.metric)

    def draw(narrow: bool) -> Figure:
        rows = len(lines) if narrow else (len(lines) + 2) // 3
        figure, axes = _figure(narrow, 3.1 + 0.2 * rows)
        for number, line in enumerate(lines):
            shift = (0.09 if narrow else 0.045) * (number - (len(lines) - 1) / 2)
            values = line.values.values()
            bars = [[scale * (v.mean - v.low) for v in values], [scale * (v.high - v.mean) for v in values]]
            places = [place + shift for place in line.values]
            means = [scale * value.mean for value in values]
            mode = _mode(line.system)
            style = _LINES[sum(_mode(other.system) == mode for other in lines[:number]) % len(_LINES)]
            look = _look(line.system) | {"markersize": 5, "linewidth": 1.2, "linestyle": style}
            axes.errorbar(places, means, yerr=bars, capsize=2, elinewidth=1, label=line.name, **look)
        axes.set_xticks(range(len(ticks)), ticks, fontsize=7.5 if narrow else 9)
        axes.set_xlim(-0.5, len(ticks) - 0.5)
        axes.set_ylabel(unit)
        axes.set_xlabel(label)
        axes.grid(False, axis="x")
        figure.legend(loc="outside upper left", ncols=1 if narrow else 3, frameon=False, fontsize=8.5)
        return figure

    return _both(title, note, draw, prefix)


def _most_different(systems: Sequence[System]) -> list[System]:
    """Select at most `MOST_LINES` systems: the best of every mode, then the next best."""
    first = {_mode(system): system for system in reversed(systems)}.values()
    others = [system for system in systems if system not in first]
    return sorted([*first, *others][:MOST_LINES], key=lambda system: system.number)


def _cost(board: Board, prefix: str, memory: bool) -> Plot | None:
    def value(system: System) -> float | None:
        cost = system.cost
        if memory:
            return cost.peak_bytes and cost.peak_bytes / 2**30
        return cost.seconds and 1000 * cost.seconds

    systems = [system for system in board.systems if system.control is None and value(system)]
    if len(systems) < 2:
        return None
    scale, unit = _scale(board, board.metric)
    values = [value(system) or 0 for system in systems]
    wide = max(values) > 4 * min(values)  # a logarithmic axis over a smaller range has too few ticks
    logarithm = ", log scale" if wide else ""

    def draw(narrow: bool) -> Figure:
        figure, axes = _figure(narrow, 3.4)
        for number, system in enumerate(sorted(systems, key=lambda system: value(system) or 0)):
            estimate = system.estimates[board.metric]
            x, y = value(system), scale * estimate.mean
            assert x is not None
            axes.errorbar(x, y, yerr=_bar(estimate, scale), capsize=2, linewidth=1, **_look(system))
            star = "*" if system.cost.whole_command and not memory else ""
            # Neighbours have their numbers on different sides, so that they do not overlap.
            side: Any = dict(zip(("xytext", "ha", "va"), _SIDES[number % len(_SIDES)], strict=True))
            axes.annotate(f"{system.number}{star}", (x, y), textcoords="offset points", fontsize=8, **side)
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.12)
        axes.set_ylabel(unit)
        of = ", ".join(sorted({system.cost.memory_of for system in systems if system.cost.memory_of}))
        what = f"peak memory of the {of} (GiB{logarithm})" if memory else f"time per question (ms{logarithm})"
        axes.set_xlabel(f"{what}\nn = {board.n:,} questions")
        return figure

    note = "Ranked systems by their numbers in the table; bars are 95 % intervals."
    if not memory and any(system.cost.whole_command for system in systems):
        note += " * time of the whole command, with loading."
    return _both(f"{cells.unit(board.metric, False)} against {'memory' if memory else 'latency'}", note, draw, prefix)


def _figure(narrow: bool, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7 if narrow else 10.4, height), layout="constrained")
    return figure, figure.add_subplot()


def _both(title: str, note: str, draw: Callable[[bool], Figure], prefix: str) -> Plot:
    with matplotlib.rc_context(_STYLE):
        wide, narrow = (
            _svg(draw(narrow), f"{prefix}-{'narrow' if narrow else 'wide'}", f"{title}. {note}")
            for narrow in (False, True)
        )
    return Plot(title, note, wide, narrow)


def _svg(figure: Figure, prefix: str, description: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Title": description})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # All plots are in one document, so ids must be unique.
    prefix = re.sub(r"[^\w-]", "_", prefix)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    return re.sub(r"<svg ", '<svg role="img" ', text, count=1)
