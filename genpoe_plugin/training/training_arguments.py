"""The training arguments of rerankers and hypernetworks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from genpoe_plugin.errors import InputError
from genpoe_plugin.training.draws import steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Arguments of the optimisation.

    Attributes:
        epochs: number of passes over the examples.
        max_steps: number of optimizer steps; replaces ``epochs``.
        batch_size: examples per optimizer step and process.
        micro_batch_size: examples per forward pass of a process, the whole batch by default. Gradients are accumulated,
            so the result does not depend on it.
        learning_rate: peak learning rate of AdamW.
        warmup_ratio: share of the steps with linear warm-up; a cosine decay follows.
        final_rate: final learning rate, as a share of the peak.
        weight_decay: weight decay of AdamW.
        max_gradient_norm: largest norm of the gradient; larger gradients are clipped.
        precision: precision of the forward pass; trained weights stay in float32.
        validate_every: steps between validations; by default only at the end.
        save_every: steps between saves of the trainer's state, for resuming.
        seed: random seed for initialisation, data order and sampling.

    Raises:
        InputError: an argument is out of range.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    final_rate: float = 0.01
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    validate_every: int | None = None
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "micro_batch_size", "validate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        for name in ("learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_ratio", "final_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name, hint in get_type_hints(type(self)).items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
                raise InputError(f"{name} is {value}; it must be one of {', '.join(choices)}")

    def steps(self, examples: int, processes: int) -> int:
        """Number of optimizer steps of the whole run."""
        return self.max_steps or self.epochs * steps_per_epoch(examples, self.batch_size * processes)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then cosine decay."""
        warmup = round(self.warmup_ratio * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True, kw_only=True)
class HypernetworkTraining(TrainingArguments):
    """Arguments of a hypernetwork's training.

    Attributes:
        num_passages: largest number of passages per example, one of which states the answer. Every number from 1 is
            drawn equally often; 1 means no distractors.
        knowledge: share of the steps whose prompts also contain the passages, as in ``genpoe_rag``. It applies to whole
            steps, because one long prompt makes the whole batch long.
        distillation: weight of the divergence from the frozen LLM's own distribution with the passages in its prompt;
            cross-entropy has the remaining weight up to 1.
        unanswerable: share of the examples whose passages do not state the answer. Their target is the LLM's own
            distribution without experts, over the tokens of the right answer.
    """

    num_passages: int = 1
    knowledge: float = 0.0
    distillation: float = 0.0
    unanswerable: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_passages < 1:
            raise InputError(f"num_passages is {self.num_passages}; it must be at least 1")
        for name in ("knowledge", "distillation", "unanswerable"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RerankerTraining(TrainingArguments):
    """Arguments of a reranker's training; the defaults are those of bge-reranker-v2-gemma.

    An example of a batch is a group: a query with one positive and several negatives.

    Attributes:
        negatives: number of negatives in a group, drawn again in every epoch; all of them if an example has fewer.
        lora_rank: rank of the LoRA adapter; 0 trains all weights instead.
        lora_alpha: scaling of the LoRA adapter.
        lora_targets: names of the layers with an adapter; by default all linear layers of the attention.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them.
    """

    micro_batch_size: int | None = 1
    negatives: int = 15
    lora_rank: int = 32
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ()
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 1:
            raise InputError(f"negatives is {self.negatives}; it must be at least 1")
        if not self.lora_alpha > 0:
            raise InputError(f"lora_alpha is {self.lora_alpha}; it must be above 0")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank is {self.lora_rank}; it must be 0 (train all weights) or above")
