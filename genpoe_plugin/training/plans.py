"""Plans for the memory estimate of a training, from its arguments, its examples and the LLM's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS, knowledge_block, rag_prompt
from genpoe_plugin.training.examples import PassageExample, TrainingExample
from genpoe_plugin.training.llm_state_cache import caches_states
from genpoe_plugin.training.memory import HypernetworkPlan, RerankerPlan
from genpoe_plugin.training.model_size import AdapterSize, LanguageModelSize
from genpoe_plugin.training.reranker import attention_projections
from genpoe_plugin.training.reranker_data import RerankerExample
from genpoe_plugin.training.training_arguments import HypernetworkTraining, RerankerTraining

# Number of texts with the most characters that are tokenised to find the one with the most tokens.
NUM_LONGEST = 50

Item = TypeVar("Item")


def plan_hypernetwork(
    config: HypernetworkConfig,
    arguments: HypernetworkTraining,
    examples: Sequence[TrainingExample | PassageExample],
    llm: LanguageModelSize,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    state_bytes: int = 0,
) -> HypernetworkPlan:
    """The plan of a hypernetwork's training.

    Args:
        config: configuration of the hypernetwork.
        arguments: the training arguments.
        examples: training data.
        llm: sizes of the LLM.
        tokenizer: the LLM's tokenizer.
        accelerator: device and processes of the run.
        state_bytes: budget in memory for cached LLM states of passages.
    """
    size = footprint(config)
    with torch.device("meta"):
        network = Hypernetwork(config)
    largest = max(weight.numel() for weight in network.parameters())
    passage = _longest(examples, lambda example: max((example.passage, *example.negatives), key=len), tokenizer)
    question_tokens = _longest(
        examples, lambda example: f"{rag_prompt(example.question, [])} {example.answer}\n", tokenizer
    )
    passage = min(MAX_PASSAGE_TOKENS, passage)
    # Each passage in the prompt ends with a line break.
    block_tokens = len(tokenizer(knowledge_block([""]))["input_ids"]) + arguments.num_passages * (passage + 1)
    rag_tokens = question_tokens + block_tokens
    attention = config.head == "attention"
    units = -(-passage // config.window) if attention else 1
    if attention:  # logits and attention weights for every head of every layer
        width = 2 * len(config.layers) * (config.num_heads or 1) * units
    else:
        width = config.expert_width + (2 * config.rank if config.head == "dense" else 4 * config.core_size)
    return HypernetworkPlan(
        llm=llm,
        weights=size.parameters,
        largest_weight=largest,
        buffers=size.base_numbers,
        expert_bytes=units * size.expert_bytes,
        expert_width=width,
        state_width=math.prod(network.state_shape),
        queries=0 if attention or config.encoder == "mean" else config.num_queries,
        contextual=attention or config.states == "contextual",
        attention=attention,
        layer=config.layer,
        rows=arguments.micro_batch_size or arguments.batch_size,
        num_experts=arguments.num_passages,
        tokens=rag_tokens if arguments.knowledge else question_tokens,
        answer_tokens=_longest(examples, lambda example: f" {example.answer}\n", tokenizer),
        passage_tokens=passage,
        teacher_tokens=rag_tokens if arguments.distillation else question_tokens if arguments.unanswerable else 0,
        precision=arguments.precision,
        shards=accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1,
        kept_states=min(state_bytes, len(examples) * passage * math.prod(network.state_shape) * llm.number_bytes)
        if caches_states(config, arguments, len(examples)) and accelerator.device.type == "cpu"
        else 0,
        device_type=accelerator.device.type,
    )


def plan_reranker(
    model: PreTrainedModel,
    arguments: RerankerTraining,
    examples: Sequence[RerankerExample],
    llm: LanguageModelSize,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    accelerator: Accelerator,
) -> RerankerPlan:
    """The plan of a reranker's training; ``model`` may be on the meta device."""
    targets = list(arguments.lora_targets) or attention_projections(model)
    pair = _longest(
        examples, lambda example: f"A: {example.query}\nB: {max(example.pos + example.neg, key=len)}", tokenizer
    )
    most = max(len(example.neg) for example in examples)
    return RerankerPlan(
        llm=llm,
        adapter=AdapterSize.of(model, targets, arguments.lora_rank) if arguments.lora_rank else None,
        groups=min(arguments.micro_batch_size or arguments.batch_size, arguments.batch_size),
        group_size=1 + min(arguments.negatives, most),
        tokens=min(max_length, pair) + len(tokenizer(examples[0].prompt)["input_ids"]),
        gradient_checkpointing=arguments.gradient_checkpointing,
        precision=arguments.precision,
        device_type=accelerator.device.type,
    )


def _longest(items: Sequence[Item], text: Callable[[Item], str], tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of the longest text."""
    longest = sorted(map(text, items), key=len)[-NUM_LONGEST:]
    return max(map(len, tokenizer(longest, verbose=False)["input_ids"]))
