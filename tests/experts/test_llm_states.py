"""Hidden states against those that transformers itself reports, one text at a time and in full."""

from __future__ import annotations

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.decoder import find_decoder
from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.experts.llm_states import hidden_states

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox", "gpt2")
LENGTHS = (9, 4, 1, 6)


@pytest.fixture(scope="module")
def texts(tokenizer):
    """Token ids of several lengths."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(5, len(tokenizer), (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def batch(texts):
    """The texts, padded on the right with a token that is not silent, and their mask."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7)
    return ids, torch.arange(ids.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)


def assert_equal_to_transformers(states, model, texts, layer):
    for row, text in zip(states, texts, strict=True):
        with torch.no_grad():
            expected = model(text.unsqueeze(0), output_hidden_states=True, use_cache=False).hidden_states[layer][0]
        torch.testing.assert_close(row[: len(text)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_transformers_one_by_one(make_llm, texts, batch, family, layer):
    model = make_llm(family)
    assert_equal_to_transformers(hidden_states(model, layer, *batch), model, texts, layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_from_the_layer_up_runs_and_nothing_stays_behind(make_llm, batch, family):
    model = make_llm(family)
    with torch.no_grad():
        plain = model(batch[0]).logits
    ran = []
    _, layers = find_decoder(model)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    states = hidden_states(model, 1, *batch)
    assert ran == [0]
    assert not states.requires_grad
    with torch.no_grad():
        assert torch.equal(model(batch[0]).logits, plain)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_active_branch_is_neither_heard_nor_moved(make_llm, random_experts, texts, batch, layer):
    """Below the states' layer, with experts for another number of rows, and between two steps of a generation."""
    model = make_llm("llama")
    rows = RowExperts(random_experts(3, 1), torch.ones(3, 1), torch.tensor([0, 2, 5]))
    prompts = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(5))

    def generate(between):
        with torch.no_grad(), inject(model, layer, rows):
            first = model(prompts[:, :4], use_cache=True)
            between()
            return model(prompts[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits

    found = []
    undisturbed = generate(lambda: None)
    assert torch.equal(generate(lambda: found.append(hidden_states(model, 2, *batch))), undisturbed)
    assert_equal_to_transformers(found[0], model, texts, 2)


def test_in_the_middle_of_a_pass(make_llm, random_experts, batch):
    """The branch takes its positions from the pass that it is part of."""
    model = make_llm("llama")
    rows = RowExperts(random_experts(3, 1), torch.ones(3, 1), torch.tensor([0, 2, 5]))
    prompts = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), inject(model, 1, rows):
        expected = model(prompts).logits
        hook = model.model.layers[0].mlp.register_forward_hook(read_once := ReadOnce(model, batch))
        try:
            assert torch.equal(model(prompts).logits, expected)
        finally:
            hook.remove()
    assert read_once.done


class ReadOnce:
    """A hook that reads hidden states the first time that it is called."""

    def __init__(self, model, batch) -> None:
        self.model, self.batch, self.done = model, batch, False

    def __call__(self, module, args, output) -> None:
        if not self.done:
            self.done = True
            hidden_states(self.model, 1, *self.batch)


def test_the_branch_is_back_after_an_error(make_llm, random_experts):
    model = make_llm("llama")
    rows = RowExperts(random_experts(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    prompts = torch.randint(5, 50, (1, 7))
    with torch.no_grad():
        plain = model(prompts).logits
        with inject(model, 1, rows):
            with pytest.raises(IndexError):
                hidden_states(model, 1, torch.tensor([[10**6]]), torch.ones(1, 1))
            assert not torch.allclose(model(prompts).logits, plain)


def test_a_layer_that_is_not_there_is_named(make_llm, batch):
    with pytest.raises(InputError, match="layer 3 is not in LlamaForCausalLM, which has layers 0 to 2"):
        hidden_states(make_llm("llama"), 3, *batch)
