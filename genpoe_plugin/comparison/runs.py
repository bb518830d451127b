"""Read lm_eval's result folders: every task of every run, with a score for every question.

Runs of any model (``genpoe``, ``hf``, ``vllm``) are read in the same way, from lm_eval's ``results_*.json`` and the
``samples_*.jsonl`` of ``--log_samples`` beside it. Broken or inconsistent results are left out, with a reason.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from genpoe_plugin import json_text
from genpoe_plugin.comparison.report_types import TASK_TYPES, TYPES, wrong_value
from genpoe_plugin.comparison.statistics import Floats
from genpoe_plugin.errors import InputError

_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
_ROUNDING = 1e-6
UNKNOWN, ABSENT = -1, 0


@dataclass(frozen=True)
class LeftOut:
    """A file (or one of its tasks) that is not compared.

    Attributes:
        path: the file.
        reason: the reason.
    """

    path: Path
    reason: str


@dataclass
class QuestionBook:
    """The questions of all runs, with their numbers.

    Questions of two runs are the same if text and accepted answers are the same. A question that occurs several times
    in a task has several numbers.

    Attributes:
        texts: text of each question.
        targets: accepted answers of each question.
    """

    texts: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    _numbers: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def number(self, text: str, target: str, time: int) -> int:
        """The number of the ``time``-th occurrence of a question; new questions are added."""
        number = self._numbers.setdefault((text, target, time), len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
            self.targets.append(target)
        return number


@dataclass(frozen=True, eq=False)
class Run:
    """One task of one lm_eval run. Arrays have one entry per question, in the order of the question numbers.

    Attributes:
        results, samples: paths of the files.
        task: the task.
        report: lm_eval's report on the whole run.
        questions: numbers in the question book, ascending.
        scores: for each metric (``metric@filter`` for a filter other than ``none``), one value per question.
        without_mean: metrics that are not a mean over questions, such as corpus BLEU; they are not compared.
        ranks: best rank of a passage with an answer among those of the doc; 0 if there is none, -1 if unknown.
        offsets: byte offset of each question's line in the samples.
        doc_ids: doc id of each question.
        prompt_keys: first 16 digits of each question's ``prompt_hash``.
        prompts, documents: digests of all prompts, and of all docs.
        brings_passages: whether docs have passages (``ctxs``).
    """

    results: Path
    samples: Path
    task: str
    report: dict[str, Any]
    questions: NDArray[np.int64]
    scores: dict[str, Floats]
    without_mean: tuple[str, ...]
    ranks: NDArray[np.int64]
    offsets: NDArray[np.int64]
    doc_ids: NDArray[np.int64]
    prompt_keys: NDArray[np.uint64]
    prompts: str
    documents: str
    brings_passages: bool

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        return self.report["config"]

    @property
    def task_config(self) -> dict[str, Any]:
        """The configuration of the task."""
        return self.report["configs"][self.task]

    @property
    def genpoe(self) -> dict[str, Any] | None:
        """The genpoe model's own record; None for other models."""
        return self.config.get("genpoe")

    @property
    def arguments(self) -> dict[str, Any]:
        """The model's arguments, from a dictionary or a string."""
        model_args = self.config.get("model_args") or {}
        if not isinstance(model_args, str):
            return model_args
        pairs = (pair.partition("=") for pair in model_args.split(",") if pair)
        return {name: value for name, _, value in pairs}

    @cached_property
    def date(self) -> str:
        """Date in the name of the results file; "" if there is none."""
        match = _DATE.search(self.results.name)
        return match[1] if match else ""

    def higher_is_better(self, metric: str) -> bool:
        """Whether higher values of a metric are better; true unless the report says otherwise."""
        stated = self.report.get("higher_is_better", {}).get(self.task, {})
        return stated.get(metric.partition("@")[0]) is not False

    def sample(self, place: int) -> dict[str, Any]:
        """Read the logged sample of a question."""
        return _line_at(self.samples, int(self.offsets[place]))


def read_runs(paths: Sequence[Path], book: QuestionBook) -> tuple[list[Run], list[LeftOut]]:
    """Read all runs in folders and result files.

    Args:
        paths: folders and result files.
        book: the questions; new ones are added.

    Returns:
        The runs, and the files and tasks that were left out.

    Raises:
        InputError: a path does not exist, or no run can be used.
    """
    files: dict[Path, None] = {}
    for path in paths:
        in_path = _result_files(path)
        if not in_path:
            raise InputError(f"{path}: no lm_eval results (results_*.json); give the --output_path of lm_eval")
        files.update(dict.fromkeys(in_path))
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for file in files:
        try:
            report = read_report(file)
        except InputError as error:
            left_out.append(LeftOut(file, _reason(error, file)))
            continue
        for task in report["configs"]:
            try:
                runs.append(_read_run(file, report, task, book))
            except InputError as error:
                left_out.append(LeftOut(file, f"task {task}: {_reason(error, file)}"))
            except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
                reason = f"{type(error).__name__}: {error}"
                left_out.append(LeftOut(file, f"task {task}: not in lm_eval's format ({reason}); run it again"))
    if not runs:
        first = f"; {left_out[0].path}: {left_out[0].reason}" if left_out else ""
        raise InputError(f"{', '.join(map(str, paths))}: nothing to compare{first}")
    return runs, left_out


def _reason(error: InputError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")


def _result_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file.resolve() for file in path.rglob("*.json") if _DATE.search(file.name))
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    return [path.resolve()]


def read_report(file: Path) -> dict[str, Any]:
    """Read lm_eval's report on a run.

    Raises:
        InputError: the file is incomplete, or not a report of lm_eval.
    """
    try:
        report = parse_json(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    required = ("results", "configs", "versions", "config", "n-shot")
    if not isinstance(report, dict) or (missing := [name for name in required if name not in report]):
        names = ", ".join(missing) if isinstance(report, dict) else "an object"
        raise InputError(f"{file}: not the results of lm_eval 0.4 ({names} missing)")
    if wrong := [name for name in required if not isinstance(report[name], dict)]:
        raise InputError(f"{file}: not the results of lm_eval 0.4 ({wrong[0]} is not an object)")
    if wrong_one := wrong_value(report, TYPES):
        raise InputError(f"{file}: not the results of lm_eval 0.4 (a wrong value of {wrong_one})")
    report.pop("pretty_env_info", None)
    return report


def parse_json(text: bytes) -> Any:
    """Parse JSON with orjson, or with the standard library for the NaN that lm_eval writes.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json_text.parse_json(text.decode())


def read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON Lines file, each with its byte offset.

    Raises:
        InputError: a line is not JSON, or the file cannot be read.
    """
    offset = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = parse_json(line)
                except ValueError as error:
                    raise InputError(f"{file}:{number}: not valid JSON ({error}); was the run killed?") from error
                yield offset, record
                offset += len(line)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error


def prompt_key(prompt_hash: str) -> int:
    """The entry of `Run.prompt_keys` for a ``prompt_hash``.

    Raises:
        ValueError: it is not a hash.
    """
    return int(prompt_hash[:16], 16)


def _line_at(file: Path, offset: int) -> dict[str, Any]:
    with file.open("rb") as lines:
        lines.seek(offset)
        return parse_json(lines.readline())


class _Samples:
    """The content of a file of samples, by filter, in the file's order."""

    def __init__(self, file: Path, book: QuestionBook, metrics: Sequence[str]) -> None:
        self.questions: defaultdict[str, list[int]] = defaultdict(list)
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.ranks: list[int] = []
        self.offsets: list[int] = []
        self.doc_ids: list[int] = []
        self.hashes: list[str] = []
        self.prompts: list[str] = []
        self.documents: list[str] = []
        self.brings_passages = False
        self.skipped: set[str] = set()
        occurrences: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        for offset, record in read_lines(file):
            try:
                name, document = record["filter"], record["doc"]
                hashes = [record["doc_hash"], record["prompt_hash"], record["target_hash"]]
                text, target = document.get("question"), record["target"]
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{file}: not lm_eval's samples (no {error})") from error
            # Tasks name the text differently; without a field "question", the doc's hash identifies the question.
            text = text if isinstance(text, str) and text else hashes[0]
            occurrences[name][text, target] += 1
            self.questions[name].append(book.number(text, target, occurrences[name][text, target]))
            self.hashes += hashes
            for metric in metrics:
                value = record.get(metric)
                key = metric if name == "none" else f"{metric}@{name}"
                if isinstance(value, int | float):
                    self.values[key].append(value)
                elif metric in record:
                    self.skipped.add(key)  # part of a statistic of the whole run, such as BLEU
            if name == next(iter(self.questions)):
                self.offsets.append(offset)
                self.doc_ids.append(record["doc_id"])
                self.prompts.append(hashes[1])
                self.documents.append(hashes[0])
                passages = document.get("ctxs")
                self.brings_passages |= bool(passages)
                self.ranks.append(_best_rank(passages) if isinstance(passages, list) and passages else UNKNOWN)


def _best_rank(passages: list[Any]) -> int:
    """The best rank of a passage with an answer, after reranking if there was any; 0 without such a passage."""
    best = ABSENT
    for place, passage in enumerate(passages, 1):
        if not isinstance(passage, dict) or passage.get("has_answer") is None:
            return UNKNOWN
        if passage["has_answer"]:
            rank = passage.get("rerank_rank") or passage.get("rank") or place
            best = min(best or rank, rank)
    return best


def _read_run(file: Path, report: dict[str, Any], task: str, book: QuestionBook) -> Run:
    if not isinstance(report["configs"][task], dict) or wrong_value(report["configs"][task], TASK_TYPES):
        raise InputError("its configuration is not in lm_eval's format")
    date = _DATE.search(file.name)
    samples = file.with_name(f"samples_{task}_{date[1]}.jsonl") if date else file
    if not date or not samples.is_file():
        raise InputError(f"no file of samples ({samples.name}); run lm_eval with --log_samples")
    stated = {
        key: value
        for key, value in report["results"].get(task, {}).items()
        if "," in key and not key.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    }
    read = _Samples(samples, book, list(dict.fromkeys(key.partition(",")[0] for key in stated)))
    if not read.offsets:
        raise InputError(f"{samples.name} is empty")
    expected = report.get("n-samples", {}).get(task, {}).get("effective")
    if expected is not None and len(read.offsets) != expected:
        raise InputError(f"{samples.name} has {len(read.offsets):,} of {expected:,} questions; run it again")
    digest = report.get("task_hashes", {}).get(task)
    if digest is not None and digest != hashlib.sha256("".join(read.hashes).encode()).hexdigest():
        raise InputError(f"{samples.name} does not belong to these results; run it again")
    first, *others = read.questions.values()
    if any(sorted(first) != sorted(other) for other in others):
        raise InputError(f"{samples.name}: the filters have different questions; run it again")
    places = {name: np.argsort(numbers, kind="stable") for name, numbers in read.questions.items()}
    order = next(iter(places.values()))
    aggregations = {
        entry["metric"]: entry.get("aggregation", "mean")
        for entry in report["configs"][task].get("metric_list") or ()
        if isinstance(entry, dict) and isinstance(entry.get("metric"), str)
    }
    scores: dict[str, Floats] = {}
    without_mean: list[str] = []
    for key, mean in stated.items():
        metric, _, name = key.partition(",")
        label = metric if name == "none" else f"{metric}@{name}"
        values = read.values.get(label, [])
        if label in read.skipped or name not in places or aggregations.get(metric, "mean") != "mean":
            without_mean.append(label)
            continue
        if len(values) != len(first):
            raise InputError(f"{samples.name}: {len(first) - len(values):,} samples have no {metric}; run it again")
        column = np.array(values, np.float64)[places[name]]
        if not np.isfinite(column).all():
            raise InputError(f"{samples.name}: {metric} is not a number for some samples")
        if abs(column.mean() - mean) > _ROUNDING:
            raise InputError(f"{metric} is {mean:.4f} in the results and {column.mean():.4f} over the samples")
        scores[label] = column
    if not scores:
        raise InputError("no metric that is a mean over questions")

    def arranged(values: list[int]) -> NDArray[np.int64]:
        return np.array(values, np.int64)[order]

    prompts = hashlib.sha256("".join(read.prompts[place] for place in order).encode()).hexdigest()
    documents = hashlib.sha256("".join(sorted(read.documents)).encode()).hexdigest()
    return Run(
        results=file,
        samples=samples,
        task=task,
        report=report,
        questions=arranged(first),
        scores=scores,
        without_mean=tuple(without_mean),
        ranks=arranged(read.ranks),
        offsets=arranged(read.offsets),
        doc_ids=arranged(read.doc_ids),
        prompt_keys=np.array([prompt_key(value) for value in read.prompts], np.uint64)[order],
        prompts=prompts,
        documents=documents,
        brings_passages=read.brings_passages,
    )
