"""Validation of a hypernetwork in training on held-out questions: exact match, F1, and the loss of the answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.data.answers import exact_match, f1
from genpoe_plugin.data.questions import Question
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.selection.pipeline import Pipeline
from genpoe_plugin.training.batches import answer_logits, make_batch, mean_over_targets, token_losses
from genpoe_plugin.training.examples import DrawnExample, row_experts

MAX_NEW_TOKENS = 32


class Validation:
    """Held-out questions with their selected passages.

    Args:
        questions: questions with passages; questions without passages are left out. Rerank scores decide the order of
            passages and the gates, as in an evaluation.
        model, tokenizer: the LLM.
        layers: the layers with experts.
        num_passages: largest number of experts per question.
        batch_size: questions per forward pass.

    Raises:
        InputError: no question has a passage.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layers: Sequence[int],
        num_passages: int,
        batch_size: int,
    ) -> None:
        self.questions = [question for question in questions if question.passages]
        if not self.questions:
            raise InputError("no validation question has passages; add them with `genpoe retrieve`")
        self.model = model
        self.tokenizer = tokenizer
        self.layers = layers
        self.batch_size = batch_size
        pipeline = Pipeline(tokenizer, num_passages=num_passages, progress=False)
        self.examples = [
            DrawnExample(selection.question.question, selection.question.answers[0], selection.strings, selection.gates)
            for selection in pipeline.select(["validation"] * len(self.questions), self.questions)
        ]

    def measure(self, generator: ExpertGenerator, process: int, processes: int) -> dict[str, float]:
        """EM, F1 and loss over all questions; this process answers every ``processes``-th question.

        The loss is that of a question's first accepted answer, as in training.

        Args:
            generator: generates the experts.
            process: rank of this process.
            processes: number of processes.
        """
        share = -(-len(self.questions) // processes)
        # All processes run the same number of passes, because those of a sharded hypernetwork wait for each other.
        assigned = [(process + number * processes) % len(self.questions) for number in range(share)]
        answers: dict[int, tuple[str, float]] = {}
        batches = range(0, share, self.batch_size)
        for begin in tqdm(batches, "Validating", unit="batch", leave=False, disable=process > 0):
            numbers = assigned[begin : begin + self.batch_size]
            examples = [self.examples[number] for number in numbers]
            results = zip(self._answers(generator, examples), self._losses(generator, examples), strict=True)
            answers.update(zip(numbers, results, strict=True))
        if processes > 1:
            answers = dict(gather_object(list(answers.items())))
        pairs = [(answers[number][0], question.answers) for number, question in enumerate(self.questions)]
        return {
            "em": sum(exact_match(answer, accepted) for answer, accepted in pairs) / len(pairs),
            "f1": sum(f1(answer, accepted) for answer, accepted in pairs) / len(pairs),
            "loss": sum(answers[number][1] for number in range(len(pairs))) / len(pairs),
        }

    def _losses(self, generator: ExpertGenerator, examples: Sequence[DrawnExample]) -> list[float]:
        batch = make_batch(examples, False, self.tokenizer)
        with torch.no_grad(), inject(self.model, self.layers, row_experts(generator, examples, batch.start)):
            logits = answer_logits(self.model, batch, generator.device)
        labels = batch.labels.to(logits.device)
        return mean_over_targets(token_losses(logits, labels), labels).tolist()

    def _answers(self, generator: ExpertGenerator, examples: Sequence[DrawnExample]) -> list[str]:
        """The first line of each greedy generation."""
        prompts = [closed_book_prompt(example.question) for example in examples]
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        width = max(map(len, rows))
        device = generator.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.no_grad(), inject(self.model, self.layers, row_experts(generator, examples, [0] * len(examples))):
            generated = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                stop_strings="\n",
                tokenizer=self.tokenizer,
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )
        texts = self.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return [text.partition("\n")[0].strip() for text in texts]
