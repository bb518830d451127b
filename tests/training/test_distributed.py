"""Two processes with half a batch each compute what one process computes with the whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.examples import training_examples
from genpoe_plugin.training.hypernetwork import HypernetworkLearner, train_hypernetwork
from genpoe_plugin.training.reranker import train_reranker
from genpoe_plugin.training.reranker_data import read_examples
from genpoe_plugin.training.training_arguments import HypernetworkTraining, RerankerTraining
from genpoe_plugin.training.validation import Validation

CITIES = ("Rome", "Paris", "Vienna", "Oslo", "Lima", "Cairo", "Quito")
QUESTIONS = [
    Question(
        f"which city is number {number}",
        (city,),
        tuple(
            RetrievedPassage(Passage(str(other), f"City {other}", f"{name} is number {other}."), 1.0, 1, 0.1 * other)
            for other, name in enumerate(CITIES)
            if abs(other - number) < 2
        ),
    )
    for number, city in enumerate(CITIES)
]


def hypernetwork(
    make_llm: Callable[..., Any],
    tokenizer: Any,
    out: Path,
    head: Literal["dense", "factored", "memory", "attention"] = "dense",
    **changes: Any,
) -> list[Any]:
    model = make_llm("llama")
    arguments = HypernetworkTraining(
        **{"epochs": 3, "num_passages": 2, "learning_rate": 0.01, "validate_every": 2, "save_every": 2, **changes}
    )
    config = HypernetworkConfig(hidden_size=32, layers=(1,), rank=4, core_size=4, expert_width=16, head="dense")
    if head == "attention":
        config = replace(attention_config(model, (0, 2)), addition_rank=4, window=3)
    config = replace(config, head=head)
    held_out = Validation(QUESTIONS[:5], model, tokenizer, layers=config.layers, num_passages=2, batch_size=2)
    examples = training_examples(QUESTIONS)
    progress = train_hypernetwork(config, arguments, examples, model, tokenizer, out, validation=held_out)
    return [progress.losses, progress.validations]


def reranker(llm_dir: Path, data: Path, out: Path, **changes: Any) -> list[Any]:
    settings = {"max_steps": 4, "negatives": 2, "lora_rank": 4, "learning_rate": 0.01, "validate_every": 2, **changes}
    examples = read_examples(data)
    start = Reranker.load(llm_dir, format="bge", prompt=examples[0].prompt)
    progress = train_reranker(start, RerankerTraining(**settings), examples[:9], out, held_out=examples[9:14])
    return [progress.losses, progress.validations]


def assert_same(alone: list[Any], ranks: list[list[Any]]) -> None:
    assert ranks[0] == ranks[1], "each process knows the whole run"
    losses, validations = ranks[0]
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert [list(row) for row in validations] == [list(row) for row in alone[1]]
    for here, there in zip(validations, alone[1], strict=True):
        assert list(here.values()) == pytest.approx(list(there.values()))


def assert_weights(one: Path, two: Path) -> None:
    """Adam takes steps of the learning rate (0.01) however small a gradient is, so the rounding of a gradient near zero
    shows in its weight: a hundredth of a step is allowed, where a wrong gradient would move weights by whole ones."""
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 1, "head": "factored"},
        {"knowledge": 0.5, "distillation": 0.3},
        {"micro_batch_size": 1, "head": "attention", "unanswerable": 0.3},
    ],
)
def test_hypernetwork(make_llm, tokenizer, in_two_processes, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Seven examples in batches of four: the second batch of an epoch is short, and one process has less to do."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = hypernetwork(make_llm, tokenizer, one, batch_size=4, **changes)
    ranks = in_two_processes(lambda: hypernetwork(make_llm, tokenizer, two, batch_size=2, **changes))
    assert_same(json.loads(json.dumps(alone)), ranks)
    assert_weights(one, two)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_reranker(llm_dir: Path, make_reranker_data, in_two_processes, tmp_path: Path, lora_rank: int) -> None:
    data = make_reranker_data(tmp_path / "train.jsonl", 14, seed=0)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = reranker(llm_dir, data, one, batch_size=4, lora_rank=lora_rank)
    ranks = in_two_processes(lambda: reranker(llm_dir, data, two, batch_size=2, lora_rank=lora_rank))
    assert_same(json.loads(json.dumps(alone)), ranks)
    assert_weights(one, two)


@pytest.mark.parametrize("head", ["dense", "memory"])
def test_a_sharded_hypernetwork(make_llm, tokenizer, in_two_processes, tmp_path: Path, head: Any) -> None:
    """FSDP, which accelerate uses on GPUs only, told here that these are some; stopped once and gone on."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = hypernetwork(make_llm, tokenizer, one, head, batch_size=4)

    def sharded() -> list[Any]:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        take = HypernetworkLearner.losses

        def stop(self: HypernetworkLearner, draws: Any, step: int) -> torch.Tensor:
            if step == 3:
                raise ZeroDivisionError
            assert step != 1 or all(isinstance(parameter, DTensor) for parameter in self.module.parameters())
            return take(self, draws, step)

        HypernetworkLearner.losses = stop  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            hypernetwork(make_llm, tokenizer, two, head, batch_size=2)
        HypernetworkLearner.losses = take  # type: ignore[method-assign]
        return hypernetwork(make_llm, tokenizer, two, head, batch_size=2)

    ranks = in_two_processes(sharded)
    assert_same(json.loads(json.dumps(alone)), ranks)
    assert_weights(one, two)
