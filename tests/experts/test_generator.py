"""From strings to experts, against one passage at a time, tokenised and looked up by hand."""

from __future__ import annotations

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.generator import ExpertGenerator

PASSAGES = [
    "Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.",
    "東京",
    "Marie Curie discovered polonium and radium.",
    "a",
]


@pytest.fixture
def llm(make_llm):
    return make_llm("llama")


@pytest.fixture
def hypernetwork(make_hypernetwork):
    return make_hypernetwork()


def alone(hypernetwork, llm, tokenizer, passage, limit=256):
    """The expert of one passage, without padding: its tokens but for BOS, each a row of the embedding table."""
    ids = tokenizer.encode(passage)[1 : limit + 1]
    states = torch.stack([llm.get_input_embeddings().weight[i].detach().float() for i in ids]).unsqueeze(0)
    return hypernetwork(states, torch.ones(1, len(ids), dtype=torch.bool))[0]


def assert_close(experts, expected):
    for ours, theirs in zip(experts.weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder", ["attention", "mean"])
def test_a_batch_equals_one_passage_at_a_time_in_its_order(make_hypernetwork, llm, tokenizer, encoder):
    hypernetwork = make_hypernetwork(encoder=encoder)
    generator = ExpertGenerator(hypernetwork, llm, tokenizer)
    for passages in (PASSAGES, PASSAGES[::-1]):
        experts = generator.generate(passages)
        assert len(experts) == len(passages)
        for number, passage in enumerate(passages):
            assert_close(experts[number], alone(hypernetwork, llm, tokenizer, passage))


def test_what_is_embedded_are_the_tokens_of_the_text_alone(hypernetwork, llm, tokenizer):
    states, mask = ExpertGenerator(hypernetwork, llm, tokenizer).embed(PASSAGES)
    table = llm.get_input_embeddings().weight
    ids = [tokenizer.encode(passage)[1:] for passage in PASSAGES]
    assert mask.sum(1).tolist() == [len(row) for row in ids]
    for row, real, tokens in zip(states, mask, ids, strict=True):
        assert torch.equal(row[real], table[tokens])
    assert not states.requires_grad


def test_a_long_passage_counts_as_its_first_256_tokens(hypernetwork, llm, tokenizer):
    long = "The quick brown fox jumps over the lazy dog; " * 60
    assert len(tokenizer.encode(long)) > 300
    experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate([long, "short"])
    assert_close(experts[0], alone(hypernetwork, llm, tokenizer, long))
    other = alone(hypernetwork, llm, tokenizer, long, limit=255)
    assert not torch.allclose(experts.w1[0], other.w1, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_llm_in_half_precision_is_read_in_float32(make_llm, hypernetwork, tokenizer, dtype):
    llm = make_llm("llama").to(dtype)
    experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate(PASSAGES)
    assert {weight.dtype for weight in experts.weights} == {torch.float32}
    for number, passage in enumerate(PASSAGES):
        assert_close(experts[number], alone(hypernetwork, llm, tokenizer, passage))


def test_gradients_reach_the_hypernetwork_and_not_the_llm(make_hypernetwork, llm, tokenizer):
    hypernetwork = make_hypernetwork().requires_grad_()
    experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate(PASSAGES)
    sum(weight.square().sum() for weight in experts.weights).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in hypernetwork.parameters())
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_an_empty_passage_is_named_by_its_place(hypernetwork, llm, tokenizer):
    with pytest.raises(InputError, match="passage 1 of 3 is empty"):
        ExpertGenerator(hypernetwork, llm, tokenizer).generate(["one", "", "three"])
