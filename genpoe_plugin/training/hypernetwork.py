"""Training a hypernetwork: the LLM is frozen, and only the hypernetwork is trained.

An example is a question, its answer, and a passage that states it, optionally with distractors. The LLM with the
passages' experts predicts the answer's tokens; the loss is the cross-entropy on these tokens.
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
from genpoe_plugin.training.llm_state_cache import DEFAULT_STATE_BYTES, CachingGenerator, caches_states
from genpoe_plugin.training.trainer import train
from genpoe_plugin.training.trainer_state import Progress
from genpoe_plugin.training.training_arguments import HypernetworkTraining
from genpoe_plugin.training.validation import Validation

Examples = Sequence[TrainingExample | PassageExample]


class HypernetworkLearner:
    """A hypernetwork in training, with its frozen LLM and its examples.

    Args:
        config: configuration of the hypernetwork; its ``hidden_size`` must be the LLM's.
        arguments: the training arguments.
        examples: training data, at least one example.
        model, tokenizer: the LLM; its weights are frozen in place.
        validation: held-out questions.
        initial: a hypernetwork whose weights are the initial ones; weights that it lacks are drawn.
        state_bytes: budget in memory for the LLM's states of passages.
        state_files: files with the LLM's states of passages.

    Raises:
        InputError: there are no examples, or the configuration does not fit the LLM or the initial hypernetwork.
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
        state_bytes: int = DEFAULT_STATE_BYTES,
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
            _initialise_from(hypernetwork, initial)
        self.config = config
        self.arguments = arguments
        self.training_set = examples
        self.model = model
        self.tokenizer = tokenizer
        self.validation = validation
        # Without a cache, the LLM reads the passages of a batch together.
        if caches_states(config, arguments, len(examples)) or state_files is not None:
            self.generator: ExpertGenerator = CachingGenerator(
                hypernetwork, model, tokenizer, max_bytes=state_bytes, files=state_files
            )
        else:
            self.generator = ExpertGenerator(hypernetwork, model, tokenizer)

    @property
    def examples(self) -> int:
        return len(self.training_set)

    @property
    def module(self) -> nn.Module:
        return self.generator.hypernetwork

    @module.setter
    def module(self, wrapped: nn.Module) -> None:
        self.generator.hypernetwork = cast(Hypernetwork, wrapped)

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """The loss of each draw, as a mean over its target tokens, ``[n]``."""
        seed = self.arguments.seed
        drawn = [self._drawn(draw) for draw in draws]
        knowledge = random.Random(f"{seed}-knowledge-{step}").random() < self.arguments.knowledge
        return self.losses_of(drawn, knowledge)

    def losses_of(self, drawn: Sequence[DrawnExample], knowledge: bool) -> Tensor:
        """The loss of each example, ``[n]``; with ``knowledge``, its prompt contains its passages."""
        batch = make_batch(drawn, knowledge, self.tokenizer)
        device = self.generator.device
        with inject(self.model, self.config.layers, row_experts(self.generator, drawn, batch.start)):
            logits = answer_logits(self.model, batch, device)
        labels = batch.labels.to(logits.device)
        losses = token_losses(logits, labels)
        if share := self.arguments.distillation:
            with torch.no_grad():
                teacher = answer_logits(self.model, make_batch(drawn, True, self.tokenizer), device)
            losses = (1 - share) * losses + share * divergences(logits, teacher)
        if wrong := [number for number, example in enumerate(drawn) if example.wrong]:
            with torch.no_grad():
                without_experts = answer_logits(self.model, batch.rows(wrong), device)
            wrong_losses = divergences(logits[wrong], without_experts)
            losses = losses.index_copy(0, torch.tensor(wrong, device=losses.device), wrong_losses)
        return mean_over_targets(losses, labels)

    def _drawn(self, draw: Draw) -> DrawnExample:
        """The example of a draw, with its passages and gates."""
        arguments = self.arguments
        seed, most = arguments.seed, arguments.num_passages
        if isinstance(example := self.training_set[draw.example], PassageExample):
            return example.draw(draw.rng(seed, "passages"))
        wrong = draw.rng(seed, "unanswerable").random() < arguments.unanswerable
        choose = draw_wrong_passages if wrong else draw_passages
        return choose(
            cast(Sequence[TrainingExample], self.training_set), draw.example, most, draw.rng(seed, "passages")
        )

    def validate(self, process: int, processes: int) -> dict[str, float]:
        """EM, F1 and loss on the held-out questions; see `Learner.validate`."""
        return self.validation.measure(self.generator, process, processes) if self.validation else {}

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the checkpoint; see `Learner.save`."""
        write_hypernetwork(directory, self.config, weights, self.model, self.tokenizer, record)


def _initialise_from(hypernetwork: Hypernetwork, initial: Hypernetwork) -> None:
    """Copy the weights of ``initial`` into ``hypernetwork``.

    Raises:
        InputError: ``hypernetwork`` lacks one of the weights, or has it in another shape.
    """
    weights = initial.state_dict()
    current = hypernetwork.state_dict()
    lost = [name for name, weight in weights.items() if name not in current or current[name].shape != weight.shape]
    if lost:
        raise InputError(
            f"the initial checkpoint has {lost[0]} of shape {tuple(weights[lost[0]].shape)}, but the new configuration "
            "does not; use the same addition_rank and window"
        )
    hypernetwork.load_state_dict(weights, strict=False)
    if isinstance(hypernetwork.head, AttentionHead):
        with torch.no_grad():  # units of more tokens start with proportionally more mass in the softmax
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
    state_bytes: int = DEFAULT_STATE_BYTES,
    state_files: ExpertFiles | None = None,
    accelerator: Accelerator | None = None,
) -> Progress:
    """Train a hypernetwork and write its checkpoint to ``out``; resume an earlier run with the same arguments.

    Args:
        config: configuration of the hypernetwork.
        arguments: the training arguments.
        examples: training data.
        model, tokenizer: the LLM; its weights are frozen in place.
        out: directory of the checkpoint.
        identity: other facts that decide the result, such as the data's hash; with other facts, it is another run.
        validation: held-out questions that decide which weights are best; without them, the last weights are written.
        initial: a hypernetwork of experts in the attention with the initial weights; weights that it lacks are drawn.
        state_bytes: budget in memory for the LLM's states of passages; the least recently used are dropped first.
        state_files: files with the LLM's states of passages, for later epochs and runs.
        accelerator: device and processes of a distributed run.

    Returns:
        The progress of the run.

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
