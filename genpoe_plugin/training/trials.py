"""Trial steps on the longest batch of a training, to measure its memory before weights are loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Experts
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS
from genpoe_plugin.selection.gates import uniform
from genpoe_plugin.selection.reranker_format import RerankerFormat
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.examples import DrawnExample, PassageExample
from genpoe_plugin.training.hypernetwork import Examples, HypernetworkLearner
from genpoe_plugin.training.llm_state_cache import caches_states
from genpoe_plugin.training.memory import MemoryEstimate, fake_tensors, measure_step
from genpoe_plugin.training.reranker import RerankerLearner, group_losses
from genpoe_plugin.training.reranker_data import RerankerExample
from genpoe_plugin.training.training_arguments import HypernetworkTraining, RerankerTraining

# Number of texts with the most characters that are tokenised to find those with the most tokens.
NUM_LONGEST = 50


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What the trials of both trainings have.

    Attributes:
        arguments: the training arguments.
        model, tokenizer: the LLM, on the meta device.
        llm_bytes: bytes of its weights, which may be quantised.
        device: where the training is going to run.
        shards: devices that the weights that learn are sharded over.
    """

    arguments: HypernetworkTraining | RerankerTraining
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    llm_bytes: int
    device: torch.device
    shards: int = 1

    @property
    def rows(self) -> int:
        """Examples in memory at a time."""
        return min(self.arguments.micro_batch_size or self.arguments.batch_size, self.arguments.batch_size)

    def smaller(self) -> Iterator[Iterable[tuple[str, Self]]]:
        """See `Trial.smaller`."""
        fewer = [max(1, self.rows >> shift) for shift in range(2, self.rows.bit_length() + 1, 2)]
        yield ((f"micro_batch_size={rows}", self.with_arguments(micro_batch_size=rows)) for rows in fewer)
        yield [("precision=bfloat16", self.with_arguments(precision="bfloat16"))]

    def with_arguments(self, **changes: object) -> Self:
        """The trial with other training arguments."""
        return replace(self, arguments=replace(self.arguments, **changes))  # type: ignore[arg-type]

    def in_bfloat16(self) -> tuple[str, Self]:
        """The trial with the LLM in bfloat16, and the words for it."""
        model = copy.deepcopy(self.model).bfloat16()
        size = min(self.llm_bytes, sum(weight.nbytes for weight in model.parameters()))
        return "an LLM in bfloat16", replace(self, model=model, llm_bytes=size)

    def sharded(self) -> Iterator[tuple[str, Self]]:
        """The trial on several devices, and the words for it."""
        return ((f"sharding over {shards} devices", replace(self, shards=shards)) for shards in (4, 8))


@dataclass(frozen=True, kw_only=True)
class HypernetworkTrial(_Trial):
    """A trial step of a hypernetwork's training.

    Attributes:
        config, examples, state_bytes: as in `HypernetworkLearner`.
    """

    config: HypernetworkConfig
    arguments: HypernetworkTraining
    examples: Examples
    state_bytes: int = 0

    def measure(self) -> MemoryEstimate:
        """See `Trial.measure`."""
        model, drawn = copy.deepcopy(self.model), self.longest_batch()
        with torch.device("meta"):
            learner = HypernetworkLearner(self.config, self.arguments, self.examples, model, self.tokenizer)
            network = learner.generator.hypernetwork
            learner.generator = _WholeGenerator(network, model, self.tokenizer)
        with fake_tensors(model, network, device=self.device):
            learner.generator.device = self.device
            estimate = measure_step(
                model,
                network,
                lambda: learner.losses_of(drawn, self.arguments.knowledge > 0),
                self.device,
                llm_bytes=self.llm_bytes,
                precision=self.arguments.precision,
                accumulated=self.rows < self.arguments.batch_size,
                shards=self.shards,
            )
        kept = self._kept_states(math.prod(network.state_shape))
        return MemoryEstimate({**estimate.parts, "states of passages that are kept": kept})

    def longest_batch(self) -> list[DrawnExample]:
        """As many examples as are in memory at a time, with the longest texts of the data."""
        (question,) = _longest((example.question for example in self.examples), 1, self.tokenizer)
        (answer,) = _longest((example.answer for example in self.examples), 1, self.tokenizer)
        count = self.arguments.num_passages
        texts = (text for example in self.examples for text in (example.passage, *example.negatives))
        passages = _longest(texts, self.rows * count, self.tokenizer)
        return [
            DrawnExample(
                question,
                answer,
                tuple(passages[place % len(passages)] for place in range(row * count, (row + 1) * count)),
                uniform(count),
                wrong=self.arguments.unanswerable > 0,
                continues=isinstance(self.examples[0], PassageExample),
            )
            for row in range(self.rows)
        ]

    def _kept_states(self, numbers: int) -> int:
        """Bytes of the LLM's states of passages, ``numbers`` per token, that the memory in question keeps."""
        if self.device.type != "cpu" or not caches_states(self.config, self.arguments, len(self.examples)):
            return 0
        (longest,) = _longest((example.passage for example in self.examples), 1, self.tokenizer)
        tokens = min(MAX_PASSAGE_TOKENS, len(self.tokenizer(longest)["input_ids"]))
        return min(self.state_bytes, len(self.examples) * tokens * numbers * self.model.dtype.itemsize)

    def smaller(self) -> Iterator[Iterable[tuple[str, Self]]]:
        """See `Trial.smaller`."""
        yield from super().smaller()
        yield [self.in_bfloat16()]
        if self.config.states == "contextual" and self.config.head != "attention":
            yield [("states=embeddings", replace(self, config=replace(self.config, states="embeddings")))]
        if self.arguments.distillation or self.arguments.unanswerable:
            without = self.with_arguments(distillation=0.0, unanswerable=0.0)
            yield [("distillation=0 and unanswerable=0", without)]
        yield self.sharded()


class _WholeGenerator(ExpertGenerator):
    """Takes all tokens of a batch for tokens of passages, because fake tensors do not say which are."""

    def generate_units(self, passages: Sequence[str]) -> tuple[Experts, list[list[int]]]:
        if not self.attention:
            return super().generate_units(passages)
        experts = self.hypernetwork(*self.embed(passages))
        rows, windows = experts.weights[0].shape[:2]
        units = torch.arange(rows * windows, device=self.device)
        unit_lists = [list(range(row * windows, (row + 1) * windows)) for row in range(rows)]
        return experts[units // windows, units % windows], unit_lists


@dataclass(frozen=True, kw_only=True)
class RerankerTrial(_Trial):
    """A trial step of a reranker's training.

    Attributes:
        examples: training data.
        format: how the LLM reads a pair.
        prompt: the prompt in the format.
        max_length: largest number of tokens of query and passage together.
    """

    arguments: RerankerTraining
    examples: Sequence[RerankerExample]
    format: RerankerFormat
    prompt: str
    max_length: int

    def measure(self) -> MemoryEstimate:
        """See `Trial.measure`."""
        model, group = copy.deepcopy(self.model), self.longest_group()
        with torch.device("meta"):
            reranker = Reranker(
                model, self.tokenizer, format=self.format, prompt=self.prompt, max_length=self.max_length
            )
            learner = RerankerLearner(reranker, self.arguments, self.examples)
        learner.module.train()
        rows = reranker.encode(group * self.rows)

        def losses() -> Tensor:
            return group_losses(reranker.score_rows(rows), [len(group)] * self.rows)

        with fake_tensors(learner.module, device=self.device):
            reranker.device = self.device
            return measure_step(
                learner.module,
                learner.module,
                losses,
                self.device,
                llm_bytes=self.llm_bytes if self.arguments.lora_rank else 0,
                precision=self.arguments.precision,
                accumulated=self.rows < self.arguments.batch_size,
                shards=self.shards,
            )

    def longest_group(self) -> list[tuple[str, str]]:
        """As many pairs as the largest group has, of the longest query and passage."""
        size = 1 + min(self.arguments.negatives, max(len(example.neg) for example in self.examples))
        (query,) = _longest((example.query for example in self.examples), 1, self.tokenizer)
        texts = (text for example in self.examples for text in example.pos + example.neg)
        (passage,) = _longest(texts, 1, self.tokenizer)
        return [(query, passage)] * size

    def smaller(self) -> Iterator[Iterable[tuple[str, Self]]]:
        """See `Trial.smaller`."""
        yield from super().smaller()
        yield [("gradient checkpointing", self.with_arguments(gradient_checkpointing=True))]
        if self.arguments.lora_rank:
            yield [self.in_bfloat16()]
        else:
            adapter = self.with_arguments(lora_rank=RerankerTraining.lora_rank)
            yield [("a LoRA adapter in the place of all weights", adapter)]
            yield self.sharded()


def _longest(texts: Iterable[str], count: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The ``count`` texts with the most tokens, or all if there are fewer."""
    candidates = sorted(dict.fromkeys(texts), key=len)[-max(NUM_LONGEST, count) :]
    lengths = dict(zip(candidates, map(len, tokenizer(candidates, verbose=False)["input_ids"]), strict=True))
    return sorted(candidates, key=lambda text: lengths[text])[-count:]
