"""Judge saved answers by an LLM: an answer is right if "yes" is likelier than "no" after a prompt.

Each distinct answer to a question is judged once. Judgements are saved after every block, so an interrupted run goes on
where it stopped. They are a metric of their own, `METRIC`, and never part of another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from genpoe_plugin.comparison.runs import QuestionBook, Run, parse_json
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import only_writer, open_text, writing

METRIC = "judged"
YES, NO = " yes", " no"
FILE = "judgements.jsonl"
BLOCK = 64  # judgements that are saved together
_PLACES = ("question", "accepted", "answer")


class Judge(Protocol):
    """An LLM that judges."""

    name: str

    def log_likelihoods(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[list[float]]:
        """The log-likelihood, in nats, of every continuation after every prompt, ``[prompts, continuations]``."""


@dataclass(frozen=True)
class Judging:
    """How answers are judged.

    Attributes:
        judge: the LLM.
        prompt: the prompt, with the places ``{question}``, ``{accepted}`` and ``{answer}``.
        file: file of the judgements, JSON Lines. It may hold those of other judges and prompts.
    """

    judge: Judge
    prompt: str
    file: Path

    @property
    def prompt_digest(self) -> str:
        """First 16 digits of the prompt's SHA-256."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Item:
    """An answer to judge."""

    question: str
    accepted: tuple[str, ...]
    answer: str

    @property
    def digest(self) -> str:
        content = json.dumps([self.question, self.accepted, self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def read_prompt(path: Path | None = None) -> str:
    """The prompt in a file; by default the package's ``judge_prompt.txt``. Line breaks at its end are left out.

    Raises:
        InputError: there is no such file, or a place is missing in it.
    """
    if path is None:
        text = files("genpoe_plugin.comparison").joinpath("judge_prompt.txt").read_text(encoding="utf-8")
    else:
        with open_text(path) as file:
            text = file.read()
    if missing := [place for place in _PLACES if f"{{{place}}}" not in text]:
        raise InputError(
            f"{path}: a judge's prompt contains the places of {', '.join(_PLACES)}; {{{missing[0]}}} is missing"
        )
    return text.rstrip("\n")


def judge_runs(runs: Sequence[Run], book: QuestionBook, judging: Judging) -> tuple[list[Run], list[str]]:
    """Judge the answers of all runs that have any, and add the metric `METRIC` to them.

    Args:
        runs: the runs; likelihood tasks have no answers and stay as they are.
        book: the questions.
        judging: how to judge.

    Returns:
        The runs, and for every task a remark that names the judge and its agreement with EM.

    Raises:
        InputError: a task has no question texts, no run has answers, or the file is damaged or cannot be written.
    """
    items = {number: _items(run, book) for number, run in enumerate(runs)}
    items = {number: found for number, found in items.items() if found}
    if not items:
        raise InputError("--judge: the runs have no answers to judge; give runs of tasks that generate")
    right = _judged(dict.fromkeys(item for found in items.values() for item in found), judging)
    judged = [
        replace(run, scores={**run.scores, METRIC: np.array([right[item] for item in items[number]], np.float64)})
        if number in items
        else run
        for number, run in enumerate(runs)
    ]
    tasks = dict.fromkeys(runs[number].task for number in items)
    return judged, [_remark(task, [run for run in judged if run.task == task], judging) for task in tasks]


def _items(run: Run, book: QuestionBook) -> list[_Item]:
    """The answers of a run, in the order of its questions; empty if the task does not generate."""
    if run.task_config.get("output_type", "generate_until") != "generate_until":
        return []
    items = []
    for place, number in enumerate(run.questions.tolist()):
        sample = run.sample(place)
        document = sample["doc"]
        if not isinstance(document.get("question"), str):
            raise InputError(f"{run.samples}: docs of task {run.task} have no question to show the judge")
        accepted = document.get("answers") or [book.targets[number]]
        accepted = [accepted] if isinstance(accepted, str) else accepted
        answer = (sample.get("filtered_resps") or [""])[0]
        items.append(_Item(document["question"], tuple(map(str, accepted)), str(answer).strip()))
    return items


def _judged(items: dict[_Item, None], judging: Judging) -> dict[_Item, bool]:
    """Whether each item is right; missing judgements are made and saved."""
    known, _ = _saved(judging)
    if any(item.digest not in known for item in items):
        with only_writer(judging.file), writing(judging.file, "judgements that are saved are kept"):
            known, complete = _saved(judging)  # another process may have added some
            _judge_missing([item for item in items if item.digest not in known], known, complete, judging)
    return {item: known[item.digest] for item in items}


def _judge_missing(missing: Sequence[_Item], known: dict[str, bool], complete: int, judging: Judging) -> None:
    """Judge and save the missing items, and add them to the known ones, after ``complete`` bytes of the file."""
    with tqdm(total=len(missing), desc="Judging", unit="answer") as bar:
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            found = judging.judge.log_likelihoods([_fill(judging.prompt, item) for item in block], (YES, NO))
            lines = []
            for item, (yes, no) in zip(block, found, strict=True):
                known[item.digest] = yes > no
                facts = {"judge": judging.judge.name, "prompt": judging.prompt_digest, "item": item.digest}
                lines.append(json.dumps({**facts, "yes": yes, "no": no}) + "\n")
            with judging.file.open("ab") as file:  # after the first block: no file if there is no such LLM
                file.truncate(complete)
                complete += file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
            bar.update(len(block))


def _fill(prompt: str, item: _Item) -> str:
    texts = {"question": item.question, "accepted": "; ".join(item.accepted), "answer": item.answer}
    return re.sub(r"\{(question|accepted|answer)\}", lambda place: texts[place[1]], prompt)


def _saved(judging: Judging) -> tuple[dict[str, bool], int]:
    """The judgements of this judge with this prompt, by item.

    Returns:
        The judgements, and the bytes of the complete lines: a killed run may have left an incomplete one.

    Raises:
        InputError: the file is damaged or cannot be read.
    """
    found: dict[str, bool] = {}
    complete = 0
    try:
        with judging.file.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                complete += len(line)
                try:
                    record = parse_json(line)
                    if (record["judge"], record["prompt"]) == (judging.judge.name, judging.prompt_digest):
                        found[str(record["item"])] = float(record["yes"]) > float(record["no"])
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{judging.file}:{number}: not a judgement; delete the file to judge again"
                    ) from error
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{judging.file}: cannot be read ({error.strerror})") from error
    return found, complete


def _remark(task: str, runs: Sequence[Run], judging: Judging) -> str:
    text = f"task {task}: {METRIC} is by {judging.judge.name} with prompt {judging.prompt_digest}, not by people"
    compared = [run for run in runs if METRIC in run.scores and "em" in run.scores]
    if not compared:
        return text
    right = np.concatenate([run.scores[METRIC] for run in compared])
    exact = np.concatenate([run.scores["em"] for run in compared])
    same, kappa = agreement(right > 0, exact > 0)
    return f"{text}; it agrees with EM on {100 * same:.1f} % of {len(right):,} answers (Cohen's kappa {kappa:.2f})"


def agreement(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The share of equal entries of two boolean arrays, and Cohen's kappa (0 if chance alone explains all of them)."""
    same = float(np.mean(one == other))
    chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    return same, (same - chance) / (1 - chance) if chance < 1 else 0.0
