"""``real-llm figure``: the picture of the method, with the numbers of a real example."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from genpoe_plugin.data.answers import first_line
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.model import GenPoEModel
from genpoe_plugin.retrieval.loading import load_retriever
from genpoe_plugin.retrieval.retriever import Retriever

PASSAGES = 3
TEMPERATURE = 0.05
"""Temperature of the gates: cosine similarities differ by little."""
INK, GREY, PALE, PROMPT = "#222222", "#888888", "#eef2f6", "#b9bfc6"
EXPERTS = ("#005a9c", "#d55e00", "#00a06a")
"""One colour per passage."""
WIDTH, HEIGHT = 12.6, 5.0
ROWS = (3.35, 2.1, 0.85)
"""Height of the middle of each passage's row."""


@dataclass(frozen=True)
class Example:
    """A question on its way through the pipeline.

    Attributes:
        question: the question.
        passages: the retrieved passages, best first.
        scores: similarity of each passage to the question, from the retriever.
        gates: gate of each passage.
        masses: share of each passage in the attention at the prompt's last token.
        answers: the answer without passages, and the answer with experts.
        layers: layers with experts.
        num_layers: number of layers of the LLM.
        window: passage tokens per unit of an expert.
    """

    question: str
    passages: tuple[Passage, ...]
    scores: tuple[float, ...]
    gates: tuple[float, ...]
    masses: tuple[float, ...]
    answers: tuple[str, str]
    layers: tuple[int, ...]
    num_layers: int
    window: int


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, help="Checkpoint of experts in its attention.")
@click.option("--index", required=True, help="Index to retrieve from.")
@click.option("--question", required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="SVG file to write.")
def figure(llm: str, hypernetwork: str, index: str, question: str, out: Path) -> None:
    """Draw one question's way from retrieval to the answer."""
    model = GenPoEModel.from_pretrained(llm, hypernetwork, dtype="float32")
    if not model.has_router:
        raise InputError(f"{hypernetwork}: the figure shows the attention's router; give experts in the attention")
    draw(example(model, load_retriever(index), question), out)


def example(model: GenPoEModel, retriever: Retriever, question: str) -> Example:
    """Answer a question, and collect the numbers of every step.

    Args:
        model: an LLM with experts in its attention.
        retriever: finds three passages.
        question: the question.

    Raises:
        InputError: the index holds fewer than three passages.
    """
    (found,) = retriever.retrieve([question], PASSAGES)
    if len(found) < PASSAGES:
        raise InputError(f"the index holds {len(found)} passages; the figure needs {PASSAGES}")
    texts = [entry.passage.string for entry in found]
    scores = [entry.score for entry in found]
    gates = model.gates([scores], TEMPERATURE)
    (closed_book,) = model.generate([question], mode="closed_book", max_new_tokens=16)
    (answer,) = model.generate([question], [texts], gates, max_new_tokens=16)
    (masses,) = model.router_mass([question], [texts], gates)
    config = model.hypernetwork.config
    return Example(
        question=question,
        passages=tuple(entry.passage for entry in found),
        scores=tuple(scores),
        gates=gates[0],
        masses=tuple(masses),
        answers=(first_line(closed_book), first_line(answer)),
        layers=tuple(config.layers),
        num_layers=int(model.llm.config.get_text_config().num_hidden_layers),
        window=config.window,
    )


def draw(shown: Example, path: Path) -> None:
    """Write the figure as SVG. Letters are drawn as paths, so that it looks alike everywhere.

    Args:
        shown: the example.
        path: file to write.
    """
    style = {"svg.fonttype": "path", "svg.hashsalt": "genpoe", "font.family": "DejaVu Sans", "text.parse_math": False}
    with matplotlib.rc_context(style):
        # The object interface, because pyplot would keep the figure and choose a backend for the whole process.
        drawing = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
        FigureCanvasSVG(drawing)
        axes = drawing.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        _steps(axes)
        _question(axes, shown.question)
        for number in range(PASSAGES):
            _passage(axes, shown, number)
        _llm(axes, shown)
        _answer(axes, shown)
        with atomic_file(path) as temporary:
            drawing.savefig(temporary, format="svg", metadata={"Date": None})


def _steps(axes: Axes) -> None:
    titles = ("Question", "1. Retrieve", "2. Rerank, gate", "3. Generate experts", "4. Add to the LLM", "5. Answer")
    for x, title in zip((0.15, 1.95, 4.65, 6.2, 8.3, 10.6), titles, strict=True):
        axes.text(x, 4.62, title, fontsize=11, weight="bold", color=INK)


def _lines(text: str, width: int, count: int) -> str:
    """At most ``count`` lines of so many characters."""
    return "\n".join(textwrap.wrap(_printable(text), width, max_lines=count, placeholder=" …"))


def _printable(text: str) -> str:
    """The text without control characters, which an LLM can write and SVG cannot hold."""
    return "".join(letter for letter in text if letter.isprintable())


def _box(axes: Axes, x: float, y: float, width: float, height: float, edge: str = GREY, face: str = PALE) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.07",
            edgecolor=edge,
            facecolor=face,
            linewidth=1.2,
        )
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    )


def _question(axes: Axes, question: str) -> None:
    _box(axes, 0.15, 1.4, 1.45, 1.4)
    axes.text(0.25, 2.1, _lines(question, 17, 7), fontsize=9, va="center", color=INK)


def _passage(axes: Axes, shown: Example, number: int) -> None:
    """A row of the figure: passage, gate and expert."""
    middle, colour, passage = ROWS[number], EXPERTS[number], shown.passages[number]
    _arrow(axes, (1.6, 2.1), (1.95, middle))
    _box(axes, 1.95, middle - 0.52, 2.4, 1.04, colour)
    axes.text(
        2.05, middle + 0.33, textwrap.shorten(passage.title, 32), fontsize=8, weight="bold", va="center", color=INK
    )
    text = textwrap.wrap(passage.text, 37, max_lines=3, placeholder=" …")
    axes.text(2.05, middle - 0.03, "\n".join(text), fontsize=7, va="center", color=INK)
    axes.text(2.05, middle - 0.42, f"similarity {shown.scores[number]:.2f}", fontsize=7, va="center", color=colour)
    _arrow(axes, (4.35, middle), (4.65, middle), colour)
    axes.add_patch(Rectangle((4.65, middle - 0.12), 1.0, 0.24, facecolor=PALE, edgecolor=GREY, linewidth=0.6))
    axes.add_patch(Rectangle((4.65, middle - 0.12), shown.gates[number], 0.24, facecolor=colour))
    axes.text(4.65, middle + 0.25, f"gate {shown.gates[number]:.2f}", fontsize=8, va="center", color=INK)
    _arrow(axes, (5.75, middle), (6.2, middle), colour)
    _box(axes, 6.2, middle - 0.42, 1.6, 0.84, colour, "white")
    words = f"Expert {number + 1}\nkeys and values,\n1 unit per {shown.window} tokens"
    axes.text(7.0, middle, words, fontsize=7.5, ha="center", va="center", color=INK)
    _arrow(axes, (7.8, middle), (8.3, middle), colour)


def _llm(axes: Axes, shown: Example) -> None:
    """The stack of layers, the lowest at the bottom; those with experts are filled."""
    low, high = 0.33, 3.87
    _box(axes, 8.3, low - 0.08, 1.7, high - low + 0.16, GREY, "white")
    step = (high - low) / shown.num_layers
    for layer in range(shown.num_layers):
        face = EXPERTS[0] if layer in shown.layers else PALE
        axes.add_patch(Rectangle((8.42, low + layer * step + step * 0.12), 1.46, step * 0.76, facecolor=face))
    axes.text(9.15, 4.25, "frozen LLM", fontsize=8, ha="center", va="center", color=INK)
    words = f"experts in {len(shown.layers)} of {shown.num_layers} layers"
    axes.text(9.15, 4.06, words, fontsize=7.5, ha="center", va="center", color=EXPERTS[0])
    _arrow(axes, (10.0, 2.1), (10.4, 2.1))


def _answer(axes: Axes, shown: Example) -> None:
    axes.text(10.5, 4.25, "router: attention at the answer", fontsize=8, va="center", color=INK)
    shares = (1 - sum(shown.masses), *shown.masses)
    names = ("prompt", *(f"expert {number + 1}" for number in range(PASSAGES)))
    _bars(axes, shares, names)
    closed_book, answer = shown.answers
    for bottom, title, text, colour in (
        (1.35, "with experts", answer, EXPERTS[0]),
        (0.33, "without (closed-book)", closed_book, GREY),
    ):
        _box(axes, 10.5, bottom, 1.95, 0.85, colour, "white")
        axes.text(10.6, bottom + 0.68, title, fontsize=7.5, va="center", color=colour)
        axes.text(10.6, bottom + 0.3, _lines(text, 24, 3), fontsize=8.5, va="center", color=INK)


def _bars(axes: Axes, shares: Sequence[float], names: Sequence[str]) -> None:
    for number, (share, name, colour) in enumerate(zip(shares, names, (PROMPT, *EXPERTS), strict=True)):
        y = 3.75 - 0.4 * number
        axes.add_patch(Rectangle((11.25, y), 0.85 * share, 0.24, facecolor=colour))
        axes.text(11.17, y + 0.12, name, fontsize=8, ha="right", va="center", color=INK)
        axes.text(11.3 + 0.85 * share, y + 0.12, f"{share:.0%}", fontsize=8, va="center", color=INK)
