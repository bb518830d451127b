"""Which form of hypernetwork learns what: the paper's, each option on top of it alone, and the memory form.

Two worlds, the demo's and `benchmarks.relations`; the LLM is the demo's, frozen. Every form takes the same steps over
the same examples and is asked the same questions, about entities that it has not seen:

    single      with the passage that states the answer
    four        with that and three that do not, all gates equal: no reranker says which
    gated       with the same four, by a reranker that is barely right: gates of 0.4 and three of 0.2
    diluted     with the same four, but those that do not at gates of 0, and the other still at a quarter
    shuffled    with another question's passage
    random      with some other person's, place's or organisation's

Each form's learning rate is the one of `RATES` with the lowest loss on held-out questions of the training side, after
a training of fewer steps. A run is a folder; those that are there already are not trained again.
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
from genpoe_plugin.demo.run import LLM
from genpoe_plugin.demo.world import Side, make_world
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.files import atomic_file
from genpoe_plugin.llm.language_model import load_language_model
from genpoe_plugin.selection import controls
from genpoe_plugin.training.examples import training_examples
from genpoe_plugin.training.hypernetwork import train_hypernetwork
from genpoe_plugin.training.training_arguments import HypernetworkTraining
from genpoe_plugin.training.validation import Validation

LAYER, RANK = 2, 16  # of five layers; the paper's rank is an eighth of the width as well
RATES = (1.5e-3, 4e-3)
SEEDS = (0, 1, 2)
OUT = Path("forms-out")
REACHED = 0.8
GATES = {"gated": (0.4, 0.2, 0.2, 0.2), "diluted": (0.25, 0.0, 0.0, 0.0)}
HELD_OUT = 0.04
"""Share of the training side's entities that only choose the learning rate."""


@dataclass(frozen=True)
class World:
    """A world's size, and how long is trained on it: to choose a rate, and then."""

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
    """A preset, and what is changed of the hypernetwork and of its training."""

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
    """The demo world's questions of one side; of four passages the first states the answer, the others are drawn."""
    world = make_world(seed, entities if side == "train" else 1, entities if side == "test" else 1)
    passages = {passage.id: passage for passage in world.passages}
    names = sorted(passages)
    rng = random.Random(f"genpoe-forms-{side}-{seed}")
    questions = []
    for asked in world.questions[side]:
        given = [passages[asked.passage_id]]
        while len(given) < 4:
            other = passages[rng.choice(names)]
            if other not in given and asked.value not in other.text:
                given.append(other)
        questions.append(Question(asked.question, asked.answers, tuple(_ranked(given))))
    return questions


def _ranked(passages: Sequence[Passage]) -> list[RetrievedPassage]:
    return [RetrievedPassage(one, 0.0, rank, has_answer=rank == 1) for rank, one in enumerate(passages, 1)]


def questions_of(world: str, side: Side, entities: int, seed: int) -> list[Question]:
    return (demo_questions if world == "demo" else related_questions)(side, entities, seed)


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Those to learn from, and those about held-out entities, told by the passage that answers."""
    titles = sorted({question.passages[0].passage.title for question in questions})
    held = set(random.Random(0).sample(titles, max(1, round(HELD_OUT * len(titles)))))
    parts: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        parts[question.passages[0].passage.title in held].append(question)
    return parts


def conditions(questions: Sequence[Question], seed: int) -> dict[str, list[Question]]:
    """What each question is asked with."""
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
    """A validation that keeps count of the seconds between, which are those of training."""

    def __init__(self, validation: Validation) -> None:
        self.validation = validation
        self.seconds: list[float] = []
        self.since = time.perf_counter()

    def measure(self, generator: ExpertGenerator, process: int, processes: int) -> dict[str, float]:
        before = self.seconds[-1] if self.seconds else 0.0
        # What comes before the first measurement is no training.
        self.seconds.append(before + time.perf_counter() - self.since if self.seconds else 0.0)
        self.generator = generator
        measures = self.validation.measure(generator, process, processes)
        self.since = time.perf_counter()
        return measures


@dataclass(frozen=True)
class Run:
    """One training, to choose a rate or to be told of."""

    world: str
    form: str
    rate: float
    seed: int
    for_rate: bool = False
    quick: bool = False

    def directory(self, out: Path) -> Path:
        kind = "rates" if self.for_rate else "runs"
        return out / kind / self.world / f"{self.form.strip('+ ')}-{self.rate}-{self.seed}"


def carry_out(run: Run, out: Path) -> dict[str, Any]:
    """Train and ask, unless the folder has the scores."""
    directory = run.directory(out)
    scores = directory / "scores.json"
    if scores.is_file():
        return json.loads(scores.read_text(encoding="utf-8"))
    shutil.rmtree(directory, ignore_errors=True)
    torch.set_num_threads(1)
    world, form = (QUICK if run.quick else WORLDS)[run.world], FORMS[run.form]
    model, tokenizer = load_language_model(str(LLM), dtype="float32")
    learnt_from, held_out = split(questions_of(run.world, "train", world.entities, run.seed))
    if not form.titles:
        learnt_from, held_out = map(without_titles, (learnt_from, held_out))

    def asked(questions: Sequence[Question], most: int = 1) -> Validation:
        return Validation(questions, model, tokenizer, layers=(LAYER,), num_passages=most, batch_size=64)

    if run.for_rate:
        tests, curve = {}, Curve(asked(conditions(held_out, 0)["single"]))
    else:
        test = questions_of(run.world, "test", world.tested, run.seed)
        tests = conditions(test if form.titles else without_titles(test), run.seed)
        curve = Curve(asked(tests["single"]))
    arguments = HypernetworkTraining(
        max_steps=world.rate_steps if run.for_rate else world.steps,
        batch_size=world.batch_size,
        learning_rate=run.rate,
        validate_every=world.every,
        save_every=world.steps,
        seed=run.seed,
        **form.training,
    )
    examples = training_examples(learnt_from, titles=form.titles)
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
            found[name] = asked(questions, 4 if name == "four" else 1).measure(curve.generator, 0, 1)
        for name, gates in GATES.items() if tests else ():
            weighed = asked(tests["four"], 4)
            weighed.examples = [replace(example, gates=gates) for example in weighed.examples]
            found[name] = weighed.measure(curve.generator, 0, 1)
    with atomic_file(scores) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def without_titles(questions: Sequence[Question]) -> list[Question]:
    """The paper's passages are their texts alone."""
    return [
        replace(
            question,
            passages=tuple(replace(item, passage=replace(item.passage, title="")) for item in question.passages),
        )
        for question in questions
    ]


def reached(curve: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """The first point of a curve with an EM of `REACHED`."""
    return next((row for row in curve if row["em"] >= REACHED), None)


def all_runs(out: Path, runs: Sequence[Run], title: str) -> list[dict[str, Any]]:
    """One run a processor at a time, each with one thread."""
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(carry_out, run, out) for run in runs]
        return [future.result() for future in tqdm(futures, desc=title)]


def measure(options: Options) -> list[Row]:
    """Train everything that ``out`` (by default `OUT`) lacks, write its ``table.md``, and tell the aims."""
    out, quick = options.out or OUT, options.quick
    worlds = QUICK if quick else WORLDS
    tried = [Run(world, form, rate, 0, True, quick) for world in worlds for form in FORMS for rate in RATES]
    losses: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run, found in zip(tried, all_runs(out, tried, "Choosing rates"), strict=True):
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
    told = markdown(scores, rates)
    with atomic_file(out / "table.md") as temporary:
        temporary.write_text(told, encoding="utf-8")
    click.echo(told)
    return rows(scores)


def rows(scores: dict[tuple[str, str], list[dict[str, Any]]]) -> list[Row]:
    """The aims: memory above the paper's form in every measure, and three irrelevant passages cost little."""

    def mean(world: str, form: str, condition: str, name: str = "em") -> float:
        return statistics.mean(found[condition][name] for found in scores[world, form])

    told = []
    for world in dict.fromkeys(world for world, _ in scores):
        for condition in ("single", "four"):
            ahead = min(
                mean(world, "memory", condition, name) - mean(world, "paper", condition, name) for name in ("em", "f1")
            )
            told.append(Row(f"forms.{world}_{condition}_ahead_of_paper", 100 * ahead, "points", ">= 0"))
        single = mean(world, "memory", "single")
        kept = mean(world, "memory", "four") / single if single else 0.0
        told.append(Row(f"forms.{world}_four_over_single", kept, "x", ">= 0.95"))
        told.append(Row(f"forms.{world}_shuffled", 100 * mean(world, "memory", "shuffled"), "EM"))
    return told


def markdown(scores: dict[tuple[str, str], list[dict[str, Any]]], rates: dict[tuple[str, str], float]) -> str:
    """A table a world: means over seeds with the range, and when each seed reached `REACHED`."""
    lines = []
    for world in dict.fromkeys(world for world, _ in scores):
        lines += [
            f"### {world}",
            "",
            "| form | rate | EM single | F1 single | EM four | EM gated | EM diluted | EM shuffled | EM random "
            f"| EM {REACHED} after |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (where, form), seeds in scores.items():
            if where == world:
                cells = [_spread(seeds, *key) for key in (("single", "em"), ("single", "f1"), ("four", "em"))]
                cells += [_spread(seeds, name, "em") for name in (*GATES, "shuffled", "random")]
                times = [reached(found["curve"]) for found in seeds]
                told = "; ".join(
                    "not reached" if at is None else f"{at['step']} steps, {at['seconds']:.0f} s" for at in times
                )
                lines.append(f"| {form} | {rates[world, form]:g} | {' | '.join(cells)} | {told} |")
        lines.append("")
    return "\n".join(lines)


def _spread(seeds: Sequence[dict[str, Any]], condition: str, name: str) -> str:
    values = [100 * found[condition][name] for found in seeds]
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
