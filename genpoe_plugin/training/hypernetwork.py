"""Training a hypernetwork: the LLM is frozen, and only what generates the experts learns.

One example is a question, its answer and a passage that states it, at wish among others that do not. The answer's
tokens are predicted by the LLM with the passages' experts in it; cross-entropy on those tokens is the loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.checkpoints.checkpoint import write_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.decoder import find_mlp
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import AttentionHead, Hypernetwork
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.llm.language_model import embedding_table
from genpoe_plugin.training.arguments import HypernetworkTraining
from genpoe_plugin.training.batches import answer_logits, divergences, make_batch, mean_over_targets, token_losses
from genpoe_plugin.training.devices import accelerator_on
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.examples import (
    DrawnExample,
    PassageExample,
    TrainingExample,
    draw_passages,
    draw_wrong_passages,
    row_experts,
)
from genpoe_plugin.training.passage_states import IN_MEMORY, KeepingGenerator, keeps_states
from genpoe_plugin.training.state import Progress
from genpoe_plugin.training.trainer import train
from genpoe_plugin.training.validation import Validation

Examples = Sequence[TrainingExample | PassageExample]


class HypernetworkLearner:
    """A hypernetwork, the LLM that it learns for, and the examples that it learns from.

    Args:
        config: the hypernetwork's form; its ``hidden_size`` must be the LLM's.
        initial: a hypernetwork to begin with; what it lacks begins as drawn.
        state_bytes, state_files: memory for what the LLM makes of passages, and a folder for it.
        arguments: the training's.
        examples: at least one.
        model, tokenizer: the LLM; it is frozen here and stays so.
        validation: held-out questions.

    Raises:
        InputError: no examples, or a configuration that does not fit the LLM.
    """

    name = "hypernetwork"

    def __init__(
        self,
        config: HypernetworkConfig,
        arguments: HypernetworkTraining,
        examples: Examples,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        validation: Validation | None = None,
        initial: Hypernetwork | None = None,
        *,
        state_bytes: int = IN_MEMORY,
        state_files: ExpertFiles | None = None,
    ) -> None:
        if not examples:
            raise InputError("no training example: no question has a passage that contains one of its answers")
        with embedding_table(model) as table:
            width, device = table.shape[1], table.device
        if config.hidden_size != width:
            raise InputError(f"hypernetwork hidden_size is {config.hidden_size}, the LLM's is {width}")
        if config.head != "attention":
            find_mlp(model, config.layer)
        model.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            hypernetwork = Hypernetwork(config).to(device)
        if initial is not None:
            _begin_with(hypernetwork, initial)
        self.config = config
        self.arguments = arguments
        self.drawn_from = examples
        self.model = model
        self.tokenizer = tokenizer
        self.validation = validation
        # Kept where a passage comes again; else those of a batch are read together.
        if keeps_states(config, arguments, len(examples)) or state_files is not None:
            self.generator: ExpertGenerator = KeepingGenerator(
                hypernetwork, model, tokenizer, most_bytes=state_bytes, files=state_files
            )
        else:
            self.generator = ExpertGenerator(hypernetwork, model, tokenizer)

    @property
    def examples(self) -> int:
        return len(self.drawn_from)

    @property
    def module(self) -> nn.Module:
        return self.generator.hypernetwork

    @module.setter
    def module(self, wrapped: nn.Module) -> None:
        self.generator.hypernetwork = cast(Hypernetwork, wrapped)

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """For each draw the mean over its target tokens."""
        seed = self.arguments.seed
        drawn = [self._drawn(draw) for draw in draws]
        knowledge = random.Random(f"{seed}-knowledge-{step}").random() < self.arguments.knowledge
        batch = make_batch(drawn, knowledge, self.tokenizer)
        device = self.generator.device
        with inject(self.model, self.config.layers, row_experts(self.generator, drawn, batch.start)):
            logits = answer_logits(self.model, batch, device)
        labels = batch.labels.to(logits.device)
        losses = token_losses(logits, labels)
        if share := self.arguments.distillation:
            with torch.no_grad():
                taught = answer_logits(self.model, make_batch(drawn, True, self.tokenizer), device)
            losses = (1 - share) * losses + share * divergences(logits, taught)
        if wrong := [number for number, example in enumerate(drawn) if example.wrong]:
            with torch.no_grad():
                alone = answer_logits(self.model, batch.rows(wrong), device)
            as_without = divergences(logits[wrong], alone)
            losses = losses.index_copy(0, torch.tensor(wrong, device=losses.device), as_without)
        return mean_over_targets(losses, labels)

    def _drawn(self, draw: Draw) -> DrawnExample:
        """The passages of one use of an example."""
        arguments = self.arguments
        seed, most = arguments.seed, arguments.num_passages
        if isinstance(example := self.drawn_from[draw.example], PassageExample):
            return example.draw(draw.rng(seed, "passages"))
        wrong = draw.rng(seed, "unanswerable").random() < arguments.unanswerable
        choose = draw_wrong_passages if wrong else draw_passages
        return choose(cast(Sequence[TrainingExample], self.drawn_from), draw.example, most, draw.rng(seed, "passages"))

    def validate(self, process: int, processes: int) -> dict[str, float]:
        return self.validation.measure(self.generator, process, processes) if self.validation else {}

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        write_hypernetwork(directory, self.config, weights, self.model, self.tokenizer, record)


def _begin_with(hypernetwork: Hypernetwork, initial: Hypernetwork) -> None:
    """Give the weights of another.

    Raises:
        InputError: it has some that find no place.
    """
    weights = initial.state_dict()
    own = hypernetwork.state_dict()
    lost = [name for name, weight in weights.items() if name not in own or own[name].shape != weight.shape]
    if lost:
        raise InputError(
            f"the checkpoint to begin with has {lost[0]} of shape {tuple(weights[lost[0]].shape)}, which the new form "
            "has not; keep its addition_rank and window"
        )
    hypernetwork.load_state_dict(weights, strict=False)
    if isinstance(hypernetwork.head, AttentionHead):
        with torch.no_grad():  # units of more tokens begin with as much more of the softmax
            hypernetwork.head.bias.add_(math.log(hypernetwork.config.window / initial.config.window))


def train_hypernetwork(
    config: HypernetworkConfig,
    arguments: HypernetworkTraining,
    examples: Examples,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    validation: Validation | None = None,
    initial: Hypernetwork | None = None,
    state_bytes: int = IN_MEMORY,
    state_files: ExpertFiles | None = None,
    accelerator: Accelerator | None = None,
) -> Progress:
    """Train a hypernetwork and write its checkpoint, going on where an earlier run with the same arguments stopped.

    Args:
        identity: what else decides the result, such as the data's hash: a run with another is another run.
        validation: decides which weights are best; without it the last are kept.
        initial: a hypernetwork of experts in the attention to begin with; what it lacks begins as drawn.
        state_bytes: of memory for what the LLM makes of passages; the least recently used go first.
        state_files: where it is kept as well, for later epochs and runs.
        accelerator: of a distributed run.

    Raises:
        InputError: see :class:`HypernetworkLearner` and :func:`~genpoe_plugin.training.trainer.train`.
    """
    learner = HypernetworkLearner(
        config,
        arguments,
        examples,
        model,
        tokenizer,
        validation,
        initial,
        state_bytes=state_bytes,
        state_files=state_files,
    )
    whole = {**config.to_dict(), **asdict(arguments), "examples": len(examples), **(identity or {})}
    return train(learner, arguments, whole, Path(out), accelerator or accelerator_on(str(learner.generator.device)))
