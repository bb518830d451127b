"""What a training is planned to hold, against what it does hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.training.batches import make_batch
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.devices import accelerator_on
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.examples import DrawnExample, TrainingExample
from genpoe_plugin.training.hypernetwork import HypernetworkLearner
from genpoe_plugin.training.model_size import LanguageModelSize
from genpoe_plugin.training.plans import plan_hypernetwork, plan_reranker
from genpoe_plugin.training.reranker_data import RerankerExample
from genpoe_plugin.training.training_arguments import HypernetworkTraining, RerankerTraining

EXAMPLES = [
    TrainingExample("who is it", "Marie Curie", "Marie Curie: " + "She discovered radium. " * 3),
    TrainingExample("where was this very famous and well known person born", "Rome", "Short."),
]


@pytest.mark.parametrize("head", ["dense", "factored", "memory"])
@pytest.mark.parametrize("knowledge", [0.0, 1.0])
def test_a_hypernetworks_plan_is_of_its_longest_batch(
    make_llm: Callable[..., Any], tokenizer: Any, head: str, knowledge: float
) -> None:
    model = make_llm("llama")
    form = {"head": head, "rank": 4, "core_size": 6, "expert_width": 16}
    config = HypernetworkConfig.preset("memory", hidden_size=32, layer=1, **form)
    arguments = HypernetworkTraining(batch_size=2, knowledge=knowledge)
    learner = HypernetworkLearner(config, arguments, EXAMPLES, model, tokenizer)
    plan = plan_hypernetwork(config, arguments, EXAMPLES, LanguageModelSize.of(model), tokenizer, accelerator_on("cpu"))
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["tokens"] = kwargs["input_ids"].shape[1]

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    learner.losses([Draw(0, 0), Draw(0, 1)], step=0)
    hook.remove()
    # The longest passage and the longest question need not meet in one example.
    assert seen["tokens"] <= plan.tokens <= seen["tokens"] + 8 + 26 * knowledge
    assert plan.weights == sum(weight.numel() for weight in learner.module.parameters())
    assert plan.largest_weight == max(weight.numel() for weight in learner.module.parameters())
    expert = learner.generator.generate_units([EXAMPLES[0].passage])[0]
    assert plan.expert_bytes == expert.nbytes
    assert plan.passage_tokens >= len(tokenizer(EXAMPLES[0].passage, add_special_tokens=False)["input_ids"])
    assert (plan.rows, plan.num_experts, plan.layer, plan.shards) == (2, 1, 1, 1)
    assert (plan.queries, plan.contextual, plan.teacher_tokens) == (64, True, 0)


def test_a_teachers_prompts_hold_passages_as_they_are_cut(make_llm: Callable[..., Any], tokenizer: Any) -> None:
    """Its own and a distractor, the longest of which are negatives: in prompts and for experts their beginnings."""
    model = make_llm("llama")
    long = tuple(f"{number} " + "She discovered radium. " * 60 for number in range(2))
    examples = [TrainingExample("who is it", "Marie Curie", "Short.", long)] * 2
    config = HypernetworkConfig.preset("paper", hidden_size=32, layer=1, rank=4, expert_width=16)
    arguments = HypernetworkTraining(batch_size=2, distillation=0.5, num_passages=3)
    plan = plan_hypernetwork(config, arguments, examples, LanguageModelSize.of(model), tokenizer, accelerator_on("cpu"))
    longest = make_batch([DrawnExample("who is it", "Marie Curie", (long[0],) * 3, (1.0,))], True, tokenizer)
    assert 3 * 250 < longest.input_ids.shape[1] <= plan.teacher_tokens <= longest.input_ids.shape[1] + 16
    assert plan.tokens < 60 and plan.passage_tokens == 256
    assert (plan.queries, plan.contextual) == (0, False)


def test_states_that_are_kept_are_counted_up_to_their_budget(make_llm: Callable[..., Any], tokenizer: Any) -> None:
    """Where passages come again: keys, values and hidden states of two layers, four bytes a number."""
    model = make_llm("llama")
    examples = [TrainingExample("who is it", "Marie Curie", f"Marie Curie discovered element {n}.") for n in range(4)]
    config = replace(attention_config(model, (0, 2)), addition_rank=4)

    def kept(budget: int, **changes: Any) -> int:
        arguments = HypernetworkTraining(batch_size=2, **changes)
        size = LanguageModelSize.of(model)
        plan = plan_hypernetwork(config, arguments, examples, size, tokenizer, accelerator_on("cpu"), budget)
        assert plan.estimate().total >= plan.kept_states
        return plan.kept_states

    tokens = max(len(tokenizer(e.passage, add_special_tokens=False)["input_ids"]) for e in examples)
    whole = kept(10**9, epochs=2)
    numbers = 2 * (2 * 2 * 8 + 32)
    assert 4 * len(examples) * tokens * numbers <= whole <= 4 * len(examples) * (tokens + 2) * numbers
    assert (kept(10**9, epochs=1), kept(100, epochs=2)) == (0, 100)


def test_a_rerankers_plan_is_of_its_longest_pair(make_llm: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = make_llm("llama")
    examples = [
        RerankerExample("who", ("short",), ("n", "a much longer passage than all the others " * 4), "Well?"),
        RerankerExample("who was it that did that", ("p",), ("n",) * 9, "Well?"),
    ]
    size = LanguageModelSize.of(model)

    def plan(max_length: int, **changes: Any) -> Any:
        arguments = RerankerTraining(negatives=15, **changes)
        return plan_reranker(model, arguments, examples, size, tokenizer, max_length, accelerator_on("cpu"))

    ids = tokenizer(f"A: who\nB: {examples[0].neg[1]}\nWell?")["input_ids"]
    found = plan(512, lora_rank=2, micro_batch_size=3, gradient_checkpointing=True)
    assert len(ids) - 4 <= found.tokens <= len(ids) + 4
    assert (found.groups, found.group_size, found.gradient_checkpointing) == (3, 10, True)
    # q and o are 32 x 32, k and v, of half as many heads, 16 x 32; three layers.
    assert found.adapter is not None and found.adapter.weights == 3 * 2 * (2 * (32 + 32) + 2 * (16 + 32))
    short = plan(20, lora_rank=0)
    assert short.adapter is None and short.tokens == 20 + len(tokenizer("Well?")["input_ids"])
    assert torch.equal(model.lm_head.weight, make_llm("llama").lm_head.weight)
