"""``real-llm adapter``: a LoRA adapter for RAG, trained on the same questions as the experts.

Training also teaches the form of answers, so trained experts are compared with trained RAG, not only with a plain
prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import click
import peft
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.files import atomic_directory, file_digest
from genpoe_plugin.llm.language_model import load_language_model
from genpoe_plugin.training.batches import answer_logits, make_batch, mean_over_targets, token_losses
from genpoe_plugin.training.devices import accelerator_on
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.examples import TrainingExample, draw_passages, training_examples
from genpoe_plugin.training.reranker import with_adapter
from genpoe_plugin.training.trainer import train
from genpoe_plugin.training.training_arguments import HypernetworkTraining


class RagLearner:
    """An LLM with a LoRA adapter that learns to answer with passages in the prompt.

    Args:
        model, tokenizer: the LLM; it is modified in place.
        examples: at least one example.
        rank: rank of the adapter, which covers all projections of the attention.
    """

    name = "RAG adapter"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TrainingExample],
        arguments: HypernetworkTraining,
        rank: int,
    ) -> None:
        self.tokenizer, self.training_set, self.arguments = tokenizer, examples, arguments
        self.device = model.device
        self.module: nn.Module = with_adapter(model, rank=rank, alpha=2 * rank, seed=arguments.seed)

    @property
    def examples(self) -> int:
        return len(self.training_set)

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """Loss of each draw, as for a hypernetwork but with passages in the prompt and without experts."""
        arguments = self.arguments
        examples = [
            draw_passages(self.training_set, draw.example, arguments.num_passages, draw.rng(arguments.seed, "passages"))
            for draw in draws
        ]
        batch = make_batch(examples, True, self.tokenizer)
        logits = answer_logits(cast(PreTrainedModel, self.module), batch, self.device)
        labels = batch.labels.to(logits.device)
        return mean_over_targets(token_losses(logits, labels), labels)

    def validate(self, process: int, processes: int) -> dict[str, float]:
        return {}

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Save the adapter's current weights; there is no validation to select others."""
        with atomic_directory(directory / ADAPTER) as temporary:
            cast(peft.PeftModel, self.module).save_pretrained(temporary)


ADAPTER = "adapter"


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="File of questions with passages.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the training.")
@click.option("--steps", required=True, type=click.IntRange(1))
@click.option("--batch-size", required=True, type=click.IntRange(1), help="Questions per step.")
@click.option("--learning-rate", required=True, type=float)
@click.option("--rank", required=True, type=click.IntRange(1), help="Rank of the adapter.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the LLM.")
@click.option("--device", default="cpu", show_default=True, help="Device of the LLM.")
def adapter(
    llm: str,
    data: Path,
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rank: int,
    seed: int,
    dtype: str,
    device: str,
) -> None:
    """Train a LoRA adapter on questions with their passages in the prompt. Rerun the same command to resume."""
    model, tokenizer = load_language_model(llm, device=device, dtype=dtype)
    model.requires_grad_(False)
    arguments = HypernetworkTraining(max_steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    identity = {"llm": llm, "dtype": dtype, "data": file_digest(data)}
    train_adapter(model, tokenizer, training_examples(read_questions(data)), arguments, rank, out, identity)


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    arguments: HypernetworkTraining,
    rank: int,
    out: Path,
    identity: Mapping[str, Any],
) -> Path:
    """Train an adapter, or resume its training; returns its folder, for the model argument ``peft``.

    Args:
        identity: what identifies LLM and data.

    Raises:
        InputError: ``out`` has a training with other arguments or data.
    """
    learner = RagLearner(model, tokenizer, examples, arguments, rank)
    identity = {**asdict(arguments), "rank": rank, "examples": len(examples), **identity}
    train(learner, arguments, identity, out, accelerator_on(str(model.device)))
    return out / ADAPTER
