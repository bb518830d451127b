"""``python -m benchmarks real-llm vllm``: a real LLM with experts on vLLM, against transformers and against prompts."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from lm_eval.api.instance import Instance
from tqdm import tqdm

from benchmarks.row import Row, table, write
from benchmarks.vllm import clear_caches, run_in_one_process
from genpoe_plugin.data.answers import exact_match
from genpoe_plugin.data.passages import passage_from_ctx
from genpoe_plugin.data.questions import Question, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm

NUMBERS = (4, 2, 1, 0)
"""Passages of the requests, in turns."""
STOP, NEW_TOKENS = ["\n"], 16
TIMED = 16
"""Requests whose first token is timed."""
MARGIN = 1e-3
"""Where the two best logits differ by less, rounding may decide."""


@click.command("vllm")
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, help="Checkpoint of experts for it.")
@click.option("--questions", "file", required=True, type=click.Path(path_type=Path), help="Questions with passages.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to keep experts in, for reuse.")
@click.option("--requests", "count", default=256, show_default=True, type=click.IntRange(4), help="Number of requests.")
@click.option("--dtype", default="float32", show_default=True, help="Data type of the LLM.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Of transformers.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write rows, machine and command here.")
def vllm(
    llm: str, hypernetwork: str, file: Path, out: Path, count: int, dtype: str, batch_size: int, path: Path | None
) -> None:
    """Answer the same mixed requests with transformers and on vLLM, and time them.

    Requests have no to four passages. Every answer and likelihood must be the same in both, except where the two best
    logits are equal within 0.001.
    """
    check_vllm()
    run_in_one_process()
    questions = [question for question in read_questions(file) if len(question.passages) >= max(NUMBERS)]
    if not questions:
        raise InputError(f"{file}: no question has {max(NUMBERS)} passages")
    rows = _measure(llm, hypernetwork, questions, out, count, dtype, batch_size)
    click.echo(table(rows))
    if path is not None:
        write(rows, path)


def requests(questions: Sequence[Question], count: int, numbers: Sequence[int]) -> list[Instance]:
    """Requests of lm-eval with ``numbers`` of passages in turns; with more requests than questions, these repeat."""
    instances = []
    for number in range(count):
        question = questions[number % len(questions)]
        # Another number when a question comes again.
        passages = question.passages[: numbers[(number + number // len(questions)) % len(numbers)]]
        doc = {
            "question": question.question,
            "answers": list(question.answers),
            "ctxs": [
                {"id": one.passage.id, "title": one.passage.title, "text": one.passage.text, "score": one.score}
                for one in passages
            ],
        }
        options = {"until": STOP, "max_gen_toks": NEW_TOKENS, "do_sample": False}
        arguments = (closed_book_prompt(question.question), options)
        instances.append(Instance("generate_until", doc, arguments, number, ("questions", number, 1)))
    return instances


def scored(instances: Sequence[Instance]) -> list[Instance]:
    """The same requests for the likelihood of the first answer."""
    return [
        Instance("loglikelihood", one.doc, (one.args[0], f" {one.doc['answers'][0]}"), number, ("questions", number, 1))
        for number, one in enumerate(instances)
    ]


def _measure(
    llm: str, hypernetwork: str, questions: Sequence[Question], out: Path, count: int, dtype: str, batch_size: int
) -> list[Row]:
    from genpoe_plugin.lm.hf import GenPoELM
    from genpoe_plugin.lm.vllm import GenPoEVLLM

    experts = {"hypernetwork": hypernetwork, "gates": "uniform"}
    engine = {"dtype": dtype, "max_model_len": 2048, "kv_cache_memory_bytes": 2**31, "disable_log_stats": True}
    mixed, equal = requests(questions, count, NUMBERS), requests(questions, count, NUMBERS[:1])
    stored = (out / "hf").is_dir()
    lm: Any = GenPoELM(
        llm, mode="genpoe", **experts, expert_store=str(out / "hf"), device="cpu", dtype=dtype, batch_size=batch_size
    )
    lm.generate_until(list(equal))  # generates the experts, unless an earlier run has stored them
    made = lm.seconds["experts"] / len({one.doc["question"] for one in equal})
    expected, hf_rate = _timed(lm, mixed)
    likelihoods = [score for score, _ in lm.loglikelihood(scored(mixed))]
    _, hf_equal = _timed(lm, equal)
    del lm
    gc.collect()
    lm = GenPoEVLLM(llm, mode="genpoe", **experts, expert_store=str(out / "vllm"), **engine)
    lm.generate_until(list(equal))
    answers, rate = _timed(lm, mixed)
    found = [score for score, _ in lm.loglikelihood(scored(mixed))]
    _, rate_equal = _timed(lm, equal)
    margins = _margins(lm, mixed, answers, expected)
    first = _first_tokens(lm, requests(questions, TIMED, NUMBERS[:1]))
    del lm
    gc.collect()
    lm = GenPoEVLLM(llm, mode="closed_book", **engine)
    lm.generate_until(mixed[:TIMED])
    _, closed_book = _timed(lm, equal)
    del lm
    gc.collect()
    lm = GenPoEVLLM(llm, mode="rag", num_passages=NUMBERS[0], **engine)
    _, rag = _timed(lm, equal[: max(TIMED, count // 4)])
    rag_first = _first_tokens(lm, requests(questions, TIMED, NUMBERS[:1]))
    em, own_em = (
        100 * statistics.fmean(exact_match(text, one.doc["answers"]) for one, text in zip(mixed, texts, strict=True))
        for texts in (expected, answers)
    )
    apart = max(abs(a - b) for a, b in zip(found, likelihoods, strict=True))
    name = "real_vllm"
    return [
        Row(f"{name}.requests", count, ""),
        Row(f"{name}.different", len(margins), "answers"),
        Row(f"{name}.different_beyond_margin", sum(margin > MARGIN for margin in margins), "answers", "<= 0"),
        Row(f"{name}.likelihoods_apart", apart, "nats", "<= 0.0001"),
        Row(f"{name}.em_transformers", em, "%"),
        Row(f"{name}.em_vllm", own_em, "%"),
        Row(f"{name}.mixed_over_hf", rate / hf_rate, "x"),
        Row(f"{name}.over_hf", rate_equal / hf_equal, "x", ">= 2"),
        Row(f"{name}.over_plain_closed_book", rate_equal / closed_book, "x", ">= 0.6"),
        Row(f"{name}.over_rag", rate_equal / rag, "x", ">= 2"),
        Row(f"{name}.requests_per_second", rate_equal, "requests/s"),
        *([] if stored else [Row(f"{name}.experts_made", made, "s/question")]),
        *(Row(f"{name}.first_token_genpoe_{state}", value, "ms") for state, value in first.items()),
        *(Row(f"{name}.first_token_rag_{state}", value, "ms") for state, value in rag_first.items()),
    ]


def _timed(lm: Any, instances: Sequence[Instance]) -> tuple[list[str], float]:
    """Answers and requests per second, with experts made and empty caches of the engine."""
    clear_caches(lm)
    before = lm.seconds["generate"]
    answers = lm.generate_until(list(instances))
    return answers, len(instances) / (lm.seconds["generate"] - before)


def _first_tokens(lm: Any, instances: Sequence[Instance]) -> dict[str, float]:
    """Median milliseconds to the first token of a single request, with empty caches and when it comes again."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for instance in tqdm(instances, desc="Timing first tokens"):
        context, options = instance.args
        one = replace(instance, arguments=(context, {**options, "max_gen_toks": 1}))
        clear_caches(lm)
        for state in found:
            before = lm.seconds["generate"]
            lm.generate_until([one], disable_tqdm=True)
            found[state].append(1000 * (lm.seconds["generate"] - before))
    return {state: statistics.median(values) for state, values in found.items()}


def _margins(lm: Any, instances: Sequence[Instance], answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """For each answer that differs, the difference of the two best log-probabilities where it begins to differ."""
    from vllm import SamplingParams

    margins = []
    for instance, answer, other in zip(instances, answers, expected, strict=True):
        if _whole(answer) == _whole(other):
            continue
        passages = [passage_from_ctx(ctx, "request").string for ctx in instance.doc["ctxs"]]
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop=STOP, logprobs=2)
        request = lm._engine.request(instance.args[0], passages, sampling)
        output = lm._engine.generate([request], progress=False)[0].outputs[0]
        ids = list(output.token_ids)
        same = 0
        while same < len(ids) - 1 and other.startswith(_whole(lm.tokenizer.decode(ids[: same + 1]))):
            same += 1
        best, second = sorted((entry.logprob for entry in output.logprobs[same].values()), reverse=True)[:2]
        margins.append(best - second)
    return margins


def _whole(text: str) -> str:
    """A text without an unfinished character at its end, which vLLM leaves out."""
    return text.rstrip("\ufffd")
