"""The arguments of both trainings: how long, how fast, in what precision, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from genpoe_plugin.errors import InputError
from genpoe_plugin.training.draws import steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """How to optimise.

    Attributes:
        epochs: passes over the examples.
        max_steps: optimizer steps, instead of whole epochs.
        batch_size: examples an optimizer step, of each process.
        micro_batch_size: examples that a process holds in memory at a time (all of its batch by default); gradients
            are accumulated, so the result does not depend on it.
        learning_rate: peak of AdamW's rate, reached after ``warmup_ratio`` of the steps and then lowered by a cosine
            to ``final_rate`` of it.
        max_gradient_norm: gradients are clipped to this length.
        precision: in which the forward pass computes; the weights that learn stay in float32.
        validate_every: steps between two validations; at the end only by default.
        save_every: steps between two savings of all that a resumed run needs.
        seed: random seed for initialisation, data order and sampling.
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
        """Optimizer steps of the whole run."""
        return self.max_steps or self.epochs * steps_per_epoch(examples, self.batch_size * processes)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` of ``steps``, counted from 0: linear warm-up, then a cosine."""
        warmup = round(self.warmup_ratio * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True, kw_only=True)
class HypernetworkTraining(TrainingArguments):
    """How to train a hypernetwork.

    Attributes:
        num_passages: passages an example has at most, one of which states the answer: every number from 1 is drawn
            equally often. With 1 there are no distractors.
        knowledge: share of the steps whose prompts also hold the passages as text, as in ``genpoe_rag``; whole steps,
            since one long prompt would make a batch of short ones as long.
        distillation: weight of the divergence from the frozen LLM's own distribution with the passages in its prompt,
            beside cross-entropy, which has what is left of 1.
        unanswerable: share of the examples whose passages do not state the answer. What they are to be answered with is
            the LLM's own distribution without experts, over the tokens of the right answer.
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
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RerankerTraining(TrainingArguments):
    """How to train a reranker; the defaults are those of bge-reranker-v2-gemma. A batch is of groups.

    Attributes:
        negatives: drawn anew per example and epoch; an example that has fewer uses all of them.
        lora_rank: of the adapter; 0 trains every weight instead.
        lora_targets: names of the layers that get one; all linear layers of the attention by default.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
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
            raise InputError(f"lora_rank is {self.lora_rank}; it must be 0 (train every weight) or above")
