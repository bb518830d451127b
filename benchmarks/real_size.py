"""Experts in the attention of an LLM of real size against closed-book answering and RAG, on a GPU.

The LLM has the shape of Llama-3-8B in bfloat16, with random weights and a vocabulary of 16,000 words. Batches have 16
or 64 questions with four passages of a hundred words each; answers have ten tokens; a quarter of the layers has
experts. Variants run interleaved in one process, and a ratio is the median of the ratios per round.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from benchmarks.evaluation import (
    PASSAGES,
    WORDS,
    Rounds,
    answers,
    questions,
    ratio,
    reading_layers,
    requests,
)
from benchmarks.options import Options, folder_of
from benchmarks.random_llm import random_llm
from benchmarks.rates import seconds
from benchmarks.row import Row
from genpoe_plugin.checkpoints.card import ModelCard
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.training.creation import attention_config, create_attention_experts


@dataclass(frozen=True)
class Sizes:
    width: int
    layers: int
    head_width: int
    kv_heads: int
    batches: tuple[int, ...]
    rounds: int


FULL = Sizes(4096, 32, 128, 8, (16, 64), 5)
QUICK = Sizes(256, 8, 64, 2, (4,), 2)


def measure(options: Options) -> list[Row]:
    """All rows; ``--quick`` runs a small LLM on a CPU.

    Raises:
        InputError: there is no GPU for the full size.
    """
    if not (options.quick or torch.cuda.is_available()):
        raise InputError("real-size: needs a GPU of 40 GB; --quick runs a small LLM on a CPU")
    sizes, device = (QUICK, "cpu") if options.quick else (FULL, "cuda")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # each new object warns that it got a loaded model
    model, tokenizer = random_llm(
        sizes.width,
        sizes.layers,
        head_width=sizes.head_width,
        kv_heads=sizes.kv_heads,
        device=device,
        dtype=torch.bfloat16,
    )
    config = attention_config(model, reading_layers(sizes.layers))
    with folder_of(options) as folder:
        checkpoint = folder / "attention"
        create_attention_experts(checkpoint, config, model, tokenizer, None, card_of(checkpoint))
        rows = []
        for batch in sizes.batches:
            plain = HFLM(model, tokenizer=tokenizer, device=device, batch_size=batch)
            rows += variant_rows(time_variants(plain, checkpoint, batch, sizes.rounds), batch)
    size = footprint(config, torch.bfloat16).expert_bytes * (WORDS + 3)
    return [*rows, Row("real_size.expert_bytes", size, "bytes")]


def time_variants(plain: HFLM, checkpoint: Path, batch: int, rounds: int) -> Rounds:
    """Seconds per question of all variants, which run interleaved; the first round is warm-up."""
    docs = questions(batch)
    times: Rounds = {}
    for number in tqdm(range(1 + rounds), desc=f"Timing batches of {batch}"):
        ours = GenPoELM(
            plain.model,
            tokenizer=plain.tokenizer,
            device=str(plain.device),
            batch_size=batch,
            hypernetwork=str(checkpoint),
            num_passages=PASSAGES,
        )
        for name, lm, instances in (
            ("cold", ours, requests(docs)),
            ("cached", ours, requests(docs)),
            ("closed_book", plain, requests(docs)),
            ("first", ours, requests(docs, new_tokens=1)),
            ("closed_book_first", plain, requests(docs, new_tokens=1)),
            ("rag", plain, requests(docs, passages=PASSAGES)),
        ):
            taken = seconds(lambda lm=lm, instances=instances: answers(lm, instances)) / batch
            if number:
                times.setdefault(name, []).append(taken)
    return times


def variant_rows(times: Rounds, batch: int) -> list[Row]:
    """The ratios between the variants of `time_variants`, with their aims, and their times."""
    ratios = {
        "closed_book_time_ratio_cached": (ratio(times, "cached", "closed_book"), "<= 1.25"),
        "closed_book_time_ratio_cold": (ratio(times, "cold", "closed_book"), "<= 2"),
        "rag_speedup_cached": (ratio(times, "rag", "cached"), ">= 3"),
        "rag_speedup_cold": (ratio(times, "rag", "cold"), None),
        "first_token_ratio": (ratio(times, "first", "closed_book_first"), "<= 1.3"),
    }
    milliseconds = {name: 1000 * statistics.median(taken) for name, taken in times.items()}
    return [
        *(
            Row(f"real_size.{name}_{batch}", value, "x", *([aim] if aim else []))
            for name, (value, aim) in ratios.items()
        ),
        *(Row(f"real_size.{name}_{batch}", value, "ms/question") for name, value in milliseconds.items()),
    ]


def card_of(checkpoint: Path) -> ModelCard:
    """A minimal card for experts that are not published."""
    return ModelCard(
        kind="experts",
        base_model="random",
        out=str(checkpoint),
        form={},
        data=[],
        arguments={},
        lm_eval_arguments={},
        command=["python", "-m", "benchmarks", "real-size"],
        steps=0,
    )
