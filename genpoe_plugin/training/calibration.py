"""Calibration: measure which layers of an LLM, or which of their key-value heads, read passages.

It starts with experts of the form ``attention`` in all layers and removes them part by part (a part is a layer, or one
key-value head of a layer). The criterion is the loss of questions' answers with the right passage as expert. First each
part is removed alone; then parts are removed greedily, the cheapest first. Every measurement is saved at once, so an
interrupted calibration can resume.
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
from genpoe_plugin.json_text import parse_json
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.training.batches import IGNORED, answer_logits, make_batch, mean_over_targets
from genpoe_plugin.training.examples import DrawnExample, TrainingExample, training_examples

NUM_CANDIDATES = 4  # parts whose loss is measured again before one is removed

Part = tuple[tuple[int, int], ...]
"""Pairs of layer and key-value head that are removed together."""


@dataclass(frozen=True)
class Limits:
    """Limits on the experts that a calibration chooses; at least one must be set.

    Attributes:
        max_layers: largest number of layers.
        max_bytes: largest size in bytes of one expert, for a passage of mean length.
        keep: smallest share of the gain over closed-book answering that experts in all layers have. With it, the
            smallest fitting experts are chosen; without it, those with the lowest loss.

    Raises:
        InputError: no limit is set.
    """

    max_layers: int | None = None
    max_bytes: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if self.max_layers is None and self.max_bytes is None and self.keep is None:
            raise InputError("calibration needs a limit: max_layers, max_bytes or keep")


@dataclass(frozen=True)
class Point:
    """Experts with some of the parts, and their loss.

    Attributes:
        config: the configuration with these layers and heads.
        nats: loss per answer token, in nats.
        gain_share: share of the gain over closed-book answering that experts in all layers have; NaN if they have none.
        bytes: size of one expert, for a passage of mean length.
    """

    config: HypernetworkConfig
    nats: float
    gain_share: float
    bytes: int


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration: all points, and their baselines.

    Attributes:
        points: experts with all parts down to one part.
        chosen: the point that fits the limits.
        closed_book: loss without the passage, in nats per answer token.
        prompt: loss with the passage in the prompt, in nats per answer token.
        questions: number of questions.
        files: the questions' files, with the number of questions from each.
    """

    points: tuple[Point, ...]
    chosen: Point
    closed_book: float
    prompt: float
    questions: int
    files: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class _Recorded:
    """The forward passes over all batches with some experts: the outputs of every layer, and the loss."""

    config: HypernetworkConfig
    outputs: list[list[Any]]
    loss: float


class AnswerLoss:
    """Measures the loss of questions' answers, in nats per token, with the questions' passages as experts.

    Args:
        examples: questions with an answer and the passage that states it.
        model, tokenizer: the LLM.
        config: configuration of experts in all layers, with all heads.
        batch_size: questions per forward pass.
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
        # The longest answer of a batch decides how many logits are computed.
        drawn.sort(key=lambda example: len(example.answer))
        self._batches = [drawn[begin : begin + batch_size] for begin in range(0, len(drawn), batch_size)]
        hypernetwork = Hypernetwork(config).to(model.device).eval().requires_grad_(False)
        store = ExpertStore(hypernetwork, model, tokenizer, device_bytes=2**62)
        store.prepare(passages)
        units = store.units(passages)
        self.mean_tokens = sum(units) / len(units)
        # Prepared once, because every measurement needs the same experts.
        self._rows = [
            store.rows([example.passages for example in batch], [example.gates for example in batch], [0] * len(batch))
            for batch in self._batches
        ]
        self._recorded: _Recorded | None = None

    def without_experts(self, knowledge: bool) -> float:
        """The loss closed-book, or with the passage in the prompt (``knowledge``)."""
        return _mean(self._losses(batch, knowledge) for batch in self._batches)

    def with_experts(self, config: HypernetworkConfig, near: HypernetworkConfig | None = None) -> float:
        """The loss with experts in the layers and heads of ``config``.

        Args:
            config: a configuration with some of the layers and heads.
            near: a similar configuration. Its forward passes are recorded (until another one is given), and layers
                below the first difference are replayed instead of run.
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
        self._recorded = None  # frees memory before new outputs are recorded
        all_outputs, losses = [], []
        for number in range(len(self._batches)):
            with recording(self.model) as outputs:
                losses.append(self._with_experts(config, number))
            all_outputs.append(outputs)
        return _Recorded(config, all_outputs, _mean(losses))

    def _with_experts(self, config: HypernetworkConfig, number: int) -> list[float]:
        """The losses of batch ``number``."""
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
        has_label = labels != IGNORED
        losses = torch.zeros_like(labels, dtype=torch.float32)
        losses[has_label] = functional.cross_entropy(logits[has_label], labels[has_label], reduction="none")
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
    """Calibrate on questions with passages, drawn by ``seed``.

    Args:
        files: question files; the same number of questions is drawn from each.
        model, tokenizer: the LLM.
        config: configuration of experts in all layers.
        limits: limits on the chosen experts.
        progress: file of measurements, as in `calibrate`.
        heads: whether a part is one key-value head instead of a layer.
        num_questions: number of questions from all files.
        batch_size: questions per forward pass.
        seed: seed of the drawn questions.

    Raises:
        InputError: see `calibrate`; or no question of a file has a passage with one of its answers.
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
    """Find the parts that read passages, by removing parts and measuring the loss.

    Args:
        loss: measures the loss; its configuration has all parts.
        limits: limits on the chosen experts.
        progress: JSON Lines file of all measurements; it is created, or read and appended to.
        identity: LLM, questions and everything else that decides a measurement.
        heads: whether a part is one key-value head instead of a layer.

    Raises:
        InputError: no experts fit the limits, ``keep`` is set but experts in all layers have no gain, or ``progress``
            belongs to another calibration.
    """
    measured = _Measurements(progress, identity)
    whole = AttentionShape.of(loss.config)
    parts = [
        tuple((layer, head) for head in group)
        for layer, kv_heads in zip(whole.layers, whole.kv_heads, strict=True)
        for group in ([(head,) for head in kv_heads] if heads else [kv_heads])
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
            f"the loss is {full:.3f} nats per token with experts in all layers and {closed:.3f} without experts: there "
            "is no gain to keep a share of; give max_layers or max_bytes"
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
    """Yield all parts, then fewer and fewer of them, each with its loss.

    Two parts are removed at a time as long as at least half remain, because most parts cost almost nothing at first.

    Args:
        parts: all parts.
        nats: the loss with the parts of its first argument; the second argument is a similar list of parts.
    """
    remaining, current = list(parts), nats(parts, parts)
    yield list(remaining), current

    def loss_without(part: Part) -> float:
        return nats([other for other in remaining if other is not part], remaining)

    # The latest measured increase of the loss when each part is removed.
    cost = {part: loss_without(part) - current for part in tqdm(remaining, "Leaving one out")}
    while len(remaining) > 1:
        without = {}
        for part in sorted(remaining, key=lambda part: cost[part])[:NUM_CANDIDATES]:
            without[part] = loss_without(part)
            cost[part] = without[part] - current
        cheapest = sorted(without, key=lambda part: without[part])
        removed = cheapest[: 2 if len(remaining) - 2 >= len(parts) / 2 else 1]
        remaining = [part for part in remaining if part not in removed]
        current = nats(remaining, remaining)
        yield list(remaining), current


def choose(points: Sequence[Point], limits: Limits) -> Point:
    """The best point within the limits: the smallest one with ``keep``, otherwise the one with the lowest loss.

    Raises:
        InputError: no point is within the limits.
    """
    fitting = [
        point
        for point in points
        if (limits.max_layers is None or len(point.config.layers) <= limits.max_layers)
        and (limits.max_bytes is None or point.bytes <= limits.max_bytes)
        and (limits.keep is None or point.gain_share >= limits.keep)
    ]
    if not fitting:
        smallest = min(point.bytes for point in points)
        raise InputError(
            f"no choice of layers is within the limits ({limits}); the smallest expert has {smallest:,} bytes, "
            "and experts in all layers have a share of 1"
        )
    if limits.keep is not None:
        return min(fitting, key=lambda point: (point.bytes, point.nats))
    return min(fitting, key=lambda point: (point.nats, point.bytes))


def _first_difference(one: HypernetworkConfig, other: HypernetworkConfig) -> int:
    """The lowest layer in which two configurations have different heads."""

    def heads(config: HypernetworkConfig) -> dict[int, tuple[int, ...]]:
        shape = AttentionShape.of(config)
        return dict(zip(shape.layers, shape.kv_heads, strict=True))

    first, second = heads(one), heads(other)
    return min(layer for layer in first.keys() | second.keys() if first.get(layer) != second.get(layer))


def _mean(losses: Iterable[list[float]]) -> float:
    flat = [loss for batch in losses for loss in batch]
    return sum(flat) / len(flat)


def with_parts(config: HypernetworkConfig, parts: Sequence[Part]) -> HypernetworkConfig:
    """``config`` restricted to the layers and heads of ``parts``."""
    pairs = sorted(pair for part in parts for pair in part)
    layers = tuple(sorted({layer for layer, _ in pairs}))
    kv_heads = tuple(tuple(head for other, head in pairs if other == layer) for layer in layers)
    complete = all(len(heads) == config.num_kv_heads for heads in kv_heads)
    return replace(config, layers=layers, kv_heads=None if complete else kv_heads)


def write_calibration(directory: Path, calibration: Calibration) -> None:
    """Write the calibration's points as CSV and as a picture."""
    with atomic_file(directory / CALIBRATION) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layers", "kv_heads", "bytes", "nats", "kept", "chosen"])
        writer.writerow(["", "closed_book", 0, calibration.closed_book, 0.0, False])
        for point in calibration.points:
            kv_heads = point.config.kv_heads
            heads = "" if kv_heads is None else " ".join("+".join(map(str, layer_heads)) for layer_heads in kv_heads)
            chosen = point is calibration.chosen
            layers = " ".join(map(str, point.config.layers))
            writer.writerow([layers, heads, point.bytes, point.nats, point.gain_share, chosen])
        writer.writerow(["", "prompt", "", calibration.prompt, _prompt_share(calibration), False])
    figure = _draw(calibration)
    with atomic_file(directory / CALIBRATION_PICTURE) as temporary:
        figure.savefig(temporary, format="png")


def _prompt_share(calibration: Calibration) -> float:
    return _share(calibration.closed_book, calibration.prompt, calibration.points[0].nats)


def _share(closed_book: float, nats: float, full: float) -> float:
    return (closed_book - nats) / (closed_book - full) if full < closed_book else math.nan


def _draw(calibration: Calibration) -> Figure:
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = calibration.points
    chosen = calibration.chosen
    axes.plot([p.bytes / 1000 for p in points], [p.gain_share for p in points], "o-", label="experts")
    axes.plot(chosen.bytes / 1000, chosen.gain_share, "o", ms=12, mfc="none", label="chosen")
    axes.axhline(_prompt_share(calibration), color="C1", linestyle="--", label="passage in the prompt")
    axes.axhline(0, color="grey", linewidth=1, label="closed-book")
    for point in points:
        axes.annotate(
            str(len(point.config.layers)), (point.bytes / 1000, point.gain_share), (0, 6), textcoords="offset points"
        )
    axes.set_xlabel("kilobytes per expert (numbers: layers)")
    axes.set_ylabel("share of the gain over closed-book")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _name(config: HypernetworkConfig) -> str:
    return json.dumps([config.layers, config.kv_heads])


class _Measurements:
    """A file of measurements, one per line; its first line is the calibration's identity."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        if not path.is_file():
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(identity) + "\n", encoding="utf-8")
            return
        first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if first != json.dumps(identity):
            raise InputError(f"{path}: measurements of another calibration; delete the file, or give another --out")
        *whole, rest = lines or [""]
        self.known = _measured(path, whole)
        if rest:  # an incomplete last line, from a killed run
            with atomic_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in (first, *whole)), encoding="utf-8")

    def __call__(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self.known:
            self.known[name] = measure()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, self.known[name]]) + "\n")
        return self.known[name]


def _measured(path: Path, lines: Sequence[str]) -> dict[str, float]:
    """The measurements in the lines of a file.

    Raises:
        InputError: a line is damaged.
    """
    try:
        known = dict(parse_json(line) for line in lines)
        if not all(isinstance(name, str) and isinstance(nats, float) for name, nats in known.items()):
            raise ValueError("no measurement")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it to start over") from error
    return known
