"""Training the reranker: groups of one positive and several negatives, cross-entropy over their "Yes" logits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup
from transformers.pytorch_utils import Conv1D

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_directory, check_replaceable
from genpoe_plugin.reranking import DEFAULT_MAX_LENGTH, SETTINGS_FILE, Reranker
from genpoe_plugin.training.reranker_data import RerankerExample, read_examples


@dataclass(frozen=True)
class RerankerTrainingConfig:
    """All that decides a training run; the defaults are those of bge-reranker-v2-gemma.

    Attributes:
        model: directory or hub name of the decoder LLM (or reranker) to start from.
        data, eval_data: files of reranker data; the latter is ranked whole, before and after.
        out: directory for the merged model, the adapter beside it, and ``training.json``.
        negatives: drawn anew per example and epoch; an example that has fewer uses all of them.
        batch_size: groups an optimizer step.
        micro_batch_size: groups held in memory at a time; the result does not depend on it.
        max_steps: instead of whole epochs.
        lora_rank: of the adapter; 0 trains every weight instead.
        lora_targets: names of the layers that get one; all linear layers of the attention by default.
    """

    model: str
    data: str
    out: str
    eval_data: str | None = None
    negatives: int = 15
    batch_size: int = 16
    micro_batch_size: int = 1
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    max_gradient_norm: float = 1.0
    lora_rank: int = 32
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ()
    max_length: int = DEFAULT_MAX_LENGTH
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("negatives", "batch_size", "micro_batch_size", "epochs", "max_steps", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: must be at least 1")
        for name in ("learning_rate", "max_gradient_norm", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}: must be above 0")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio}: must be at least 0 and below 1")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank is {self.lora_rank}: must be 0 (train every weight) or above")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {self.dtype}: must be float32 or bfloat16")
        if self.lora_rank == 0 and self.dtype != "float32":
            raise InputError("training every weight needs dtype float32; bfloat16 is for a LoRA adapter's frozen base")


def train_reranker(config: RerankerTrainingConfig, *, progress: bool = True) -> dict[str, Any]:
    """Train, and write ``config.out``, whole or not at all.

    Returns:
        What ``training.json`` there holds: arguments, number of examples, :func:`ranking_quality` of the held-out
        data before and after (None without such data), and the loss of every step.

    Raises:
        InputError: model or data cannot be used, ``config.out`` holds something that is not a reranker, or the loss is
            no longer a number.
    """
    check_replaceable(config.out, lambda found: (found / SETTINGS_FILE).is_file(), "a reranker")
    torch.manual_seed(config.seed)
    examples = read_examples(config.data)
    held_out = read_examples(config.eval_data) if config.eval_data else []
    reranker = Reranker.load(
        config.model,
        device=config.device,
        dtype=config.dtype,
        prompt=examples[0].prompt,
        max_length=config.max_length,
        trust_remote_code=config.trust_remote_code,
    )
    before = ranking_quality(reranker, held_out, progress=progress) if held_out else None
    adapter = _add_adapter(reranker.model, config) if config.lora_rank else None
    losses = _optimise(reranker, examples, config, progress)
    with atomic_directory(config.out) as directory:
        if adapter is not None:
            adapter.save_pretrained(str(directory / "adapter"), save_embedding_layers=False)
            reranker.save_text_side(directory / "adapter")
            reranker.model = adapter.merge_and_unload()
        reranker.save(directory)
        record = {
            "arguments": asdict(config),
            "examples": len(examples),
            "before": before,
            "after": ranking_quality(reranker, held_out, progress=progress) if held_out else None,
            "loss": losses,
        }
        (directory / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def ranking_quality(
    reranker: Reranker, examples: Sequence[RerankerExample], *, progress: bool = False
) -> dict[str, float]:
    """Mean recall@1 and MRR@10 of the best positive among all passages of its example; a tie counts against it."""
    pairs = [(example.query, text) for example in examples for text in example.pos + example.neg]
    scores = reranker.score(pairs, progress=progress)
    ranks = []
    for example in examples:
        group, scores = np.split(scores, [len(example.pos) + len(example.neg)])
        pos, neg = np.split(group, [len(example.pos)])
        ranks.append(1 + int((neg >= pos.max()).sum()))
    return {
        "recall@1": sum(rank == 1 for rank in ranks) / len(ranks),
        "mrr@10": sum(1 / rank for rank in ranks if rank <= 10) / len(ranks),
    }


def group_loss(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum over groups of the cross-entropy of a group's first score, its positive's, among all its scores.

    Args:
        scores: [sum of sizes], the groups one after the other.
    """
    groups = pad_sequence(list(scores.split(list(sizes))), batch_first=True, padding_value=-torch.inf)
    return F.cross_entropy(groups, torch.zeros(len(sizes), dtype=torch.long, device=scores.device), reduction="sum")


def draw_group(example: RerankerExample, negatives: int, key: str) -> list[tuple[str, str]]:
    """The query with a positive, then with each of up to ``negatives`` negatives, decided by ``key`` alone."""
    rng = random.Random(key)
    passages = [rng.choice(example.pos), *rng.sample(example.neg, min(negatives, len(example.neg)))]
    return [(example.query, passage) for passage in passages]


def draw_batches(examples: int, batch_size: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, example), each epoch all examples in an order that (seed, epoch) decides."""
    for epoch in count():
        order = random.Random(f"{seed}-{epoch}").sample(range(examples), examples)
        for start in range(0, examples, batch_size):
            yield [(epoch, index) for index in order[start : start + batch_size]]


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the attention modules: q, k, v, o, by whatever names the family has them."""
    names = {
        f"{outer}.{inner}"
        for outer, attention in model.named_modules()
        if type(attention).__name__.endswith("Attention")
        for inner, layer in attention.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    }
    if not names:
        raise InputError(f"{type(model).__name__}: no attention layers found to adapt; name them as lora_targets")
    return sorted(names)


def _add_adapter(model: PreTrainedModel, config: RerankerTrainingConfig) -> peft.PeftModel:
    """Put LoRA layers into ``model`` itself and freeze the rest."""
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules=list(config.lora_targets) or attention_projections(model),
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_targets {', '.join(config.lora_targets)}: {str(error).splitlines()[0]}") from error


def _optimise(
    reranker: Reranker, examples: Sequence[RerankerExample], config: RerankerTrainingConfig, progress: bool
) -> list[float]:
    """Train in place; the loss of every step."""
    weights = [weight for weight in reranker.model.parameters() if weight.requires_grad]
    steps = config.max_steps or config.epochs * -(-len(examples) // config.batch_size)
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup_ratio * steps), steps)
    reranker.model.train()
    losses: list[float] = []
    batches = islice(draw_batches(len(examples), config.batch_size, config.seed), steps)
    with tqdm(batches, total=steps, desc="training the reranker", unit="step", disable=not progress) as bar:
        for batch in bar:
            loss = 0.0
            for start in range(0, len(batch), config.micro_batch_size):
                micro = batch[start : start + config.micro_batch_size]
                groups = [
                    draw_group(examples[index], config.negatives, f"{config.seed}-{epoch}-{index}")
                    for epoch, index in micro
                ]
                scores = reranker.yes_logits(reranker.encode([pair for group in groups for pair in group]))
                part = group_loss(scores, [len(group) for group in groups]) / len(batch)
                part.backward()
                loss += part.item()
            if not np.isfinite(loss):
                raise InputError(f"the loss at step {len(losses) + 1} is {loss}; try a lower learning rate")
            nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}")
    return losses
