"""Validation against the evaluation itself, and its loss against the one of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from genpoe_plugin.data.answers import exact_match, f1
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.training.validation import MAX_NEW_TOKENS, Validation

CONFIG = HypernetworkConfig(hidden_size=32, layers=(1,), rank=4, expert_width=16, base="random", generator_gain=1.0)


def retrieved(number: int, text: str, score: float) -> RetrievedPassage:
    return RetrievedPassage(Passage(str(number), "T", text), 1.0, number, score)


QUESTIONS = [
    Question("where is it", ("Rome", "Roma"), (retrieved(1, "It is in Rome.", 0.3), retrieved(2, "Not here.", 0.9))),
    Question("who was it", ("Marie Curie",), (retrieved(1, "She was Marie Curie, they say.", 0.1),)),
    Question("nothing is known", ("x",)),
    Question("what did she find", ("radium",), tuple(retrieved(n, f"Number {n}.", -float(n)) for n in range(1, 6))),
]


@pytest.fixture
def generator(make_llm: Callable[..., Any], tokenizer: Any) -> ExpertGenerator:
    torch.manual_seed(0)
    return ExpertGenerator(Hypernetwork(CONFIG), make_llm("llama"), tokenizer)


def test_measures_are_those_of_each_question_alone(
    make_llm: Callable[..., Any], tokenizer: Any, generator: ExpertGenerator
) -> None:
    """The best two passages by rerank score, their gates a softmax; greedy, first line; questions without are left."""
    model = make_llm("llama")
    validation = Validation(QUESTIONS, model, tokenizer, layers=(1,), num_passages=2, batch_size=2)
    measures = validation.measure(generator, 0, 1)
    expected: dict[str, list[float]] = {"em": [], "f1": [], "loss": []}
    for question in (QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]):
        best = sorted(question.passages, key=lambda item: -(item.rerank_score or 0))[:2]
        gates = torch.tensor([[item.rerank_score for item in best]]).softmax(1)
        experts = generator.generate_units([item.passage.string for item in best])[0].map(
            lambda weight: weight.unsqueeze(0)
        )
        prompt = f"Question: {question.question.capitalize()}?\nAnswer:"
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        target = tokenizer(f"{prompt} {question.answers[0]}\n", return_tensors="pt")["input_ids"]
        with torch.no_grad(), inject(model, 1, RowExperts(experts, gates, torch.zeros(1, dtype=torch.long))):
            said = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
            logits = model(target).logits[0, ids.shape[1] - 1 : -1]
        answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()
        expected["em"].append(exact_match(answer, question.answers))
        expected["f1"].append(f1(answer, question.answers))
        expected["loss"].append(torch.nn.functional.cross_entropy(logits, target[0, ids.shape[1] :]).item())
    assert list(measures) == ["em", "f1", "loss"]
    assert measures == pytest.approx({name: sum(values) / 3 for name, values in expected.items()}, rel=1e-4)


def test_without_passages_there_is_nothing_to_validate(make_llm: Callable[..., Any], tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no validation question has passages; add them with `genpoe retrieve`"):
        Validation(QUESTIONS[2:3], make_llm("llama"), tokenizer, layers=(1,), num_passages=2, batch_size=2)
