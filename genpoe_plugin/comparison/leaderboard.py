"""Leaderboards: rank comparable runs, with intervals, paired tests, checks of controls, and costs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genpoe_plugin.comparison.breakdown import Estimate, by_given, by_known, by_length, by_rank, estimate, known
from genpoe_plugin.comparison.comparability import Comparable, comparable, without_duplicates
from genpoe_plugin.comparison.counterparts import closed_book_of, control_of, rag_of
from genpoe_plugin.comparison.judging import Judging, judge_runs
from genpoe_plugin.comparison.passages_used import PassagesUsed, passages_used
from genpoe_plugin.comparison.runs import LeftOut, QuestionBook, Run, read_runs
from genpoe_plugin.comparison.settings import Settings, key, labels, settings_of, without_seed
from genpoe_plugin.comparison.statistics import (
    DRAWS,
    Floats,
    bootstrap_means,
    holm,
    mcnemar,
    paired_bootstrap,
    recovered_fractions,
    wins_and_losses,
)
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import EXPERT_MODES

SIGNIFICANT = 0.05
PREFERRED = ("em", "exact_match", "acc", "f1")
NO_KNOWLEDGE = "experts carry no passage knowledge"


@dataclass(frozen=True)
class Cost:
    """The cost per question, as a mean over seeds.

    Attributes:
        seconds: seconds per question; None if unknown.
        whole_command: whether the time is that of the whole command, because the model does not report its own time.
        peak_bytes: peak memory in bytes; None if unknown.
        memory_of: where the memory was measured, such as "GPU" or "process".
        first_token: seconds from the start of a batch to its first new token; None if unknown.
        expert_bytes: bytes of the experts of a question; None without experts, or if unknown.
    """

    seconds: float | None
    whole_command: bool
    peak_bytes: float | None
    memory_of: str
    first_token: float | None = None
    expert_bytes: float | None = None


@dataclass(frozen=True)
class Recovered:
    """The gain of a system over closed-book answering, as a fraction of the gain of RAG with the same LLM.

    Attributes:
        fraction, low, high: the fraction, with its 95 % interval.
        closed_book, rag: numbers of the two systems.
    """

    fraction: float
    low: float
    high: float
    closed_book: int
    rag: int


@dataclass(frozen=True, eq=False)
class System:
    """A row of a leaderboard: one run, or several runs that differ only in the seed.

    Attributes:
        number: number in the table, from 1.
        name: short hash of its settings, the same in every comparison.
        label: description of its settings among the systems of the board.
        settings: its settings without the seed.
        runs: its runs.
        scores: for each metric, one score per question, as a mean over seeds.
        estimates: for each metric, the mean score with its interval.
        seeds: for each metric, the lowest and highest mean of one seed; empty with one run.
        cost: time and memory.
        rank: best and worst rank that the significant differences allow; None for a control, which is not ranked.
        flag: a problem with its result.
        caution: a missing check of its result.
        used: the passages of the first run, if there is a trace.
        recovered: for a system with experts, the recovered fraction on the board's first metric; None if RAG's own gain
            is not significant.
        by_given, by_rank, by_length, by_known: the first run's scores on the board's first metric, broken down (see
            `breakdown`).
    """

    number: int
    name: str
    label: str
    settings: Settings
    runs: tuple[Run, ...]
    scores: dict[str, Floats]
    estimates: dict[str, Estimate]
    seeds: dict[str, tuple[float, float]]
    cost: Cost
    rank: tuple[int, int] | None = None
    flag: str | None = None
    caution: str | None = None
    used: PassagesUsed | None = None
    recovered: Recovered | None = None
    by_given: dict[str, Estimate] = field(default_factory=dict)
    by_rank: dict[str, Estimate] = field(default_factory=dict)
    by_length: dict[str, Estimate] = field(default_factory=dict)
    by_known: dict[str, Estimate] = field(default_factory=dict)

    @property
    def control(self) -> str | None:
        """The name of the control; None if the system is not a control."""
        passages = self.settings.get("passages", "retrieved")
        return None if passages == "retrieved" or self.settings.get("mode") == "closed_book" else passages


@dataclass(frozen=True)
class Pair:
    """The comparison of two systems on the same questions.

    Attributes:
        family: ``ranked`` (pairs of ranked systems) or ``controls`` (systems and their controls). Holm's correction is
            applied within each family.
        metric: the metric.
        first, second: positions in the board's systems.
        difference, low, high: first minus second, with the 95 % interval of the paired bootstrap.
        wins, losses: number of questions on which the first, or the second, scores higher.
        bootstrap: p-value of the paired bootstrap.
        mcnemar, exact: p-values of McNemar's mid-p and exact test; None if scores are not only 0 and 1.
        adjusted: McNemar's mid-p, or else the bootstrap's p-value, after Holm's correction.
    """

    family: str
    metric: str
    first: int
    second: int
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    bootstrap: float
    mcnemar: float | None
    exact: float | None
    adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the adjusted p-value is below 0.05."""
        return self.adjusted < SIGNIFICANT

    def reversed(self) -> Pair:
        """The same comparison with first and second system exchanged."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            difference=-self.difference,
            low=-self.high,
            high=-self.low,
            wins=self.losses,
            losses=self.wins,
        )


@dataclass(frozen=True, eq=False)
class Board:
    """A leaderboard of one task.

    Attributes:
        task: the task.
        metrics: the metrics that all runs have; the first one ranks.
        systems: ranked systems, best first, and then controls.
        pairs: comparisons of systems.
        group: the comparable runs.
    """

    task: str
    metrics: tuple[str, ...]
    systems: tuple[System, ...]
    pairs: tuple[Pair, ...]
    group: Comparable

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.group.runs[0].questions)

    @property
    def metric(self) -> str:
        """The metric that ranks."""
        return self.metrics[0]

    @property
    def sign(self) -> int:
        """1 if higher values of the ranking metric are better, -1 if lower ones are."""
        return 1 if self.group.runs[0].higher_is_better(self.metric) else -1

    def pair(self, first: int, second: int) -> Pair | None:
        """The comparison of two systems on the ranking metric, first minus second, by their positions."""
        for pair in self.pairs:
            if pair.metric == self.metric and (pair.first, pair.second) in ((first, second), (second, first)):
                return pair if pair.first == first else pair.reversed()
        return None


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of `compare`.

    Attributes:
        boards: the leaderboards.
        left_out: results that are not compared, with reasons.
        notes: remarks, such as traces that cannot be read.
        book: the questions.
        draws: number of bootstrap draws.
    """

    boards: tuple[Board, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    book: QuestionBook
    draws: int


def compare(
    paths: Sequence[Path],
    *,
    metric: str | None = None,
    allow: Collection[str] = (),
    draws: int = DRAWS,
    judging: Judging | None = None,
) -> Comparison:
    """Read all runs in ``paths`` and rank those that are comparable.

    Args:
        paths: folders and result files of lm_eval.
        metric: the metric that ranks; by default EM, or the main metric of tasks without EM.
        allow: aspects in which runs of one board may differ (`comparability.ALLOWABLE`).
        draws: number of bootstrap draws.
        judging: an LLM that judges the answers, which adds the metric ``judged``.

    Raises:
        InputError: nothing can be compared, no run has the metric, or there are no answers to judge.
    """
    book = QuestionBook()
    runs, left_out = read_runs(paths, book)
    runs, duplicates = without_duplicates(runs)
    notes: list[str] = []
    if judging is not None:
        runs, notes = judge_runs(runs, book, judging)
    if metric is not None and not any(metric in run.scores for run in runs):
        known_ones = sorted({name for run in runs for name in run.scores})
        raise InputError(f"metric {metric}: no run has it; the runs have {', '.join(known_ones)}")
    used: dict[int, PassagesUsed | None] = {}
    for run in runs:
        try:
            used[id(run)] = passages_used(run)
        except InputError as error:
            used[id(run)] = None
            notes.append(f"passages unknown: {error}")
    notes += dict.fromkeys(
        f"task {run.task}: {metric} is not a mean over questions, so it is not tested; see lm_eval's results"
        for run in runs
        for metric in run.without_mean
    )
    boards = tuple(_board(group, metric, used, draws) for group in comparable(runs, allow))
    return Comparison(boards, (*left_out, *duplicates), tuple(notes), book, draws)


def _board(group: Comparable, metric: str | None, used: Mapping[int, PassagesUsed | None], draws: int) -> Board:
    metrics = _metrics(group, metric)
    members: dict[str, list[Run]] = {}
    for run in group.runs:
        members.setdefault(key(without_seed(settings_of(run))), []).append(run)
    scores = {
        name: {metric: np.mean([run.scores[metric] for run in runs], 0) for metric in metrics}
        for name, runs in members.items()
    }
    sign = 1 if group.runs[0].higher_is_better(metrics[0]) else -1
    settings = {name: without_seed(settings_of(runs[0])) for name, runs in members.items()}
    order = sorted(members, key=lambda name: -sign * scores[name][metrics[0]].mean())
    shown = [members[name][0].arguments for name in order]
    systems = []
    for name, label in zip(order, labels([settings[name] for name in order], shown), strict=True):
        runs = sorted(members[name], key=lambda run: str(settings_of(run).get("seed", "")))
        system = System(
            number=0,
            name=hashlib.sha256(name.encode()).hexdigest()[:6],
            label=label,
            settings=settings[name],
            runs=tuple(runs),
            scores=scores[name],
            estimates={metric: estimate(scores[name][metric]) for metric in metrics},
            seeds={metric: _range([run.scores[metric] for run in runs]) for metric in metrics} if runs[1:] else {},
            cost=_cost(runs),
            used=used.get(id(runs[0])),
        )
        systems.append(system)
    systems.sort(key=lambda system: system.control is not None)
    systems = [replace(system, number=number) for number, system in enumerate(systems, 1)]
    resampled = _Resampled(systems, metrics, draws)
    pairs = _pairs(systems, metrics, resampled)
    systems = _ranked(systems, pairs, metrics[0], sign)
    systems = _checked(systems, pairs, metrics[0], sign)
    systems = _recovering(systems, resampled, sign)
    systems = _broken_down(systems, metrics[0])
    return Board(group.task, metrics, tuple(systems), tuple(pairs), group)


def _metrics(group: Comparable, metric: str | None) -> tuple[str, ...]:
    """The metrics that all runs have, beginning with the one that ranks."""
    shared = [name for name in group.runs[0].scores if all(name in run.scores for run in group.runs)]
    if not shared:
        raise InputError(f"task {group.task}: its runs have no metric in common")
    first = metric if metric in shared else next((name for name in PREFERRED if name in shared), shared[0])
    return (first, *(name for name in shared if name != first))


def _range(scores: Sequence[Floats]) -> tuple[float, float]:
    means = [float(column.mean()) for column in scores]
    return min(means), max(means)


def _cost(runs: Sequence[Run]) -> Cost:
    seconds, peaks, of, whole = [], [], "", False
    first_tokens, expert_bytes = [], []
    for run in runs:
        genpoe = run.genpoe or {}
        questions = genpoe.get("questions")
        if genpoe.get("seconds") and questions:
            seconds.append(sum(genpoe["seconds"].values()) / questions)
        elif run.report.get("total_evaluation_time_seconds"):
            whole = True
            samples = sum(counts.get("effective") or 0 for counts in (run.report.get("n-samples") or {}).values())
            seconds.append(float(run.report["total_evaluation_time_seconds"]) / max(1, samples))
        if (memory := genpoe.get("peak_memory") or {}).get("bytes") is not None:
            peaks.append(memory["bytes"])
            of = memory.get("of") or ""
        if genpoe.get("first_token_seconds") is not None:
            first_tokens.append(genpoe["first_token_seconds"])
        if genpoe.get("expert_bytes") is not None and questions:
            expert_bytes.append(genpoe["expert_bytes"] / questions)
    return Cost(_mean(seconds), whole, _mean(peaks), of, _mean(first_tokens), _mean(expert_bytes))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


class _Resampled:
    """The scores of all systems on all metrics, and their means over resampled questions.

    Attributes:
        scores: ``[questions, metrics * systems]``, the systems of the first metric first.
        means: means over questions, ``[metrics * systems]``.
    """

    def __init__(self, systems: Sequence[System], metrics: Sequence[str], draws: int) -> None:
        self.scores = np.stack([system.scores[metric] for metric in metrics for system in systems], 1)
        self.means = self.scores.mean(0)
        self._draws = draws

    @cached_property
    def resampled(self) -> Floats:
        """The means of `bootstrap_means`, ``[draws, metrics * systems]``."""
        return bootstrap_means(self.scores, self._draws)


def _pairs(systems: Sequence[System], metrics: Sequence[str], resampled: _Resampled) -> list[Pair]:
    families = {"ranked": _all_pairs(systems), "controls": _with_controls(systems)}
    families = {name: pairs for name, pairs in families.items() if len(pairs)}
    scores = resampled.scores
    comparisons: list[Pair] = []
    for family, places in families.items():
        for number, metric in enumerate(metrics):
            columns = places + number * len(systems)
            boot = paired_bootstrap(resampled.means, resampled.resampled, columns, len(scores))
            wins, losses = wins_and_losses(scores, columns)
            exact, mid = mcnemar(wins, losses)
            right_or_wrong = np.all(((scores == 0) | (scores == 1))[:, columns], axis=(0, 2))
            adjusted = holm(np.where(right_or_wrong, mid, boot.p))
            comparisons += [
                Pair(
                    family=family,
                    metric=metric,
                    first=int(first),
                    second=int(second),
                    difference=float(boot.difference[at]),
                    low=float(boot.low[at]),
                    high=float(boot.high[at]),
                    wins=int(wins[at]),
                    losses=int(losses[at]),
                    bootstrap=float(boot.p[at]),
                    mcnemar=float(mid[at]) if right_or_wrong[at] else None,
                    exact=float(exact[at]) if right_or_wrong[at] else None,
                    adjusted=float(adjusted[at]),
                )
                for at, (first, second) in enumerate(places)
            ]
    return comparisons


def _all_pairs(systems: Sequence[System]) -> NDArray[np.intp]:
    ranked = sum(system.control is None for system in systems)
    return np.stack(np.triu_indices(ranked, 1), 1)


def _with_controls(systems: Sequence[System]) -> NDArray[np.intp]:
    settings = [system.settings for system in systems]
    pairs = [
        (first, second)
        for first, system in enumerate(systems)
        for second in (control_of(system.settings, control, settings) for control in _controls(systems))
        if system.control is None and second is not None
    ]
    return np.array(pairs, np.intp).reshape(-1, 2)


def _controls(systems: Sequence[System]) -> list[str]:
    return list(dict.fromkeys(system.control for system in systems if system.control is not None))


def _ranked(systems: Sequence[System], pairs: Sequence[Pair], metric: str, sign: int) -> list[System]:
    ranked = sum(system.control is None for system in systems)
    better, worse = [0] * len(systems), [0] * len(systems)
    for pair in pairs:
        if pair.family == "ranked" and pair.metric == metric and pair.significant:
            winner, loser = (pair.first, pair.second) if sign * pair.difference > 0 else (pair.second, pair.first)
            better[loser] += 1
            worse[winner] += 1
    return [
        replace(system, rank=(1 + better[place], ranked - worse[place])) if system.control is None else system
        for place, system in enumerate(systems)
    ]


def _checked(systems: Sequence[System], pairs: Sequence[Pair], metric: str, sign: int) -> list[System]:
    """Flag systems with experts whose shuffled control is not significantly worse."""
    settings = [system.settings for system in systems]
    checked = []
    for place, system in enumerate(systems):
        if system.control is None and system.settings.get("mode") in EXPERT_MODES:
            shuffled = control_of(system.settings, "shuffled", settings)
            if shuffled is None:
                caution = "no shuffled control: it is not tested whether experts carry passage knowledge"
                system = replace(system, caution=caution)
            else:
                pair = next(
                    pair for pair in pairs if (pair.first, pair.second, pair.metric) == (place, shuffled, metric)
                )
                if not (pair.significant and sign * pair.difference > 0):
                    score, control = system.estimates[metric].mean, systems[shuffled].estimates[metric].mean
                    scores = f"{metric} {score:.3f} with its passages, {control:.3f} with another question's"
                    system = replace(system, flag=f"{NO_KNOWLEDGE} ({scores}, p = {pair.adjusted:.2g})")
        checked.append(system)
    return checked


def _recovering(systems: Sequence[System], resampled: _Resampled, sign: int) -> list[System]:
    """Add the recovered fraction to systems with experts of retrieved or of gold passages."""
    settings = [system.settings for system in systems]
    found: dict[int, tuple[int, int]] = {}
    for place, system in enumerate(systems):
        if system.settings.get("mode") in EXPERT_MODES and system.control in (None, "gold"):
            closed_book, rag = closed_book_of(system.settings, settings), rag_of(system.settings, settings)
            if closed_book is not None and rag is not None:
                found[place] = closed_book, rag
    if not found:
        return list(systems)
    n, means, draws = len(resampled.scores), resampled.means, resampled.resampled
    gains = np.array([(rag, closed_book) for closed_book, rag in found.values()], np.intp)
    gain = paired_bootstrap(means, draws, gains, n)
    gained = (gain.p < SIGNIFICANT) & (sign * gain.difference > 0)
    triples = np.array([(place, *others) for place, others in found.items()], np.intp)[gained]
    columns = zip(*recovered_fractions(means, draws, triples, n), strict=True)
    recovered = {
        int(place): Recovered(float(fraction), float(low), float(high), closed_book + 1, rag + 1)
        for (place, closed_book, rag), (fraction, low, high) in zip(triples.tolist(), columns, strict=True)
        if np.isfinite([low, high]).all()
    }
    return [replace(system, recovered=recovered.get(place)) for place, system in enumerate(systems)]


def _broken_down(systems: Sequence[System], metric: str) -> list[System]:
    traced = [system.used for system in systems if system.used and system.control is None]
    ranks = [used.ranks for used in traced] + [run.ranks for system in systems for run in system.runs]
    retrieved = next(filter(known, ranks), None)
    lengths = next(filter(known, (used.lengths for used in traced)), None)
    settings = [system.settings for system in systems]
    broken_down = []
    for place, system in enumerate(systems):
        scores = system.runs[0].scores[metric]
        closed_book = closed_book_of(system.settings, settings)
        closed_book = None if closed_book == place else closed_book
        added = replace(
            system,
            by_given=by_given(scores, system.used.answer_given) if system.used else {},
            by_rank=by_rank(scores, retrieved) if retrieved is not None else {},
            by_length=by_length(scores, lengths) if lengths is not None else {},
            by_known={} if closed_book is None else by_known(scores, systems[closed_book].scores[metric]),
        )
        broken_down.append(added)
    return broken_down
