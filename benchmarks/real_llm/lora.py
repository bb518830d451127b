"""RAG that learned as much as experts did: a LoRA adapter, trained on the same questions with their passages.

Training teaches how answers look as well, so what trained experts are worth is told by this, not by a plain prompt.
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
    """An LLM with an adapter, and questions with the passages that stand in their prompts.

    Args:
        model, tokenizer: the LLM; it is changed in place.
        examples: at least one.
        rank: of the adapter, which is on all projections of the attention.
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
        self.tokenizer, self.drawn_from, self.arguments = tokenizer, examples, arguments
        self.device = model.device
        self.module: nn.Module = with_adapter(model, rank=rank, alpha=2 * rank, seed=arguments.seed)

    @property
    def examples(self) -> int:
        return len(self.drawn_from)

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """As those of a hypernetwork, with passages in the prompt and no experts."""
        arguments = self.arguments
        drawn = [
            draw_passages(self.drawn_from, draw.example, arguments.num_passages, draw.rng(arguments.seed, "passages"))
            for draw in draws
        ]
        batch = make_batch(drawn, True, self.tokenizer)
        logits = answer_logits(cast(PreTrainedModel, self.module), batch, self.device)
        labels = batch.labels.to(logits.device)
        return mean_over_targets(token_losses(logits, labels), labels)

    def validate(self, process: int, processes: int) -> dict[str, float]:
        return {}

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Without validation, what is to be saved is what there is."""
        with atomic_directory(directory / ADAPTER) as temporary:
            cast(peft.PeftModel, self.module).save_pretrained(temporary)


ADAPTER = "adapter"


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Questions with passages.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the training.")
@click.option("--steps", required=True, type=click.IntRange(1))
@click.option("--batch-size", required=True, type=click.IntRange(1), help="Questions a step.")
@click.option("--learning-rate", required=True, type=float)
@click.option("--rank", required=True, type=click.IntRange(1), help="Of the adapter.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Of the LLM.")
@click.option("--device", default="cpu", show_default=True, help="Of the LLM.")
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
    """Train a LoRA adapter of an LLM on questions with their passages in the prompt."""
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
    """Train an adapter, going on where it stopped; its folder, for ``peft=`` in model arguments.

    Args:
        identity: of LLM and data.

    Raises:
        InputError: ``out`` has another training.
    """
    learner = RagLearner(model, tokenizer, examples, arguments, rank)
    identity = {**asdict(arguments), "rank": rank, "examples": len(examples), **identity}
    train(learner, arguments, identity, out, accelerator_on(str(model.device)))
    return out / ADAPTER
