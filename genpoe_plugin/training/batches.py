"""Batches of prompts with target answers, and the loss of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.prompts import cut_passages, first_token_at, knowledge_block, rag_prompt
from genpoe_plugin.training.examples import DrawnExample

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A batch of prompts with targets.

    Attributes:
        input_ids: left-padded token ids, ``[rows, tokens]``.
        attention_mask: 1 on real tokens, ``[rows, tokens]``.
        labels: labels of the last positions, `IGNORED` where there is no target, ``[rows, targets]``.
        start: for each row, the first position that experts act on.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    start: tuple[int, ...]

    def rows(self, numbers: Sequence[int]) -> Batch:
        """The batch restricted to some of its rows."""
        chosen = list(numbers)
        tensors = (self.input_ids[chosen], self.attention_mask[chosen], self.labels[chosen])
        return Batch(*tensors, tuple(self.start[number] for number in chosen))


def make_batch(
    examples: Sequence[DrawnExample], knowledge: bool, tokenizer: PreTrainedTokenizerBase, *, end: str = "\n"
) -> Batch:
    """Tokenise examples as closed-book prompts or, with ``knowledge``, as RAG prompts with cut passages.

    The target is a space, the answer and ``end``; the tokenizer decides which token the space belongs to.
    """
    rows: list[tuple[list[int], int]] = []
    starts = []
    for example in examples:
        passages = cut_passages(example.passages, tokenizer) if knowledge else []
        if example.continues:
            prompt, ending = knowledge_block(passages) + example.question, ""
        else:
            prompt, ending = rag_prompt(example.question, passages), end
        encoding = tokenizer(f"{prompt} {example.answer}{ending}", return_offsets_mapping=True)
        offsets = encoding["offset_mapping"]
        question_start = len(knowledge_block(passages))
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
    return Batch(input_ids, attention_mask, labels, tuple(starts))


def answer_logits(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """The logits ``[rows, targets, vocabulary]``, float32, that predict the batch's labels."""
    mask = batch.attention_mask.to(device)
    return (
        model(
            input_ids=batch.input_ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=batch.labels.shape[1] + 1,
        )
        .logits[:, :-1]
        .float()
    )


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every label, ``[rows, targets]``; 0 for `IGNORED` labels."""
    return functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")


def divergences(logits: Tensor, teacher: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the student's ``logits`` from the teacher's, ``[rows, targets]``."""
    pointwise = functional.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    return pointwise.sum(-1)


def mean_over_targets(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each row over its labels: from ``[rows, targets]`` to ``[rows]``."""
    has_label = labels != IGNORED
    return losses.where(has_label, 0).sum(1) / has_label.sum(1)
