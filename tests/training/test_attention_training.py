"""Training experts in the attention: what is learned, what is kept, and what the loss is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.draws import Draw, batch_at
from genpoe_plugin.training.examples import (
    PROMPT_WORDS,
    TARGET_WORDS,
    TrainingExample,
    draw_wrong_passages,
    passage_examples,
)
from genpoe_plugin.training.hypernetwork import HypernetworkLearner
from genpoe_plugin.training.llm_state_cache import CachingGenerator
from genpoe_plugin.training.training_arguments import HypernetworkTraining

EXAMPLES = [
    TrainingExample("where was he born", "Pesaro", "Rossini: Gioachino Rossini was born in Pesaro."),
    TrainingExample("what is the capital", "Canberra", "The capital is Canberra, founded in 1913."),
    TrainingExample("what did she discover", "radium", "Marie Curie: Marie Curie discovered radium."),
    TrainingExample("who jumps", "the fox", "The quick brown fox jumps over the lazy dog: the fox."),
]
PASSAGES = [example.passage for example in EXAMPLES]
# A real LLM's norms are far from 1, and its states grow from layer to layer.
SCALES = {"llama": 1.0, "qwen2": 3.0, "gemma3": 12.0}


def scaled(llm, scale: float):
    with torch.no_grad():
        for name, weight in llm.named_parameters():
            if "norm" in name:
                weight.mul_(scale).add_(scale - 1 if "Gemma" in type(llm).__name__ else 0)
    return llm


@pytest.mark.parametrize("family", SCALES)
@pytest.mark.parametrize("window", [1, 3])
def test_one_rate_trains_llms_of_any_scale(make_llm, tokenizer, family, window):
    """The loss falls by a fifth in 30 steps, and nothing of the LLM changes."""
    llm = scaled(make_llm(family), SCALES[family])
    before = {name: weight.clone() for name, weight in llm.state_dict().items()}
    config = replace(attention_config(llm, (0, 1)), addition_rank=8, window=window)
    arguments = HypernetworkTraining(batch_size=4, learning_rate=3e-3)
    learner = HypernetworkLearner(config, arguments, EXAMPLES, llm, tokenizer)
    optimizer = torch.optim.AdamW(learner.module.parameters(), lr=arguments.learning_rate)
    losses = []
    for step in range(30):
        loss = learner.losses(batch_at(step, len(EXAMPLES), 4, 0), step).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and max(losses) < 1.2 * losses[0], losses
    assert all(weight.grad is not None for weight in learner.module.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in llm.state_dict().items())


def count_passes(llm) -> list[int]:
    passes: list[int] = []
    llm.model.layers[0].register_forward_hook(lambda _, args, __: passes.append(len(args[0]) if args else 1))
    return passes


@pytest.mark.parametrize("head", ["attention", "memory"])
def test_passages_are_read_once_and_make_the_same_experts(make_llm, tokenizer, head):
    llm = make_llm("llama")
    config = replace(attention_config(llm, (0, 2)), addition_rank=4, window=2)
    if head == "memory":
        config = config.preset("memory", hidden_size=32, layer=1, core_size=8, num_queries=4)
    network = Hypernetwork(config).requires_grad_(False)
    plain, keeping = (make(network, llm, tokenizer) for make in (ExpertGenerator, CachingGenerator))
    expected, _ = plain.generate_units(PASSAGES)
    passes = count_passes(llm)
    found, places = keeping.generate_units(PASSAGES)
    assert len(passes) == len(PASSAGES)
    again, _ = keeping.generate_units(PASSAGES)
    reordered, other_places = keeping.generate_units(PASSAGES[::-1])
    assert len(passes) == len(PASSAGES), "none is read again"
    for one, two, three, wanted in zip(found.weights, again.weights, reordered.weights, expected.weights, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(one, two)
        for mine, theirs in zip(places, other_places[::-1], strict=True):
            torch.testing.assert_close(one[mine], three[theirs], atol=1e-6, rtol=1e-6)


def test_states_beyond_the_budget_go_and_come_back_from_the_folder(make_llm, tokenizer, tmp_path):
    llm = make_llm("llama")
    network = Hypernetwork(replace(attention_config(llm, (1,)), addition_rank=4)).requires_grad_(False)
    one = CachingGenerator(network, llm, tokenizer)
    one.embed(PASSAGES[:1])
    room = sum(states.nbytes for states in one._cache.values())
    for files, times in ((None, 2), (ExpertFiles(tmp_path, "states"), 1)):
        generator = CachingGenerator(network, llm, tokenizer, max_bytes=2 * room, files=files)
        passes = count_passes(llm)
        for _ in range(2):
            for passage in PASSAGES:
                generator.embed([passage])
                assert generator._bytes <= 2 * room
        assert len(passes) == times * len(PASSAGES)
    later = CachingGenerator(network, llm, tokenizer, files=ExpertFiles(tmp_path, "states"))
    passes = count_passes(llm)
    for mine, theirs in zip(later.embed(PASSAGES), one.embed(PASSAGES), strict=True):
        assert torch.equal(mine, theirs)
    assert len(passes) == len(PASSAGES) - 1, "only `one` had to read, what it had not"


def test_wrong_passages_are_to_be_answered_as_without_any(make_llm, tokenizer):
    llm = make_llm("llama")
    config = replace(attention_config(llm, (0, 2)), addition_rank=4)
    arguments = HypernetworkTraining(batch_size=4, unanswerable=1.0)
    learner = HypernetworkLearner(config, arguments, EXAMPLES, llm, tokenizer)
    draws = batch_at(0, len(EXAMPLES), 4, 0)
    with torch.no_grad():
        for weight in learner.module.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        found = learner.losses(draws, 0)
    for draw, loss in zip(draws, found, strict=True):
        drawn = learner._drawn(draw)
        assert drawn.wrong and drawn.passages[0] not in (EXAMPLES[draw.example].passage,)
        prompt = f"Question: {drawn.question.capitalize()}?\nAnswer:"
        whole = tokenizer(f"{prompt} {drawn.answer}\n")["input_ids"]
        count = len(whole) - len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([whole])
        with torch.no_grad():
            alone = llm(ids).logits[0, -count - 1 : -1].double().log_softmax(-1)
            units, _ = learner.generator.generate_units(drawn.passages)
            rows = passage_rows(units, len(units))
            with inject(llm, config.layers, rows):
                told = llm(ids).logits[0, -count - 1 : -1].double().log_softmax(-1)
        expected = (alone.exp() * (alone - told)).sum(-1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def passage_rows(units, count):
    return RowExperts(units.unsqueeze(0), torch.ones(1, count), torch.tensor([0]))


def test_without_other_passages_there_is_no_wrong_one():
    alone = draw_wrong_passages(EXAMPLES[:1], 0, 3, random.Random(0))
    assert not alone.wrong and alone.passages == (EXAMPLES[0].passage,)
    several = draw_wrong_passages(EXAMPLES, 0, 3, random.Random(1))
    assert several.wrong and EXAMPLES[0].passage not in several.passages and sum(several.gates) == pytest.approx(1)


def test_a_passage_is_learned_from_by_going_on_with_it(make_llm, tokenizer):
    """The loss is that of the words that follow, after some words of the passage, with the passage's expert."""
    text = " ".join(
        f"{word}{number}" for number in range(5) for word in ("the", "quick", "brown", "fox", "jumps", "over")
    )
    text += " the lazy dog again and again"
    (example,) = passage_examples([Passage("1", "Fox", text), Passage("2", "Short", "too few words")], tokenizer)
    assert example.passage == f"Fox: {text}"
    (long,) = passage_examples([Passage("1", "Fox", "the quick brown fox " * 300)], tokenizer)
    assert (
        long.passage == f"Fox: {long.text}"
        and len(tokenizer(long.passage, add_special_tokens=False)["input_ids"]) <= 256
    )
    llm = make_llm("llama")
    config = replace(attention_config(llm, (0, 2)), addition_rank=4)
    learner = HypernetworkLearner(config, HypernetworkTraining(batch_size=2), [example], llm, tokenizer)
    draws = [Draw(epoch, 0) for epoch in range(4)]
    with torch.no_grad():
        found = learner.losses(draws, 0)
    drawn = [learner._drawn(draw) for draw in draws]
    assert len({one.question for one in drawn}) > 1
    for one, loss in zip(drawn, found, strict=True):
        assert f"{one.question} {one.answer}" in text
        assert (len(one.question.split()), len(one.answer.split())) == (PROMPT_WORDS, TARGET_WORDS)
        whole = tokenizer(f"{one.question} {one.answer}")["input_ids"]
        count = len(whole) - len(tokenizer(one.question)["input_ids"])
        units, _ = learner.generator.generate_units([example.passage])
        with torch.no_grad(), inject(llm, config.layers, passage_rows(units, len(units))):
            told = llm(torch.tensor([whole])).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = -told.gather(1, torch.tensor(whole[-count:])[:, None]).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
