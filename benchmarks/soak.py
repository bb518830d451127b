"""Mixed requests for an hour: memory must stay flat, and no answer may differ from that of a fresh process.

Requests are drawn at random: a mode, a batch of 1 to 16 questions, up to four passages each, and an answer or its
likelihood. They go to `GenPoEModel`, and where vLLM is installed to `ExpertEngine` as well. The experts are in
the attention of the LLM. A fresh process computes each distinct request again, one at a time.

Memory is the resident memory of the process. Its growth is a straight line through the means of blocks of the second
half, because caches still fill in the first half. The noise is the line's standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.child import run_child
from benchmarks.evaluation import Models, Sizes, questions
from benchmarks.options import Options, folder_of
from benchmarks.row import Row
from benchmarks.vllm import run_in_one_process
from genpoe_plugin.model import GenPoEModel
from genpoe_plugin.prompts import EXPERT_MODES, MODES, PROMPT_MODES, closed_book_prompt, knowledge_block

FULL, QUICK = 3600.0, 10.0  # seconds
SIZES = Sizes(192, 6, 32, 0, 0, 0, (), (), (), 0)
POOL, PASSAGES, WORDS, NEW_TOKENS, MAX_BATCH = 200, 4, 30, 8, 16
BLOCKS = 10
TOLERANCE = 1e-3  # nats between likelihoods


@dataclass(frozen=True)
class Request:
    """A request: a question of the pool, with ``passages`` of its passages, to answer or to score."""

    question: int
    passages: int
    mode: str
    scores: bool


class Answerer(Protocol):
    """What is loaded."""

    def answer(self, requests: Sequence[Request]) -> list[str | float]:
        """The answer or the likelihood of each request; all have the same mode and kind."""


class Transformers:
    """`GenPoEModel` over a directory of `Models`."""

    modes = MODES

    def __init__(self, folder: Path) -> None:
        self.model = GenPoEModel.from_pretrained(folder / "llm", folder / "attention", dtype="float32")

    def answer(self, requests: Sequence[Request]) -> list[str | float]:
        docs = [POOL_DOCS[request.question] for request in requests]
        texts = [doc["question"] for doc in docs]
        passages = [[ctx["text"] for ctx in doc["ctxs"][: r.passages]] for doc, r in zip(docs, requests, strict=True)]
        mode = requests[0].mode
        if requests[0].scores:
            return list(self.model.score(texts, [doc["answers"][0] for doc in docs], passages, mode=mode))
        # transformers finds no stop strings in the vocabulary of whole words.
        return list(self.model.generate(texts, passages, mode=mode, max_new_tokens=NEW_TOKENS, stop_strings=None))


class Engine:
    """`ExpertEngine` over a directory of `Models`."""

    modes = MODES

    def __init__(self, folder: Path) -> None:
        run_in_one_process()
        from genpoe_plugin.vllm_engine.engine import ExpertEngine

        options: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 2**28}
        options |= {"disable_log_stats": True, "max_num_seqs": MAX_BATCH, "enforce_eager": True}
        self.engine = ExpertEngine.load(
            str(folder / "llm"), str(folder / "attention"), num_passages=PASSAGES, **options
        )

    def answer(self, requests: Sequence[Request]) -> list[str | float]:
        from vllm import SamplingParams

        made = []
        for request in requests:
            doc = POOL_DOCS[request.question]
            passages = [ctx["text"] for ctx in doc["ctxs"][: request.passages]]
            knowledge = knowledge_block(passages) if request.mode in PROMPT_MODES else ""
            prompt = knowledge + closed_book_prompt(doc["question"])
            sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
            if request.scores:
                prompt += f" {doc['answers'][0]}"
                sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
            experts = passages if request.mode in EXPERT_MODES else ()
            made.append(self.engine.request(prompt, experts, sampling, start=len(knowledge)))
        outputs = self.engine.generate(made, progress=False)
        if not requests[0].scores:
            return [output.outputs[0].text for output in outputs]
        return [sum(next(iter(token.values())).logprob for token in output.prompt_logprobs[1:]) for output in outputs]


ANSWERERS: dict[str, Any] = {"transformers": Transformers, "vllm": Engine}
POOL_DOCS = questions(POOL, PASSAGES, WORDS)


def measure(options: Options) -> list[Row]:
    """Run the requests through each class that can be loaded."""
    rows = []
    seconds = QUICK if options.quick else FULL
    with folder_of(options) as folder:
        Models(folder, SIZES)
        for name in ANSWERERS:
            if name == "vllm" and not _has_vllm():
                continue
            found, _ = run_child(["-m", "benchmarks.soak", name, folder, seconds], os.environ)
            rows += _rows(f"soak.{name}", found, folder)
    return rows


def _rows(prefix: str, found: dict[str, Any], folder: Path) -> list[Row]:
    name = prefix.rpartition(".")[2]
    fresh, _ = run_child(["-m", "benchmarks.soak", name, folder, 0], os.environ)
    slope, noise = growth(found["times"], found["memory"])
    answers = {key: value for key, value in found["answers"]}
    again = dict(fresh["answers"])
    different = found["changed"] + sum(not _same(answers[key], again[key]) for key in answers)
    return [
        Row(f"{prefix}.requests", found["requests"], ""),
        Row(f"{prefix}.distinct", len(answers), ""),
        Row(f"{prefix}.different", different, "", "<= 0"),
        Row(f"{prefix}.memory", found["memory"][-1], "MB"),
        Row(f"{prefix}.growth", slope, "MB/hour"),
        Row(f"{prefix}.growth_over_noise", slope / noise if noise else 0.0, "", "<= 3"),
    ]


def draw(rng: random.Random, modes: Sequence[str]) -> list[Request]:
    """One random batch."""
    mode, scores = rng.choice(modes), rng.random() < 0.3
    size = rng.randint(1, MAX_BATCH)
    return [Request(rng.randrange(POOL), rng.randint(0, PASSAGES), mode, scores) for _ in range(size)]


def every(modes: Iterable[str]) -> list[Request]:
    """All distinct requests."""
    return [
        Request(question, passages, mode, scores)
        for mode in modes
        for scores in (False, True)
        for passages in range(PASSAGES + 1)
        for question in range(POOL)
    ]


def growth(times: Sequence[float], memory: Sequence[float]) -> tuple[float, float]:
    """Growth of the memory over the second half, per hour, and its standard error.

    Args:
        times: seconds of the measurements.
        memory: memory at these times.
    """
    half = len(times) // 2
    count = min(BLOCKS, len(times) - half)
    blocks = [
        (np.mean(t), np.mean(m))
        for t, m in zip(
            np.array_split(np.array(times[half:]) / 3600, count),
            np.array_split(np.array(memory[half:]), count),
            strict=True,
        )
    ]
    x, y = (np.array(column) for column in zip(*blocks, strict=True))
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / max(count - 2, 1) / (x @ x)))


def _same(one: str | float, other: str | float) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return abs(one - other) <= TOLERANCE


def _has_vllm() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is not None


def _resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Answer random requests for so many seconds; with 0, those of an earlier run again, one at a time.

    Returns:
        the number of requests, the answers with their numbers in `every`, how many of them changed, and the memory in
        MB over time. They are also written into ``folder``.
    """
    record = folder / f"{name}.json"
    answerer: Answerer = ANSWERERS[name](folder)
    modes = ANSWERERS[name].modes
    numbers = {request: number for number, request in enumerate(every(modes))}
    answers: dict[int, str | float] = {}
    times, memory, changed, count = [], [], 0, 0
    if not seconds:
        drawn = {number for number, _ in json.loads(record.read_text())["answers"]}
        again = [(number, answerer.answer([r])[0]) for r, number in numbers.items() if number in drawn]
        return {"answers": again}
    rng, begin = random.Random(0), time.monotonic()
    while (now := time.monotonic() - begin) < seconds:
        batch = draw(rng, modes)
        for request, found in zip(batch, answerer.answer(batch), strict=True):
            changed += not _same(answers.setdefault(numbers[request], found), found)
        count += len(batch)
        times.append(now)
        memory.append(_resident())
    result = {"requests": count, "answers": list(answers.items()), "changed": changed, "times": times, "memory": memory}
    record.write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))))
