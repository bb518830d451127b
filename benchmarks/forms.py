"""Forms of hypernetworks compared: the paper's form, the same with one option changed, and the memory form.

There are two worlds, the demo's and `benchmarks.relations`; the frozen LLM is the demo's. All forms are trained for the
same number of steps on the same examples, and evaluated on the same questions about unseen entities:

    single      with the passage that states the answer
    four        with that passage and three irrelevant ones, equal gates
    gated       with the same four, gates of 0.4 for the right one and 0.2 for each other
    diluted     with the same four, gates of 0.25 for the right one and 0 for the others
    shuffled    with another question's passage
    random      with a passage about another entity

A form's learning rate is the one of `RATES` with the lowest loss on held-out questions of the training side, in a
shorter training. Every run has a folder; finished runs are not repeated.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from benchmarks.options import Options
from benchmarks.relations import related_questions
from benchmarks.row import Row
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.demo.world import Side, make_world
from genpoe_plugin.demo.world_demo import LLM
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.files import atomic_file
from genpoe_plugin.llm.language_model import load_language_model
from genpoe_plugin.selection import controls
from genpoe_plugin.training.examples import training_examples
from genpoe_plugin.training.hypernetwork import train_hypernetwork
from genpoe_plugin.training.training_arguments import HypernetworkTraining
from genpoe_plugin.training.validation import Validation

LAYER, RANK = 2, 16  # the LLM has five layers; the rank is an eighth of its width, as in the paper
RATES = (1.5e-3, 4e-3)
SEEDS = (0, 1, 2)
OUT = Path("forms-out")
REACHED = 0.8
GATES = {"gated": (0.4, 0.2, 0.2, 0.2), "diluted": (0.25, 0.0, 0.0, 0.0)}
HELD_OUT = 0.04
"""Share of the training side's entities held out to choose the learning rate."""


@dataclass(frozen=True)
class World:
    """Size of a world, and number of training steps: to choose the learning rate, and for the final run."""

    entities: int
    tested: int
    rate_steps: int
    steps: int
    batch_size: int
    every: int


WORLDS = {"demo": World(2500, 70, 125, 500, 32, 50), "relations": World(4000, 60, 175, 450, 64, 50)}
QUICK = {"demo": World(200, 10, 10, 40, 16, 10), "relations": World(200, 10, 10, 40, 16, 10)}


@dataclass(frozen=True)
class Form:
    """A preset, with changes to the hypernetwork and to its training."""

    preset: str = "paper"
    changes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def titles(self) -> bool:
        return self.preset != "paper"

    def config(self) -> HypernetworkConfig:
        rank = {"rank": RANK} if self.preset == "paper" else {}
        return HypernetworkConfig.preset(self.preset, hidden_size=128, layer=LAYER, **rank, **self.changes)


FORMS = {
    "paper": Form(),
    "+ attention": Form(changes={"encoder": "attention", "normalise": True}),
    "+ contextual": Form(changes={"states": "contextual"}),
    "+ factored": Form(changes={"head": "factored", "base": "silent"}),
    "+ distractors": Form(training={"num_passages": 4}),
    "+ knowledge": Form(training={"knowledge": 0.1}),
    "+ distillation": Form(training={"distillation": 0.5}),
    "memory, one passage": Form("memory"),
    "memory": Form("memory", training={"num_passages": 4}),
}


def demo_questions(side: Side, entities: int, seed: int) -> list[Question]:
    """Questions of one side of the demo's world. The first of four passages has the answer, the others are random."""
    world = make_world(seed, entities if side == "train" else 1, entities if side == "test" else 1)
    passages = {passage.id: passage for passage in world.passages}
    names = sorted(passages)
    rng = random.Random(f"genpoe-forms-{side}-{seed}")
    questions = []
    for item in world.questions[side]:
        chosen = [passages[item.passage_id]]
        while len(chosen) < 4:
            other = passages[rng.choice(names)]
            if other not in chosen and item.value not in other.text:
                chosen.append(other)
        questions.append(Question(item.question, item.answers, tuple(_ranked(chosen))))
    return questions


def _ranked(passages: Sequence[Passage]) -> list[RetrievedPassage]:
    return [RetrievedPassage(one, 0.0, rank, has_answer=rank == 1) for rank, one in enumerate(passages, 1)]


def questions_of(world: str, side: Side, entities: int, seed: int) -> list[Question]:
    return (demo_questions if world == "demo" else related_questions)(side, entities, seed)


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Split into training questions and questions about held-out entities, by title of the first passage."""
    titles = sorted({question.passages[0].passage.title for question in questions})
    held = set(random.Random(0).sample(titles, max(1, round(HELD_OUT * len(titles)))))
    parts: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        parts[question.passages[0].passage.title in held].append(question)
    return parts


def conditions(questions: Sequence[Question], seed: int) -> dict[str, list[Question]]:
    """The questions under each condition but those of `GATES`, which use the questions of ``four``."""
    single = [replace(question, passages=question.passages[:1]) for question in questions]
    pool = [question.passages[0].passage for question in questions]
    shuffled = zip(single, controls.shuffled(single, seed), strict=True)
    return {
        "single": single,
        "four": list(questions),
        "shuffled": [replace(question, passages=passages) for question, passages in shuffled],
        "random": [
            replace(question, passages=controls.random_passages(question, pool, 1, seed)) for question in single
        ],
    }


class Curve:
    """A validation that also measures the training time up to each of its calls."""

    def __init__(self, validation: Validation) -> None:
        self.validation = validation
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def measure(self, generator: ExpertGenerator, process: int, processes: int) -> dict[str, float]:
        before = self.seconds[-1] if self.seconds else 0.0
        # Time before the first validation is not training.
        self.seconds.append(before + time.perf_counter() - self.since if self.seconds else 0.0)
        self.generator = generator
        measures = self.validation.measure(generator, process, processes)
        self.since = time.perf_counter()
        return measures


@dataclass(frozen=True)
class Run:
    """One training: to choose the learning rate, or for the table."""

    world: str
    form: str
    rate: float
    seed: int
    for_rate: bool = False
    quick: bool = False

    def directory(self, out: Path) -> Path:
        kind = "rates" if self.for_rate else "runs"
        return out / kind / self.world / f"{self.form.strip('+ ')}-{self.rate}-{self.seed}"


def train_and_evaluate(run: Run, out: Path) -> dict[str, Any]:
    """Train and evaluate a run, or read its scores if they exist."""
    directory = run.directory(out)
    scores = directory / "scores.json"
    if scores.is_file():
        return json.loads(scores.read_text(encoding="utf-8"))
    shutil.rmtree(directory, ignore_errors=True)
    torch.set_num_threads(1)
    world, form = (QUICK if run.quick else WORLDS)[run.world], FORMS[run.form]
    model, tokenizer = load_language_model(str(LLM), dtype="float32")
    train, held_out = split(questions_of(run.world, "train", world.entities, run.seed))
    if not form.titles:
        train, held_out = map(without_titles, (train, held_out))

    def validation(questions: Sequence[Question], num_passages: int = 1) -> Validation:
        return Validation(questions, model, tokenizer, layers=(LAYER,), num_passages=num_passages, batch_size=64)

    if run.for_rate:
        tests, curve = {}, Curve(validation(conditions(held_out, 0)["single"]))
    else:
        test = questions_of(run.world, "test", world.tested, run.seed)
        tests = conditions(test if form.titles else without_titles(test), run.seed)
        curve = Curve(validation(tests["single"]))
    arguments = HypernetworkTraining(
        max_steps=world.rate_steps if run.for_rate else world.steps,
        batch_size=world.batch_size,
        learning_rate=run.rate,
        validate_every=world.every,
        save_every=world.steps,
        seed=run.seed,
        **form.training,
    )
    examples = training_examples(train, titles=form.titles)
    progress = train_hypernetwork(
        form.config(),
        arguments,
        examples,
        model,
        tokenizer,
        directory,
        validation=curve,  # type: ignore[arg-type]
    )
    found = {
        "curve": [{**row, "seconds": seconds} for row, seconds in zip(progress.validations, curve.seconds, strict=True)]
    }
    for name, questions in tests.items():
        with torch.no_grad():
            found[name] = validation(questions, 4 if name == "four" else 1).measure(curve.generator, 0, 1)
        for name, gates in GATES.items() if tests else ():
            gated = validation(tests["four"], 4)
            gated.examples = [replace(example, gates=gates) for example in gated.examples]
            found[name] = gated.measure(curve.generator, 0, 1)
    with atomic_file(scores) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def without_titles(questions: Sequence[Question]) -> list[Question]:
    """Drop the titles of passages, as in the paper."""
    return [
        replace(
            question,
            passages=tuple(replace(item, passage=replace(item.passage, title="")) for item in question.passages),
        )
        for question in questions
    ]


def reached(curve: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """The first point of a curve with an EM of at least `REACHED`."""
    return next((row for row in curve if row["em"] >= REACHED), None)


def all_runs(out: Path, runs: Sequence[Run], title: str) -> list[dict[str, Any]]:
    """Run one training per processor in parallel, each with one thread."""
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_and_evaluate, run, out) for run in runs]
        return [future.result() for future in tqdm(futures, desc=title)]


def measure(options: Options) -> list[Row]:
    """Train all runs missing in ``out`` (default `OUT`), write its ``table.md``, and return the rows with aims."""
    out, quick = options.out or OUT, options.quick
    worlds = QUICK if quick else WORLDS
    rate_runs = [Run(world, form, rate, 0, True, quick) for world in worlds for form in FORMS for rate in RATES]
    losses: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run, found in zip(rate_runs, all_runs(out, rate_runs, "Choosing rates"), strict=True):
        losses.setdefault((run.world, run.form), []).append((found["curve"][-1]["loss"], run.rate))
    rates = {key: min(found)[1] for key, found in losses.items()}
    runs = [
        Run(world, form, rates[world, form], seed, False, quick)
        for seed in SEEDS[: 1 if quick else None]
        for world, form in rates
    ]
    scores: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run, found in zip(runs, all_runs(out, runs, "Training forms"), strict=True):
        scores.setdefault((run.world, run.form), []).append(found)
    text = markdown(scores, rates)
    with atomic_file(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    click.echo(text)
    return rows(scores)


def rows(scores: dict[tuple[str, str], list[dict[str, Any]]]) -> list[Row]:
    """Rows with the aims: memory beats the paper's form, and three irrelevant passages cost little."""

    def mean(world: str, form: str, condition: str, name: str = "em") -> float:
        return statistics.mean(found[condition][name] for found in scores[world, form])

    result = []
    for world in dict.fromkeys(world for world, _ in scores):
        for condition in ("single", "four"):
            ahead = min(
                mean(world, "memory", condition, name) - mean(world, "paper", condition, name) for name in ("em", "f1")
            )
            result.append(Row(f"forms.{world}_{condition}_ahead_of_paper", 100 * ahead, "points", ">= 0"))
        single = mean(world, "memory", "single")
        ratio = mean(world, "memory", "four") / single if single else 0.0
        result.append(Row(f"forms.{world}_four_over_single", ratio, "x", ">= 0.95"))
        result.append(Row(f"forms.{world}_shuffled", 100 * mean(world, "memory", "shuffled"), "EM"))
    return result


def markdown(scores: dict[tuple[str, str], list[dict[str, Any]]], rates: dict[tuple[str, str], float]) -> str:
    """One table per world: mean and range over seeds, and when each seed reached an EM of `REACHED`."""
    lines = []
    for world in dict.fromkeys(world for world, _ in scores):
        lines += [
            f"### {world}",
            "",
            "| form | rate | EM single | F1 single | EM four | EM gated | EM diluted | EM shuffled | EM random "
            f"| EM {REACHED} after |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (own_world, form), seeds in scores.items():
            if own_world == world:
                cells = [_spread(seeds, *key) for key in (("single", "em"), ("single", "f1"), ("four", "em"))]
                cells += [_spread(seeds, name, "em") for name in (*GATES, "shuffled", "random")]
                times = [reached(found["curve"]) for found in seeds]
                reached_after = "; ".join(
                    "not reached" if at is None else f"{at['step']} steps, {at['seconds']:.0f} s" for at in times
                )
                lines.append(f"| {form} | {rates[world, form]:g} | {' | '.join(cells)} | {reached_after} |")
        lines.append("")
    return "\n".join(lines)


def _spread(seeds: Sequence[dict[str, Any]], condition: str, name: str) -> str:
    values = [100 * found[condition][name] for found in seeds]
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
