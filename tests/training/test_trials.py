"""The longest batch of a trial, against those of the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.selection.reranker_format import BGE
from genpoe_plugin.training.batches import make_batch
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.examples import DrawnExample, TrainingExample
from genpoe_plugin.training.hypernetwork import HypernetworkLearner
from genpoe_plugin.training.reranker_data import RerankerExample
from genpoe_plugin.training.training_arguments import HypernetworkTraining, RerankerTraining
from genpoe_plugin.training.trials import HypernetworkTrial, RerankerTrial

EXAMPLES = [
    TrainingExample("who is it", "Marie Curie", "Marie Curie: " + "She discovered radium. " * 3),
    TrainingExample("where was this very famous and well known person born", "Rome", "Short."),
]
DENSE = {"head": "dense", "rank": 4, "core_size": 6, "expert_width": 16}


def hypernetwork_trial(model: Any, tokenizer: Any, examples: Any = EXAMPLES, **settings: Any) -> HypernetworkTrial:
    config = settings.pop("config", HypernetworkConfig.preset("memory", hidden_size=32, layer=1, **DENSE))
    state_bytes = settings.pop("state_bytes", 0)
    return HypernetworkTrial(
        config=config,
        arguments=HypernetworkTraining(batch_size=2, **settings),
        examples=examples,
        model=model.to("meta"),
        tokenizer=tokenizer,
        llm_bytes=0,
        device=torch.device("cpu"),
        state_bytes=state_bytes,
    )


@pytest.mark.parametrize("knowledge", [0.0, 1.0])
def test_a_hypernetworks_longest_batch_is_as_long_as_any(
    make_llm: Callable[..., Any], tokenizer: Any, knowledge: float
) -> None:
    model = make_llm("llama")
    trial = hypernetwork_trial(make_llm("llama"), tokenizer, knowledge=knowledge)
    learner = HypernetworkLearner(trial.config, trial.arguments, EXAMPLES, model, tokenizer)
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["tokens"] = kwargs["input_ids"].shape[1]

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    learner.losses([Draw(0, 0), Draw(0, 1)], step=0)
    hook.remove()
    longest = make_batch(trial.longest_batch(), knowledge > 0, tokenizer)
    # The longest passage and the longest question need not meet in one example.
    assert seen["tokens"] <= longest.input_ids.shape[1] <= seen["tokens"] + 8 + 26 * knowledge
    assert longest.input_ids.shape[0] == 2
    assert {passage for example in trial.longest_batch() for passage in example.passages} == {
        example.passage for example in EXAMPLES
    }


def test_the_longest_passages_may_be_negatives(make_llm: Callable[..., Any], tokenizer: Any) -> None:
    """As a teacher reads them: in prompts, cut."""
    long = tuple(f"{number} " + "She discovered radium. " * 60 for number in range(8))
    examples = [TrainingExample("who is it", "Marie Curie", "Short.", long)] * 2
    trial = hypernetwork_trial(make_llm("llama"), tokenizer, examples, distillation=0.5, num_passages=3)
    batch = trial.longest_batch()
    assert [len(set(example.passages) & set(long)) for example in batch] == [3, 3]
    assert len({passage for example in batch for passage in example.passages}) == 6
    longest = make_batch([DrawnExample("who is it", "Marie Curie", (long[0],) * 3, (1.0,))], True, tokenizer)
    assert make_batch(batch, True, tokenizer).input_ids.shape[1] == longest.input_ids.shape[1] > 3 * 250


def test_states_that_are_kept_are_counted_up_to_their_budget(make_llm: Callable[..., Any], tokenizer: Any) -> None:
    """Where passages come again: keys, values and hidden states of two layers, four bytes a number."""
    examples = [TrainingExample("who is it", "Marie Curie", f"Marie Curie discovered element {n}.") for n in range(4)]
    config = replace(attention_config(make_llm("llama"), (0, 2)), addition_rank=4)

    def kept(budget: int, **changes: Any) -> int:
        trial = hypernetwork_trial(make_llm("llama"), tokenizer, examples, config=config, state_bytes=budget, **changes)
        return trial.measure().parts["states of passages that are kept"]

    tokens = max(len(tokenizer(e.passage, add_special_tokens=False)["input_ids"]) for e in examples)
    whole = kept(10**9, epochs=2)
    numbers = 2 * (2 * 2 * 8 + 32)
    assert 4 * len(examples) * tokens * numbers <= whole <= 4 * len(examples) * (tokens + 2) * numbers
    assert (kept(10**9, epochs=1), kept(100, epochs=2)) == (0, 100)


def test_a_rerankers_longest_group(make_llm: Callable[..., Any], tokenizer: Any) -> None:
    examples = [
        RerankerExample("who", ("short",), ("n", "a much longer passage than all the others " * 4), "Well?"),
        RerankerExample("who was it that did that", ("p",), ("n",) * 9, "Well?"),
    ]
    trial = RerankerTrial(
        arguments=RerankerTraining(negatives=15, micro_batch_size=3, lora_rank=2),
        examples=examples,
        model=make_llm("llama").to("meta"),
        tokenizer=tokenizer,
        format=BGE,
        prompt=examples[0].prompt,
        max_length=512,
        llm_bytes=0,
        device=torch.device("cpu"),
    )
    assert trial.longest_group() == [(examples[1].query, examples[0].neg[1])] * 10
    assert trial.rows == 3
    # q and o are 32 x 32, k and v, of half as many heads, 16 x 32; three layers.
    assert trial.measure().parts["weights that learn"] == 4 * 3 * 2 * (2 * (32 + 32) + 2 * (16 + 32))
