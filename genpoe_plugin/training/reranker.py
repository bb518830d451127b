"""Training the reranker: groups of one positive and several negatives, cross-entropy over their "Yes" logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_directory
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.devices import accelerator_on
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.reranker_data import RerankerExample
from genpoe_plugin.training.trainer import train
from genpoe_plugin.training.trainer_state import Progress
from genpoe_plugin.training.training_arguments import RerankerTraining


class RerankerLearner:
    """A reranker in training, with a LoRA adapter or with all weights.

    Args:
        reranker: the initial reranker; it is changed in place.
        arguments: the training arguments.
        examples: training data, at least one example.
        held_out: held-out examples; :meth:`validate` ranks all their passages.

    Raises:
        InputError: all weights are trained but are not float32, or there are no layers with the names in
            ``lora_targets``.
    """

    name = "reranker"

    def __init__(
        self,
        reranker: Reranker,
        arguments: RerankerTraining,
        examples: Sequence[RerankerExample],
        held_out: Sequence[RerankerExample] = (),
    ) -> None:
        self.reranker = reranker
        self.arguments = arguments
        self.training_set = examples
        self.held_out = held_out
        if arguments.lora_rank:
            reranker.model = with_adapter(
                reranker.model,
                rank=arguments.lora_rank,
                alpha=arguments.lora_alpha,
                seed=arguments.seed,
                targets=arguments.lora_targets,
            )
        elif reranker.model.dtype != torch.float32:
            raise InputError(
                "training all weights needs dtype float32; bfloat16 is for the frozen base of a LoRA adapter"
            )
        if arguments.gradient_checkpointing:
            reranker.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def examples(self) -> int:
        return len(self.training_set)

    @property
    def module(self) -> nn.Module:
        return self.reranker.model

    @module.setter
    def module(self, wrapped: nn.Module) -> None:
        self.reranker.model = cast(PreTrainedModel, wrapped)

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """The cross-entropy of each draw's positive among its group, ``[n]``."""
        groups = [
            draw_group(self.training_set[draw.example], self.arguments.negatives, draw, self.arguments.seed)
            for draw in draws
        ]
        scores = self.reranker.score_rows(self.reranker.encode([pair for group in groups for pair in group]))
        return group_losses(scores, [len(group) for group in groups])

    def validate(self, process: int, processes: int) -> dict[str, float]:
        """MRR@10 and recall@1 on the held-out examples; see `Learner.validate`."""
        if not self.held_out:
            return {}
        ranks = positive_ranks(self.reranker, self.held_out[process::processes])
        return ranking_quality(gather_object(ranks) if processes > 1 else ranks)

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the model with merged adapter, in FlagEmbedding's format, and the adapter alone in ``adapter/``."""
        model = cast(PreTrainedModel, getattr(self.module, "module", self.module))
        model.load_state_dict(weights, strict=False)
        merged: PreTrainedModel = model
        if self.arguments.lora_rank:
            with atomic_directory(directory / "adapter") as temporary:
                model.save_pretrained(str(temporary), save_embedding_layers=False)
                self.reranker.save_text_side(temporary)
            merged = cast(peft.PeftModel, copy.deepcopy(model)).merge_and_unload()
        with atomic_directory(directory / ".merged") as temporary:
            merged.save_pretrained(str(temporary))
            self.reranker.save_text_side(temporary)
        for file in (directory / ".merged").iterdir():
            file.replace(directory / file.name)
        (directory / ".merged").rmdir()


def positive_ranks(reranker: Reranker, examples: Sequence[RerankerExample]) -> list[int]:
    """The rank of each example's best positive among all its passages; in a tie, negatives come first."""
    pairs = [(example.query, text) for example in examples for text in example.pos + example.neg]
    scores = reranker.score(pairs)
    ranks = []
    for example in examples:
        group, scores = np.split(scores, [len(example.pos) + len(example.neg)])
        pos, neg = np.split(group, [len(example.pos)])
        ranks.append(1 + int((neg >= pos.max()).sum()))
    return ranks


def ranking_quality(ranks: Sequence[int]) -> dict[str, float]:
    """MRR@10 and recall@1 for the given ranks of positives."""
    return {
        "mrr@10": sum(1 / rank for rank in ranks if rank <= 10) / len(ranks),
        "recall@1": sum(rank == 1 for rank in ranks) / len(ranks),
    }


def group_losses(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """The cross-entropy of each group's first score (its positive's) among all its scores, ``[groups]``.

    Args:
        scores: the scores of all groups in turn, ``[sum of sizes]``.
        sizes: the number of scores in each group.
    """
    groups = pad_sequence(list(scores.split(list(sizes))), batch_first=True, padding_value=-torch.inf)
    first = torch.zeros(len(sizes), dtype=torch.long, device=scores.device)
    return functional.cross_entropy(groups, first, reduction="none")


def draw_group(example: RerankerExample, negatives: int, draw: Draw, seed: int) -> list[tuple[str, str]]:
    """The (query, passage) pairs of one draw: a positive, then up to ``negatives`` negatives."""
    rng = draw.rng(seed, "group")
    passages = [rng.choice(example.pos), *rng.sample(example.neg, min(negatives, len(example.neg)))]
    return [(example.query, passage) for passage in passages]


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the attention modules (query, key, value, output), in any model family.

    Raises:
        InputError: there are no such layers.
    """
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


def with_adapter(
    model: PreTrainedModel, *, rank: int, alpha: float, seed: int, targets: Sequence[str] = ()
) -> PreTrainedModel:
    """Add LoRA layers to ``model`` in place, by default on the attention's linear layers, and freeze its other weights.

    Raises:
        InputError: there are no layers with the names ``targets``.
    """
    names = list(targets) or attention_projections(model)
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cast(PreTrainedModel, peft.get_peft_model(model, lora))
    except ValueError as error:
        raise InputError(f"lora_targets {', '.join(targets)}: {str(error).splitlines()[0]}") from error


def train_reranker(
    reranker: Reranker,
    arguments: RerankerTraining,
    examples: Sequence[RerankerExample],
    out: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    held_out: Sequence[RerankerExample] = (),
    accelerator: Accelerator | None = None,
) -> Progress:
    """Train ``reranker`` and write it to ``out``; resume an earlier run with the same arguments.

    Args:
        reranker: the initial reranker; it is changed in place.
        arguments: the training arguments.
        examples: training data.
        out: directory of the trained reranker.
        identity: other facts that decide the result, such as the data's hash; with other facts, it is another run.
        held_out: examples that decide which weights are best; without them, the last weights are written.
        accelerator: device and processes of a distributed run.

    Returns:
        The progress of the run.

    Raises:
        InputError: see :class:`RerankerLearner` and :func:`~genpoe_plugin.training.trainer.train`.
    """
    learner = RerankerLearner(reranker, arguments, examples, held_out)
    whole = {**asdict(arguments), "examples": len(examples), **(identity or {})}
    return train(learner, arguments, whole, Path(out), accelerator or accelerator_on(str(reranker.device)))
