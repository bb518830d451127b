"""Which layers of an LLM, and which of their key-value heads, do the reading of a passage: found by measurement.

Experts of the form ``attention`` in all layers are taken away part by part (a part is a layer, or one key-value head of
a layer). What counts is the loss of held questions' answers with their passage as expert: first with each part left out
alone, then greedily, the part that costs least first. Every measurement is kept in a file as soon as it is made, so a
calibration that was stopped goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.checkpoints.card import CALIBRATION, CALIBRATION_PICTURE
from genpoe_plugin.checkpoints.checkpoint import llm_identity
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.experts.replay import recording, replaying
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.files import atomic_file
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.training.batches import IGNORED, answer_logits, make_batch, mean_over_targets
from genpoe_plugin.training.examples import DrawnExample, TrainingExample, training_examples

TRIED = 4  # parts whose loss is measured again before one is left out

Part = tuple[tuple[int, int], ...]
"""Pairs of layer and key-value head that are left out together."""


@dataclass(frozen=True)
class Limits:
    """How small the experts have to be; at least one of the three.

    Attributes:
        max_layers: at most so many layers.
        max_bytes: at most so many bytes an expert, of a passage of mean length.
        keep: at least this share of what experts in all layers gain over closed-book answering; the smallest such
            experts are taken, where without it those of least loss are.
    """

    max_layers: int | None = None
    max_bytes: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if self.max_layers is None and self.max_bytes is None and self.keep is None:
            raise InputError("calibration needs a limit: max_layers, max_bytes or keep")


@dataclass(frozen=True)
class Point:
    """Experts with some of the parts, and how well questions are answered with them.

    Attributes:
        config: has their layers and heads.
        nats: the loss, per token of the answer.
        kept: share of what experts in all layers gain over closed-book answering; not a number if they gain nothing.
        bytes: of one expert, of a passage of mean length.
    """

    config: HypernetworkConfig
    nats: float
    kept: float
    bytes: int


@dataclass(frozen=True)
class Calibration:
    """All points, from all parts down to one, and what they are to be compared with.

    Attributes:
        points: from the largest experts to the smallest.
        chosen: the one that fits the limits.
        closed_book, prompt: nats without the passage, and with it in the prompt.
        questions: how many were asked.
        files: those that they are from, with how many of each.
    """

    points: tuple[Point, ...]
    chosen: Point
    closed_book: float
    prompt: float
    questions: int
    files: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class _Recorded:
    """The passes over all batches with some experts: what every layer returned in each of them, and the loss."""

    config: HypernetworkConfig
    outputs: list[list[Any]]
    loss: float


class AnswerLoss:
    """The loss of questions' answers, in nats per token, with the questions' passages as experts of any parts.

    Args:
        examples: questions with an answer and the passage that states it.
        model, tokenizer: the LLM.
        config: of experts in all layers, with all heads.
        batch_size: questions at a time.
    """

    def __init__(
        self,
        examples: Sequence[TrainingExample],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: HypernetworkConfig,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        passages = cut_passages([example.passage for example in examples], tokenizer)
        drawn = [
            DrawnExample(example.question, example.answer, (passage,), (1.0,))
            for example, passage in zip(examples, passages, strict=True)
        ]
        # Logits are computed for as many tokens as the longest answer of a batch has.
        drawn.sort(key=lambda example: len(example.answer))
        self._batches = [drawn[begin : begin + batch_size] for begin in range(0, len(drawn), batch_size)]
        hypernetwork = Hypernetwork(config).to(model.device).eval().requires_grad_(False)
        store = ExpertStore(hypernetwork, model, tokenizer, device_bytes=2**62)
        store.prepare(passages)
        units = store.units(passages)
        self.mean_tokens = sum(units) / len(units)
        # Of each batch once, for every measurement needs the same.
        self._rows = [
            store.rows([example.passages for example in batch], [example.gates for example in batch], [0] * len(batch))
            for batch in self._batches
        ]
        self._recorded: _Recorded | None = None

    def without_experts(self, knowledge: bool) -> float:
        """Closed-book, or with the passage in the prompt (``knowledge``)."""
        return _mean(self._losses(batch, knowledge) for batch in self._batches)

    def with_experts(self, config: HypernetworkConfig, near: HypernetworkConfig | None = None) -> float:
        """With the experts of ``config``, which has some of the layers and heads.

        Args:
            near: another choice of them. Its passes are kept, until there is another, and the layers below the first
                difference do not run again.
        """
        if near is None:
            return _mean(self._with_experts(config, number) for number in range(len(self._batches)))
        if self._recorded is None or self._recorded.config != near:
            self._recorded = self._record(near)
        if config == near:
            return self._recorded.loss
        below, losses = _first_difference(config, near), []
        for number, outputs in enumerate(self._recorded.outputs):
            with replaying(self.model, outputs, below):
                losses.append(self._with_experts(config, number))
        return _mean(losses)

    def _record(self, config: HypernetworkConfig) -> _Recorded:
        self._recorded = None  # before there are others, for they are large
        kept, losses = [], []
        for number in range(len(self._batches)):
            with recording(self.model) as outputs:
                losses.append(self._with_experts(config, number))
            kept.append(outputs)
        return _Recorded(config, kept, _mean(losses))

    def _with_experts(self, config: HypernetworkConfig, number: int) -> list[float]:
        """The losses of one batch."""
        rows = self._rows[number]
        assert rows is not None and isinstance(rows.experts, AttentionExperts)
        if config.kv_heads is not None:
            rows = replace(rows, experts=rows.experts.part(AttentionShape.of(config)))
        with inject(self.model, config.layers, rows):
            return self._losses(self._batches[number], False)

    @torch.no_grad()
    def _losses(self, examples: list[DrawnExample], knowledge: bool) -> list[float]:
        batch = make_batch(examples, knowledge, self.tokenizer, end="")
        logits = answer_logits(self.model, batch, self.model.device)
        labels = batch.labels.to(logits.device)
        wanted = labels != IGNORED
        losses = torch.zeros_like(labels, dtype=torch.float32)
        losses[wanted] = functional.cross_entropy(logits[wanted], labels[wanted], reduction="none")
        return mean_over_targets(losses, labels).tolist()


def calibrate_on(
    files: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: HypernetworkConfig,
    limits: Limits,
    progress: Path,
    *,
    heads: bool = False,
    num_questions: int = 100,
    batch_size: int = 16,
    seed: int = 0,
) -> Calibration:
    """Calibrate on questions that come with passages, drawn by ``seed``.

    Args:
        files: of questions; as many are drawn from each.
        config: of experts in all layers.
        progress: as of `calibrate`.

    Raises:
        InputError: as of `calibrate`; or no question of a file has a passage with one of its answers.
    """
    drawn: list[TrainingExample] = []
    counts: list[tuple[str, int]] = []
    for file in files:
        examples = training_examples(read_questions(file), titles=True)
        if not examples:
            raise InputError(f"{file}: no question has a passage that contains one of its answers")
        counts.append((file, min(-(-num_questions // len(files)), len(examples))))
        drawn += random.Random(seed).sample(examples, counts[-1][1])
    identity = {
        "llm": llm_identity(model),
        "dtype": str(model.dtype),
        "questions": hashlib.sha256(json.dumps([asdict(example) for example in drawn]).encode()).hexdigest(),
        "heads": heads,
    }
    loss = AnswerLoss(drawn, model, tokenizer, config, batch_size)
    return replace(calibrate(loss, limits, progress, identity, heads=heads), files=tuple(counts))


def calibrate(
    loss: AnswerLoss, limits: Limits, progress: Path, identity: dict[str, Any], *, heads: bool = False
) -> Calibration:
    """Find the parts that carry the reading.

    Args:
        loss: measures; its configuration has all parts.
        limits: what is chosen in the end.
        progress: JSON Lines file of all measurements so far, which is made, read and added to.
        identity: of LLM, questions and everything else that decides a measurement.
        heads: a part is one key-value head of a layer instead of a layer.

    Raises:
        InputError: nothing fits the limits, experts in all layers gain nothing of which a share could be kept, or
            ``progress`` is of another calibration.
    """
    measured = _Measurements(progress, identity)
    whole = AttentionShape.of(loss.config)
    parts = [
        tuple((layer, head) for head in own)
        for layer, kept in zip(whole.layers, whole.kv_heads, strict=True)
        for own in ([(head,) for head in kept] if heads else [kept])
    ]
    closed = measured("closed_book", lambda: loss.without_experts(False))
    prompt = measured("prompt", lambda: loss.without_experts(True))

    def nats(some: Sequence[Part], near: Sequence[Part]) -> float:
        config, other = with_parts(loss.config, some), with_parts(loss.config, near)
        return measured(_name(config), lambda: loss.with_experts(config, other))

    points = []
    full = nats(parts, parts)
    if limits.keep is not None and full >= closed:
        raise InputError(
            f"answers cost {full:.3f} nats a token with experts in all layers and {closed:.3f} without any: there is "
            "no gain to keep a share of; give max_layers or max_bytes"
        )
    for some, value in tqdm(_shrinking(parts, nats), desc="Leaving out", total=len(parts), unit="part"):
        config = with_parts(loss.config, some)
        unit = footprint(config, loss.model.dtype).expert_bytes
        points.append(Point(config, value, _share(closed, value, full), round(unit * loss.mean_tokens)))
    questions = sum(map(len, loss._batches))
    return Calibration(tuple(points), choose(points, limits), closed, prompt, questions)


def _shrinking(
    parts: Sequence[Part], nats: Callable[[Sequence[Part], Sequence[Part]], float]
) -> Iterator[tuple[list[Part], float]]:
    """All parts, then ever fewer of them, and the loss of each selection.

    While more than half are there, two are left out at a time: at first most parts cost next to nothing.

    Args:
        nats: the loss with some parts, which are nearly those of the second argument.
    """
    kept, now = list(parts), nats(parts, parts)
    yield list(kept), now

    def leaving(part: Part) -> float:
        return nats([other for other in kept if other is not part], kept)

    # What each part's absence was last seen to cost.
    cost = {part: leaving(part) - now for part in tqdm(kept, "Leaving one out")}
    while len(kept) > 1:
        without = {}
        for part in sorted(kept, key=lambda part: cost[part])[:TRIED]:
            without[part] = leaving(part)
            cost[part] = without[part] - now
        cheapest = sorted(without, key=lambda part: without[part])
        out = cheapest[: 2 if len(kept) - 2 >= len(parts) / 2 else 1]
        kept = [part for part in kept if part not in out]
        now = nats(kept, kept)
        yield list(kept), now


def choose(points: Sequence[Point], limits: Limits) -> Point:
    """The point that fits the limits: the smallest that keeps enough, or the one of least loss.

    Raises:
        InputError: none fits.
    """
    fitting = [
        point
        for point in points
        if (limits.max_layers is None or len(point.config.layers) <= limits.max_layers)
        and (limits.max_bytes is None or point.bytes <= limits.max_bytes)
        and (limits.keep is None or point.kept >= limits.keep)
    ]
    if not fitting:
        smallest = min(point.bytes for point in points)
        raise InputError(
            f"no choice of layers keeps within the limits ({limits}); the smallest expert has {smallest:,} bytes, "
            "and experts in all layers keep 1"
        )
    if limits.keep is not None:
        return min(fitting, key=lambda point: (point.bytes, point.nats))
    return min(fitting, key=lambda point: (point.nats, point.bytes))


def _first_difference(one: HypernetworkConfig, other: HypernetworkConfig) -> int:
    """The lowest layer in which two configurations have not the same heads."""

    def heads(config: HypernetworkConfig) -> dict[int, tuple[int, ...]]:
        shape = AttentionShape.of(config)
        return dict(zip(shape.layers, shape.kv_heads, strict=True))

    first, second = heads(one), heads(other)
    return min(layer for layer in first.keys() | second.keys() if first.get(layer) != second.get(layer))


def _mean(losses: Iterable[list[float]]) -> float:
    found = [loss for batch in losses for loss in batch]
    return sum(found) / len(found)


def with_parts(config: HypernetworkConfig, parts: Sequence[Part]) -> HypernetworkConfig:
    """``config`` with the layers and heads of ``parts`` alone."""
    pairs = sorted(pair for part in parts for pair in part)
    layers = tuple(sorted({layer for layer, _ in pairs}))
    kept = tuple(tuple(head for own, head in pairs if own == layer) for layer in layers)
    every = all(len(heads) == config.num_kv_heads for heads in kept)
    return replace(config, layers=layers, kv_heads=None if every else kept)


def write_calibration(directory: Path, calibration: Calibration) -> None:
    """Write the curve as CSV and as a picture."""
    with atomic_file(directory / CALIBRATION) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layers", "kv_heads", "bytes", "nats", "kept", "chosen"])
        writer.writerow(["", "closed_book", 0, calibration.closed_book, 0.0, False])
        for point in calibration.points:
            kv_heads = point.config.kv_heads
            heads = "" if kv_heads is None else " ".join("+".join(map(str, own)) for own in kv_heads)
            chosen = point is calibration.chosen
            layers = " ".join(map(str, point.config.layers))
            writer.writerow([layers, heads, point.bytes, point.nats, point.kept, chosen])
        writer.writerow(["", "prompt", "", calibration.prompt, _kept_by_prompt(calibration), False])
    figure = _draw(calibration)
    with atomic_file(directory / CALIBRATION_PICTURE) as temporary:
        figure.savefig(temporary, format="png")


def _kept_by_prompt(calibration: Calibration) -> float:
    return _share(calibration.closed_book, calibration.prompt, calibration.points[0].nats)


def _share(closed_book: float, nats: float, full: float) -> float:
    return (closed_book - nats) / (closed_book - full) if full < closed_book else math.nan


def _draw(calibration: Calibration) -> Figure:
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = calibration.points
    axes.plot([p.bytes / 1000 for p in points], [p.kept for p in points], "o-", label="experts")
    axes.plot(calibration.chosen.bytes / 1000, calibration.chosen.kept, "o", ms=12, mfc="none", label="chosen")
    axes.axhline(_kept_by_prompt(calibration), color="C1", linestyle="--", label="passage in the prompt")
    axes.axhline(0, color="grey", linewidth=1, label="closed-book")
    for point in points:
        axes.annotate(
            str(len(point.config.layers)), (point.bytes / 1000, point.kept), (0, 6), textcoords="offset points"
        )
    axes.set_xlabel("kilobytes an expert (numbers: layers)")
    axes.set_ylabel("share of the gain over closed-book")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _name(config: HypernetworkConfig) -> str:
    return json.dumps([config.layers, config.kv_heads])


class _Measurements:
    """A file of what was measured, a line each; its first line says of what."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        if not path.is_file():
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(identity) + "\n", encoding="utf-8")
            return
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        if first != json.dumps(identity):
            raise InputError(f"{path}: measurements of another calibration; delete the file, or give another --out")
        *whole, rest = lines or [""]
        self.known = dict(json.loads(line) for line in whole)
        if rest:  # the last line of a run that was killed as it wrote
            with atomic_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in (first, *whole)), encoding="utf-8")

    def __call__(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self.known:
            self.known[name] = measure()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, self.known[name]]) + "\n")
        return self.known[name]
