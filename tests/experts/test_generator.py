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


@pytest.fixture(params=["embeddings", "contextual"])
def states_form(request):
    return request.param


@pytest.fixture
def hypernetwork(make_hypernetwork, states_form):
    return make_hypernetwork(states=states_form)


def states_alone(hypernetwork, llm, tokenizer, passage, limit=256):
    """The token states of one passage, BOS left out: rows of the embedding table, or what transformers reports."""
    ids = tokenizer.encode(passage)[: limit + 1]
    if hypernetwork.config.states == "embeddings":
        return torch.stack([llm.get_input_embeddings().weight[i].detach().float() for i in ids[1:]])
    with torch.no_grad():
        states = llm(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return states[hypernetwork.config.layer][0, 1:].float()


def alone(hypernetwork, llm, tokenizer, passage, limit=256):
    """The expert of one passage, without padding."""
    states = states_alone(hypernetwork, llm, tokenizer, passage, limit).unsqueeze(0)
    return hypernetwork(states, torch.ones(1, states.shape[1], dtype=torch.bool))[0]


def assert_close(experts, expected):
    for ours, theirs in zip(experts.weights, expected.weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder", ["attention", "mean"])
def test_a_batch_equals_one_passage_at_a_time_in_its_order(
    make_hypernetwork, llm, tokenizer, encoder, head, states_form
):
    if head == "memory" and encoder == "mean":
        pytest.skip("a memory keeps what queries find")
    hypernetwork = make_hypernetwork(encoder=encoder, head=head, states=states_form)
    generator = ExpertGenerator(hypernetwork, llm, tokenizer)
    for passages in (PASSAGES, PASSAGES[::-1]):
        experts = generator.generate_units(passages)[0]
        assert len(experts) == len(passages)
        for number, passage in enumerate(passages):
            assert_close(experts[number], alone(hypernetwork, llm, tokenizer, passage))


def test_what_is_embedded_are_the_tokens_of_the_text_alone(make_hypernetwork, llm, tokenizer):
    states, mask = ExpertGenerator(make_hypernetwork(), llm, tokenizer).embed(PASSAGES)
    table = llm.get_input_embeddings().weight
    ids = [tokenizer.encode(passage)[1:] for passage in PASSAGES]
    assert mask.sum(1).tolist() == [len(row) for row in ids]
    for row, real, tokens in zip(states, mask, ids, strict=True):
        assert torch.equal(row[real], table[tokens])
    assert not states.requires_grad


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_contextual_states_are_those_that_enter_the_layer(make_hypernetwork, make_llm, tokenizer, family, layer):
    """After BOS, as the LLM is used to read; BOS itself is not part of the passage."""
    llm, hypernetwork = make_llm(family), make_hypernetwork(states="contextual", layer=layer)
    states, mask = ExpertGenerator(hypernetwork, llm, tokenizer).embed(PASSAGES)
    assert not states.requires_grad
    for row, real, passage in zip(states, mask, PASSAGES, strict=True):
        expected = states_alone(hypernetwork, llm, tokenizer, passage)
        torch.testing.assert_close(row[real], expected, atol=1e-5, rtol=1e-5)


def test_contextual_states_know_the_order_of_words(make_hypernetwork, llm, tokenizer):
    passages = ["Curie met Rossini", "Rossini met Curie"]
    ids = [sorted(tokenizer.encode(f" {passage}")) for passage in passages]
    assert ids[0] == ids[1], "the same tokens"
    for states, blind in (("embeddings", True), ("contextual", False)):
        hypernetwork = make_hypernetwork(encoder="mean", states=states)
        experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate_units([f" {passage}" for passage in passages])[
            0
        ]
        assert torch.allclose(experts.w1[0], experts.w1[1], atol=1e-4) == blind


def test_a_layer_that_the_llm_lacks_is_named_at_once(make_hypernetwork, llm, tokenizer):
    with pytest.raises(InputError, match="layer 3 is not in LlamaForCausalLM"):
        ExpertGenerator(make_hypernetwork(states="contextual", layer=3), llm, tokenizer)


def test_a_long_passage_counts_as_its_first_256_tokens(hypernetwork, llm, tokenizer):
    long = "The quick brown fox jumps over the lazy dog; " * 60
    assert len(tokenizer.encode(long)) > 300
    experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate_units([long, "short"])[0]
    assert_close(experts[0], alone(hypernetwork, llm, tokenizer, long))
    other = alone(hypernetwork, llm, tokenizer, long, limit=255)
    assert not torch.allclose(experts.w1[0], other.w1, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_llm_in_half_precision_is_read_in_float32(make_llm, make_hypernetwork, tokenizer, dtype):
    llm, hypernetwork = make_llm("llama").to(dtype), make_hypernetwork()
    experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate_units(PASSAGES)[0]
    assert {weight.dtype for weight in experts.weights} == {torch.float32}
    for number, passage in enumerate(PASSAGES):
        assert_close(experts[number], alone(hypernetwork, llm, tokenizer, passage))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contextual_states_of_an_llm_in_half_precision(make_llm, make_hypernetwork, tokenizer, dtype):
    """They come in float32, and padding moves no more than the LLM's own rounding."""
    llm, hypernetwork = make_llm("llama").to(dtype), make_hypernetwork(states="contextual")
    states, mask = ExpertGenerator(hypernetwork, llm, tokenizer).embed(PASSAGES)
    assert states.dtype == torch.float32
    for row, real, passage in zip(states, mask, PASSAGES, strict=True):
        expected = states_alone(hypernetwork, llm, tokenizer, passage)
        assert torch.dist(row[real], expected) < 0.02 * expected.norm()


def test_gradients_reach_the_hypernetwork_and_not_the_llm(make_hypernetwork, llm, tokenizer, head, states_form):
    hypernetwork = make_hypernetwork(head=head, states=states_form).requires_grad_()
    experts = ExpertGenerator(hypernetwork, llm, tokenizer).generate_units(PASSAGES)[0].unsqueeze(1)
    experts.mix(torch.randn(len(PASSAGES), 3, 32), torch.ones(len(PASSAGES), 1)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in hypernetwork.parameters())
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_an_empty_passage_is_named_by_its_place(hypernetwork, llm, tokenizer):
    with pytest.raises(InputError, match="passage 1 of 3 is empty"):
        ExpertGenerator(hypernetwork, llm, tokenizer).generate_units(["one", "", "three"])
