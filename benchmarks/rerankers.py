"""Speed of reranking: decoder LLMs beside batches in the given order, cross-encoders beside sentence-transformers.

Each question has 100 passages, whose lengths are log-normal with a median of 80 words, like those of paragraphs. The
models are random.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from benchmarks.options import Options
from benchmarks.random_llm import random_llm, random_text
from benchmarks.retrieval import interleaved_times
from benchmarks.row import Row
from genpoe_plugin.selection.cross_encoder import CrossEncoderReranker
from genpoe_plugin.selection.reranking import Reranker

PASSAGES, MEDIAN, SPREAD, MAX_WORDS = 100, 80, 0.7, 400
QUESTION_WORDS, BATCH, ROUNDS = 10, 32, 3
Pairs = Sequence[tuple[str, str]]
Score = Callable[[Pairs], np.ndarray]


def measure(options: Options) -> list[Row]:
    """Pairs per second of both kinds of rerankers, and their ratios to the alternatives."""
    width, layers, questions = (64, 1, 1) if options.quick else (384, 6, 2)
    llm, tokenizer = random_llm(width, layers)
    pairs = random_pairs(questions)
    decoder = Reranker(llm, tokenizer, max_length=MAX_WORDS + QUESTION_WORDS + 10, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        save_cross_encoder(Path(folder), tokenizer, width, layers)
        library = CrossEncoder(folder, device="cpu")
        ours = CrossEncoderReranker.load(folder, batch_size=BATCH)
        return [
            *_compare("decoder", pairs, decoder.score, lambda some: score_in_order(decoder, some), ">= 1.5"),
            *_compare("cross_encoder", pairs, ours.score, lambda some: _predict(library, some), ">= 1.0"),
        ]


def random_pairs(questions: int) -> list[tuple[str, str]]:
    """Pairs of ``questions`` questions with `PASSAGES` passages each."""
    rng = random.Random(0)
    pairs = []
    for _ in range(questions):
        question = random_text(rng, QUESTION_WORDS)
        for _ in range(PASSAGES):
            words = int(MEDIAN * np.exp(rng.gauss(0, SPREAD)))
            pairs.append((question, random_text(rng, min(max(words, 8), MAX_WORDS))))
    return pairs


def save_cross_encoder(folder: Path, tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> None:
    """Write a random BERT with one label."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
    )
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def score_in_order(reranker: Reranker, pairs: Pairs) -> np.ndarray:
    """The scores, in batches of the given order, each as wide as its longest pair."""
    scores = []
    for start in range(0, len(pairs), BATCH):
        rows = [row.ids for row in reranker.encode(pairs[start : start + BATCH])]
        inputs = reranker.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        # Every row has another number of positions, so they are counted from its first token.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        logits = reranker.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        (yes,) = reranker.tokenizer("Yes", add_special_tokens=False)["input_ids"][:1]
        scores.append(logits[:, yes].numpy())
    return np.concatenate(scores)


def _predict(library: CrossEncoder, pairs: Pairs) -> np.ndarray:
    return np.asarray(
        library.predict(list(pairs), batch_size=BATCH, activation_fn=nn.Identity(), show_progress_bar=False)
    )


def _compare(name: str, pairs: Pairs, ours: Score, other: Score, aim: str) -> list[Row]:
    if not np.allclose(ours(pairs), other(pairs), atol=1e-3):
        raise RuntimeError(f"{name}: the same model has other scores for the same pairs")
    times = interleaved_times({"ours": lambda: ours(pairs), "other": lambda: other(pairs)}, ROUNDS)
    return [
        Row(f"rerankers.{name}.pairs_per_second", len(pairs) / times["ours"], "1/s"),
        Row(f"rerankers.{name}.speedup", times["other"] / times["ours"], "x", aim),
    ]
