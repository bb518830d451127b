"""Training a hypernetwork: the LLM is frozen, and only what generates the experts learns.

One example is a question, its answer and a passage that states it. The answer's tokens are predicted by the LLM with
the passage's expert beside its MLP; cross-entropy on those tokens is the loss.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.answers import has_answer
from genpoe_plugin.checkpoint import is_checkpoint, save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts, find_mlp, inject
from genpoe_plugin.files import atomic_file, check_replaceable
from genpoe_plugin.language_model import embedding_table
from genpoe_plugin.prompts import first_token_at, rag_prompt
from genpoe_plugin.questions import Question

IGNORED = -100


@dataclass(frozen=True)
class HypernetworkTraining:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the examples.
        max_steps: stop after so many optimizer steps, if earlier.
        batch_size: examples a step.
        learning_rate: peak of AdamW's rate, reached after ``warmup_steps`` and lowered to a hundredth by a cosine.
        max_gradient_norm: gradients are clipped to this length.
        knowledge: share of the steps whose prompts also hold the passage as text, as in ``genpoe_rag``; whole steps,
            since one long prompt would make a batch of short ones as long.
        seed: of initialisation, order and draws.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    max_gradient_norm: float = 1.0
    knowledge: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.knowledge <= 1:
            raise InputError(f"knowledge is {self.knowledge}; it is a share, from 0 to 1")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True)
class TrainingExample:
    """A question, the answer as the passage has it, and the passage's string."""

    question: str
    answer: str
    passage: str


def training_examples(questions: Iterable[Question]) -> list[TrainingExample]:
    """An example for every question that has a passage with an answer in it: its best such passage.

    Passages that the file itself marks as having no answer are passed over. The target is the first accepted answer
    that the passage uses.
    """
    examples = []
    for question in questions:
        for retrieved in question.passages:
            if retrieved.has_answer is False:
                continue
            stated = [answer for answer in question.answers if has_answer(retrieved.passage.text, [answer])]
            if stated:
                examples.append(TrainingExample(question.question, stated[0], retrieved.passage.string))
                break
    return examples


@dataclass(frozen=True)
class Batch:
    """Left-padded token ids, their mask, and the labels of the last ``labels.shape[1]`` positions."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    start: tuple[int, ...]
    passages: tuple[str, ...]


def make_batch(examples: Sequence[TrainingExample], knowledge: bool, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Tokenise examples, as RAG prompts with ``knowledge``.

    The target is `` answer\\n``, its space put where the tokenizer itself puts it.
    """
    rows: list[tuple[list[int], int]] = []
    starts = []
    for example in examples:
        prompt = rag_prompt(example.question, [example.passage] if knowledge else [])
        encoding = tokenizer(f"{prompt} {example.answer}\n", return_offsets_mapping=True)
        offsets = encoding["offset_mapping"]
        question_start = prompt.rindex("Question:") if knowledge else 0
        starts.append(first_token_at(offsets, question_start) if knowledge else 0)
        rows.append((encoding["input_ids"], len(offsets) - first_token_at(offsets, len(prompt))))
    width, targets = max(len(ids) for ids, _ in rows), max(count for _, count in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), targets), IGNORED)
    for number, (ids, count) in enumerate(rows):
        input_ids[number, width - len(ids) :] = torch.tensor(ids)
        attention_mask[number, width - len(ids) :] = 1
        labels[number, targets - count :] = torch.tensor(ids[-count:])
    return Batch(input_ids, attention_mask, labels, tuple(starts), tuple(example.passage for example in examples))


def answer_loss(model: PreTrainedModel, generator: ExpertGenerator, batch: Batch) -> Tensor:
    """Cross-entropy of the answers: the mean over examples of the mean over their target tokens."""
    device = generator.device
    experts = generator.generate(batch.passages)
    rows = RowExperts(
        experts.unsqueeze(1),
        torch.ones(len(batch.passages), 1, device=device),
        torch.tensor(batch.start, device=device),
    )
    mask, labels = batch.attention_mask.to(device), batch.labels.to(device)
    with inject(model, generator.hypernetwork.config.layer, rows):
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=labels.shape[1] + 1,
        ).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return (losses.sum(1) / (labels != IGNORED).sum(1)).mean()


def learning_rate_at(step: int, steps: int, training: HypernetworkTraining) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    return training.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train_hypernetwork(
    config: HypernetworkConfig,
    training: HypernetworkTraining,
    examples: Sequence[TrainingExample],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
) -> Hypernetwork:
    """Train a hypernetwork and write its checkpoint to ``output``, with the loss curve as ``loss.csv``.

    Args:
        config: the hypernetwork's form; its ``hidden_size`` must be the LLM's.
        training: length, rates, seed.
        examples: at least one.
        model, tokenizer: the LLM; it is frozen here and stays so.
        output: the checkpoint directory; an older checkpoint there is replaced.

    Raises:
        InputError: no examples, a configuration that does not fit the LLM, an ``output`` that holds something else, or
            a loss that is no longer a number.
    """
    check_replaceable(output, is_checkpoint, "a hypernetwork's checkpoint")
    if not examples:
        raise InputError("no training example: no question has a passage that contains one of its answers")
    with embedding_table(model) as table:
        width, device = table.shape[1], table.device
    if config.hidden_size != width:
        raise InputError(f"hypernetwork hidden_size is {config.hidden_size}, the LLM's is {width}")
    find_mlp(model, config.layer)
    model.requires_grad_(False).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        hypernetwork = Hypernetwork(config).to(device).train()
    generator = ExpertGenerator(hypernetwork, model, tokenizer)
    optimizer = torch.optim.AdamW(hypernetwork.parameters(), lr=training.learning_rate, weight_decay=0.01)
    steps = training.epochs * math.ceil(len(examples) / training.batch_size)
    if training.max_steps is not None:
        steps = min(steps, training.max_steps)
    curve = []
    with tqdm(total=steps, desc="Training the hypernetwork") as bar:
        for step, batch in enumerate(_batches(examples, training, tokenizer, steps)):
            rate = learning_rate_at(step, steps, training)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = answer_loss(model, generator, batch)
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(f"the loss at step {step + 1} is {value}; try a lower learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hypernetwork.parameters(), training.max_gradient_norm)
            optimizer.step()
            curve.append((step + 1, value, rate))
            bar.set_postfix(loss=f"{curve[-1][1]:.3f}", refresh=False)
            bar.update()
    hypernetwork.eval()
    record: dict[str, Any] = {**asdict(training), "steps": steps, "examples": len(examples), "final_loss": curve[-1][1]}
    save_hypernetwork(output, hypernetwork, model, tokenizer, record)
    with atomic_file(Path(output) / "loss.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "learning_rate"), *curve])
    return hypernetwork


def _batches(
    examples: Sequence[TrainingExample], training: HypernetworkTraining, tokenizer: PreTrainedTokenizerBase, steps: int
) -> Iterable[Batch]:
    """``steps`` batches; every epoch is a fresh shuffle, and every draw depends on the seed and the step alone."""
    order: list[int] = []
    epoch = 0
    for step in range(steps):
        if not order:
            order = list(range(len(examples)))
            random.Random(f"{training.seed}-order-{epoch}").shuffle(order)
            epoch += 1
        chosen, order = order[: training.batch_size], order[training.batch_size :]
        draws = random.Random(f"{training.seed}-draws-{step}")
        yield make_batch([examples[number] for number in chosen], draws.random() < training.knowledge, tokenizer)
