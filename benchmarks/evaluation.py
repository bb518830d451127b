"""Answering with experts against the paper's flow, closed-book answering and RAG, on a CPU.

- `benchmarks.naive_flow` is the paper's method, one question at a time. Its answers must equal ours, token by token.
- Ours is the lm-eval class in the mode ``genpoe``: ``cold`` with an empty expert store (a new object with a loaded
  hypernetwork), ``warm`` for the same requests again. It runs with the paper's form, the memory form, and experts in
  the attention of a quarter of the layers.
- Closed-book answering and RAG with the same passages in the prompt use lm-eval's own HFLM.

The docs bring passages with rerank scores; all passages differ. All answers have the same number of tokens. Variants
run interleaved in one process, and a ratio is the median of the ratios per round. A floor is the larger of two times:
the arithmetic at the rate of a square matrix product, and the bytes read at the rate of a matrix-vector product.
"""

from __future__ import annotations

import gc
import logging
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from benchmarks.cost_model import CostModel, Point, draw
from benchmarks.naive_flow import NaiveFlow
from benchmarks.options import Options, folder_of
from benchmarks.random_llm import random_llm, random_text
from benchmarks.rates import product, product_flops, reading, seconds
from benchmarks.row import Row
from genpoe_plugin.checkpoints.checkpoint import write_hypernetwork
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.prompts import closed_book_prompt, rag_prompt
from genpoe_plugin.training.creation import attention_config

BATCH, PASSAGES, WORDS, QUESTION_WORDS, NEW_TOKENS = 16, 4, 100, 10, 10
PRODUCT = 2048  # side of the square product
RATES = ("product", "read")  # rates of the machine, not variants
FORMS = ("paper", "memory", "attention")
PICTURE = "cost_per_question.png"

Rounds = dict[str, list[float]]
"""Seconds per question of every variant, one value per round."""


@dataclass(frozen=True)
class Sizes:
    width: int  # hidden size of the LLM
    layers: int
    rank: int
    questions: int  # answered in batches of `BATCH`
    single: int  # of these, also answered one at a time
    rounds: int
    batches: tuple[int, ...]  # batch sizes for the cost model
    experts: tuple[int, ...]
    words: tuple[int, ...]
    cost_rounds: int


FULL = Sizes(768, 12, 128, 32, 4, 5, (1, 4, 16, 64), (1, 4, 16), (25, 100, 250), 3)
QUICK = Sizes(384, 6, 64, 16, 2, 2, (1, 16), (1, 4), (25, 100), 1)


def questions(count: int, passages: int = PASSAGES, words: int = WORDS, seed: int = 0) -> list[dict[str, Any]]:
    """Docs with passages and rerank scores. Questions differ in length, so batches need padding."""
    rng = random.Random(seed)
    return [
        {
            "question": f"Who {random_text(rng, QUESTION_WORDS + rng.randrange(-3, 4))} ?",
            "answers": [random_text(rng, 2)],
            "ctxs": [
                {
                    "id": f"{number}-{rank}",
                    "title": "",
                    "text": random_text(rng, words),
                    "score": float(passages - rank),
                    "rerank_score": rng.gauss(0, 1),
                }
                for rank in range(passages)
            ],
        }
        for number in range(count)
    ]


def reading_layers(layers: int) -> tuple[int, ...]:
    """A quarter of the layers, spread from one third to two thirds of the depth, where pretrained LLMs read."""
    count, low, high = max(1, layers // 4), layers // 3, 2 * layers // 3
    return tuple(sorted({high - step * (high - low) // max(1, count - 1) for step in range(count)}))


def requests(docs: Sequence[dict[str, Any]], *, passages: int = 0, new_tokens: int = NEW_TOKENS) -> list[Instance]:
    """lm-eval requests for these docs, with the best ``passages`` of each in the prompt."""
    gen_kwargs = {"until": ["\n"], "max_gen_toks": new_tokens, "do_sample": False}

    def prompt(doc: dict[str, Any]) -> str:
        best = sorted(doc["ctxs"], key=lambda ctx: -ctx["rerank_score"])[:passages]
        texts = [ctx["text"] for ctx in best]
        return rag_prompt(doc["question"], texts) if texts else closed_book_prompt(doc["question"])

    return [
        Instance("generate_until", doc, (prompt(doc), gen_kwargs), 0, ("questions", number, 1))
        for number, doc in enumerate(docs)
    ]


class Models:
    """A random LLM with a hypernetwork of each form, and the model classes over it, which share its weights.

    Args:
        folder: output folder for LLM and hypernetworks.
        sizes: sizes of LLM and hypernetworks.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        llm = folder / "llm"
        model, tokenizer = random_llm(sizes.width, sizes.layers)
        model.save_pretrained(llm)
        tokenizer.save_pretrained(llm)
        first = HFLM(str(llm), device="cpu", dtype="float32", batch_size=1)
        self.model, self.tokenizer = first.model, first.tokenizer
        self.configs: dict[str, HypernetworkConfig] = {}
        self.checkpoints: dict[str, Path] = {}
        for form in FORMS:
            if form == "attention":
                self.configs[form] = attention_config(self.model, reading_layers(sizes.layers))
            else:
                changes: dict[str, Any] = {"rank": sizes.rank} if form == "paper" else {"base": "random"}
                self.configs[form] = HypernetworkConfig.preset(
                    form, hidden_size=sizes.width, layer=sizes.layers // 3, **changes
                )
            self.checkpoints[form] = folder / form
            self._write(form)

    def _write(self, form: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = Hypernetwork(self.configs[form])
        if form == "paper":
            # Embeddings of a random LLM are so small that all passages would give the same expert.
            with torch.no_grad():
                network.encoder.project.weight *= 300
        directory = self.checkpoints[form]
        directory.mkdir(exist_ok=True)
        write_hypernetwork(directory, network.config, network.state_dict(), self.model, self.tokenizer, {})

    def plain(self, batch: int) -> HFLM:
        return HFLM(self.model, tokenizer=self.tokenizer, device="cpu", batch_size=batch)

    def ours(self, form: str, batch: int, passages: int = PASSAGES) -> GenPoELM:
        """A new model with an empty expert store."""
        gc.collect()  # earlier models are in reference cycles, and their stores are large
        return GenPoELM(
            self.model,
            tokenizer=self.tokenizer,
            device="cpu",
            batch_size=batch,
            hypernetwork=str(self.checkpoints[form]),
            num_passages=passages,
        )

    def naive(self) -> NaiveFlow:
        checkpoint, layer = self.checkpoints["paper"], self.configs["paper"].layer
        return NaiveFlow(self.model, self.tokenizer, checkpoint, layer, PASSAGES, NEW_TOKENS)


def answers(lm: HFLM, instances: Sequence[Instance]) -> list[str]:
    return lm.generate_until(list(instances), disable_tqdm=True)


def check_answers(models: Models, docs: Sequence[dict[str, Any]]) -> None:
    """Compare our answers with those of the naive flow.

    Raises:
        RuntimeError: they differ, experts do not change the answers, or an answer is too short.
    """
    expected = models.naive().answer_all(docs)
    for batch in (1, BATCH):
        if (found := answers(models.ours("paper", batch), requests(docs))) != expected:
            wrong = sum(one != other for one, other in zip(found, expected, strict=True))
            raise RuntimeError(f"batch {batch}: {wrong} of {len(docs)} answers differ from those of the naive flow")
    others = [{**doc, "ctxs": docs[number - 1]["ctxs"]} for number, doc in enumerate(docs)]
    for what, other in (
        ("closed-book answers", answers(models.plain(BATCH), requests(docs))),
        ("answers with other passages", answers(models.ours("paper", BATCH), requests(others))),
    ):
        if 2 * sum(one != another for one, another in zip(expected, other, strict=True)) < len(docs):
            raise RuntimeError(f"{what} are the same as with experts: the comparison shows nothing")
    if {len(answer.split()) for answer in expected} != {NEW_TOKENS}:
        raise RuntimeError(f"an answer has fewer than {NEW_TOKENS} tokens")


def time_variants(models: Models, docs: Sequence[dict[str, Any]], single: int, rounds: int) -> Rounds:
    """Seconds per question of all variants, which run interleaved; the first round is warm-up.

    ``product`` is in seconds per FLOP of a square matrix product, ``read`` in seconds per byte read.
    """
    naive = models.naive()
    plain = {batch: models.plain(batch) for batch in (1, BATCH)}
    read, read_bytes = reading()
    rates = {"product": (product(PRODUCT, torch.float32), product_flops(PRODUCT)), "read": (read, read_bytes)}
    times: Rounds = {}

    def record(name: str, items: Sequence[Any], run: Callable[[], object], number: int) -> None:
        taken = seconds(run) / len(items)
        if number:
            times.setdefault(name, []).append(taken)

    for number in tqdm(range(1 + rounds), desc="Timing evaluations"):
        record("naive", docs[:single], lambda: naive.answer_all(docs[:single]), number)
        for batch, part in ((1, docs[:single]), (BATCH, docs)):
            instances = requests(part)
            for form in FORMS:
                lm = models.ours(form, batch)
                for state in ("cold", "warm"):
                    record(
                        f"{form}_{state}_{batch}",
                        instances,
                        lambda lm=lm, instances=instances: answers(lm, instances),
                        number,
                    )
                if form == "attention" and batch == BATCH:
                    first = requests(part, new_tokens=1)
                    record("attention_first", first, lambda lm=lm, first=first: answers(lm, first), number)
                    record("closed_book_first", first, lambda first=first: answers(plain[BATCH], first), number)
                # Closed-book runs right after each form, because these ratios are compared most closely.
                record(
                    f"closed_book_{batch}_by_{form}",
                    instances,
                    lambda b=batch, a=instances: answers(plain[b], a),
                    number,
                )
        instances = requests(docs, passages=PASSAGES)
        for name, (run, amount) in rates.items():
            record(name, range(amount), run, number)
        record(f"rag_{BATCH}", instances, lambda instances=instances: answers(plain[BATCH], instances), number)
    return times


def ratio(times: Rounds, above: str, below: str) -> float:
    """Median over rounds of the ratio of two variants' times."""
    return statistics.median(one / other for one, other in zip(times[above], times[below], strict=True))


def ratio_rows(times: Rounds) -> list[Row]:
    """Rows of ratios between variants."""
    closed_1, closed = "closed_book_1_by_paper", f"closed_book_{BATCH}_by_paper"
    cold, warm = f"paper_cold_{BATCH}", f"paper_warm_{BATCH}"
    speedup, batching = ratio(times, "naive", cold), ratio(times, closed_1, closed)
    small, beside = f"memory_cold_{BATCH}", f"closed_book_{BATCH}_by_memory"
    return [
        Row("evaluation.naive_speedup", speedup, "x", ">= 5"),
        Row("evaluation.hflm_batching_speedup", batching, "x"),
        Row("evaluation.naive_speedup_over_hflm_batching", speedup / batching, "x", ">= 0.9"),
        Row("evaluation.closed_book_time_ratio_cached", ratio(times, warm, closed), "x", "<= 1.15"),
        Row("evaluation.closed_book_time_ratio_cold", ratio(times, cold, closed), "x", "<= 1.5"),
        Row("evaluation.rag_speedup", ratio(times, f"rag_{BATCH}", cold), "x", ">= 3"),
        Row("evaluation.closed_book_time_ratio_cached_batch_1", ratio(times, "paper_warm_1", closed_1), "x"),
        Row("evaluation.closed_book_time_ratio_cold_batch_1", ratio(times, "paper_cold_1", closed_1), "x"),
        Row("evaluation.memory_naive_speedup", ratio(times, "naive", small), "x"),
        Row(
            "evaluation.memory_closed_book_time_ratio_cached",
            ratio(times, f"memory_warm_{BATCH}", beside),
            "x",
        ),
        Row("evaluation.memory_closed_book_time_ratio_cold", ratio(times, small, beside), "x"),
        Row("evaluation.memory_rag_speedup", ratio(times, f"rag_{BATCH}", small), "x"),
        *_attention_rows(times),
    ]


def _attention_rows(times: Rounds) -> list[Row]:
    closed, rag = f"closed_book_{BATCH}_by_attention", f"rag_{BATCH}"
    cold, warm = f"attention_cold_{BATCH}", f"attention_warm_{BATCH}"
    return [
        Row("evaluation.attention_closed_book_time_ratio_cached", ratio(times, warm, closed), "x", "<= 1.25"),
        Row("evaluation.attention_closed_book_time_ratio_cold", ratio(times, cold, closed), "x", "<= 2"),
        Row("evaluation.attention_rag_speedup_cached", ratio(times, rag, warm), "x", ">= 3"),
        Row("evaluation.attention_rag_speedup_cold", ratio(times, rag, cold), "x"),
        Row(
            "evaluation.attention_first_token_ratio",
            ratio(times, "attention_first", "closed_book_first"),
            "x",
            "<= 1.3",
        ),
    ]


def time_rows(times: Rounds) -> list[Row]:
    """Milliseconds per question of every variant."""
    medians = {name: 1000 * statistics.median(taken) for name, taken in times.items() if name not in RATES}
    return [Row(f"evaluation.{name}", value, "ms/question") for name, value in sorted(medians.items())]


@dataclass(frozen=True)
class Floors:
    """Lower bounds of the variants' times at measured rates: per forward pass, the larger of arithmetic and reading.

    Attributes:
        flops_rate: FLOPs per second of a square matrix product, in its best round.
        bytes_rate: bytes per second read by a matrix-vector product, in its best round.
        body: parameters of the decoder layers.
        head: parameters of the output layer, which runs for one position per row.
        expert: numbers in an expert of the paper's form.
        unit: numbers in an expert in the attention per passage token.
        reading: share of the layers that read a passage to make such an expert.
        generator: parameters of the hypernetwork.
    """

    flops_rate: float
    bytes_rate: float
    body: int
    head: int
    expert: int
    unit: int
    reading: float
    generator: int

    @classmethod
    def at_rates_of(cls, times: Rounds, models: Models) -> Floors:
        config = models.configs["paper"]
        size = footprint(config)
        head = models.model.get_output_embeddings().weight.numel()
        return cls(
            flops_rate=1 / min(times["product"]),
            bytes_rate=1 / min(times["read"]),
            body=sum(weight.numel() for weight in models.model.parameters()) - head,
            head=head,
            expert=size.expert_bytes // 4,
            unit=footprint(models.configs["attention"]).expert_bytes // 4,
            reading=models.configs["attention"].layers[-1] / models.model.config.num_hidden_layers,
            generator=size.parameters,
        )

    def one_pass(self, rows: int, tokens: int, experts: int) -> float:
        """Seconds of a float32 forward pass with ``tokens`` and ``experts`` per row."""
        flops = 2 * rows * (tokens * (self.body + experts * self.expert) + self.head)
        read = 4 * (self.body + self.head + rows * experts * self.expert)
        return max(flops / self.flops_rate, read / self.bytes_rate)

    def answering(self, rows: int, tokens: int, experts: int = 0) -> float:
        """Seconds of answering a batch with prompts of ``tokens``."""
        return self.one_pass(rows, tokens, experts) + (NEW_TOKENS - 1) * self.one_pass(rows, 1, experts)

    def generating(self, passages: int) -> float:
        """Seconds of one pass of the paper's hypernetwork; the bytes include the experts it writes."""
        flops = 2 * passages * self.generator
        return max(flops / self.flops_rate, 4 * (self.generator + passages * self.expert) / self.bytes_rate)

    def attending(self, rows: int, tokens: int, units: int) -> float:
        """Seconds of answering a batch with ``units`` of experts in the attention per row."""
        flops = 2 * rows * units * self.unit
        extra = max(4 * rows * units * self.unit / self.bytes_rate, flops / self.flops_rate)
        return self.answering(rows, tokens) + NEW_TOKENS * extra

    def reading_passages(self, tokens: int) -> float:
        """Seconds of the LLM's pass over ``tokens`` of passages, up to the highest layer with experts."""
        return 2 * tokens * self.reading * self.body / self.flops_rate

    def rows(self) -> list[Row]:
        tokens = QUESTION_WORDS + 5  # with the words of the prompt template
        closed, warm = self.answering(BATCH, tokens), self.answering(BATCH, tokens, PASSAGES)
        cold = warm + self.generating(BATCH * PASSAGES)
        rag = self.answering(BATCH, tokens + 1 + PASSAGES * (WORDS + 1))
        units = PASSAGES * (WORDS + 3)  # with "Knowledge:" and two line breaks
        attending = self.attending(BATCH, tokens, units)
        reading = attending + self.reading_passages(BATCH * units)
        return [
            Row("evaluation.matmul_rate", self.flops_rate / 1e9, "GFLOP/s"),
            Row("evaluation.read_rate", self.bytes_rate / 1e9, "GB/s"),
            *(
                Row(f"evaluation.{name}_{BATCH}_floor", 1000 * floor / BATCH, "ms/question")
                for name, floor in (("closed_book", closed), ("paper_warm", warm), ("paper_cold", cold), ("rag", rag))
            ),
            Row("evaluation.closed_book_time_ratio_cached_floor", warm / closed, "x"),
            Row("evaluation.closed_book_time_ratio_cold_floor", cold / closed, "x"),
            Row("evaluation.attention_closed_book_time_ratio_cached_floor", attending / closed, "x"),
            Row("evaluation.attention_closed_book_time_ratio_cold_floor", reading / closed, "x"),
            Row("evaluation.attention_expert_bytes", 4 * self.unit * (WORDS + 3), "bytes"),
        ]


def measure_cost(models: Models, sizes: Sizes) -> list[Point]:
    """Times of batches with the paper's form, over batch sizes, numbers of experts and passage lengths."""
    shapes = [(batch, count, WORDS) for batch in sizes.batches for count in (0, *sizes.experts)]
    shapes += [(BATCH, PASSAGES, words) for words in sizes.words if words != WORDS]
    times: dict[tuple[int, int, int, bool], list[float]] = {}
    for number in tqdm(range(sizes.cost_rounds), desc="Timing batches"):
        for batch, count, words in shapes:
            instances = requests(questions(batch, count, words, seed=number))
            lm = models.ours("paper", batch, count) if count else models.plain(batch)
            for cold in (True, False) if count else (False,):
                taken = seconds(lambda lm=lm, instances=instances: answers(lm, instances))
                times.setdefault((batch, count, words, cold), []).append(taken)
    return [Point(*shape, statistics.median(taken)) for shape, taken in times.items()]


def measure(options: Options) -> list[Row]:
    """All rows; with ``--out`` also a plot of the cost per question."""
    sizes = QUICK if options.quick else FULL
    docs = questions(sizes.questions)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # each new object warns that it got a loaded model
    with folder_of(options) as folder:
        models = Models(folder, sizes)
        check_answers(models, docs)
        times = time_variants(models, docs, sizes.single, sizes.rounds)
        points = measure_cost(models, sizes)
        model = CostModel.fitted(points)
        draw(points, model, folder / PICTURE)
        if options.out is not None:
            print(f"cost per question: {folder / PICTURE}")
    return [*ratio_rows(times), *time_rows(times), *Floors.at_rates_of(times, models).rows(), *model.rows(points)]
