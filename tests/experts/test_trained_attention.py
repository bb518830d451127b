"""Experts in the attention that learn: additions that are nothing at first, and windows of tokens pooled to units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork, into_windows
from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.experts.llm_states import hidden_states, keys_and_values
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block
from genpoe_plugin.training.creation import attention_config

PASSAGES = [
    "Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.",
    "Marie Curie: Marie Curie discovered polonium and radium.",
    "The quick brown fox jumps over the lazy dog.",
]
QUESTION = closed_book_prompt("Where was Rossini born")


def trained(config: HypernetworkConfig, seed: int = 0) -> Hypernetwork:
    """With weights that are not those of the beginning."""
    network = Hypernetwork(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return network.requires_grad_(False)


def logits(llm, tokenizer, store: ExpertStore, passages=PASSAGES[:1]) -> torch.Tensor:
    question = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    with torch.no_grad(), inject(llm, store.layers, store.rows([passages], [[1.0] * len(passages)], [0])):
        return llm(question).logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_additions_are_nothing_at_first(make_llm, tokenizer, family):
    llm = make_llm(family)
    plain = attention_config(llm, (0, 2))
    with_rank = Hypernetwork(replace(plain, addition_rank=4)).requires_grad_(False)
    stores = [ExpertStore(Hypernetwork(plain).requires_grad_(False), llm, tokenizer)]
    stores.append(ExpertStore(with_rank, llm, tokenizer))
    before, after = (logits(llm, tokenizer, store) for store in stores)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("heads", [None, ((1,), (0, 1))])
def test_units_are_those_of_a_loop_over_tokens_in_float64(make_llm, tokenizer, rank, window, heads):
    """Straight from the formula: pooled keys plus W_k A h, with h the pooled states of unit root mean square."""
    if rank is None and window == 1:
        pytest.skip("untrained experts, which have tests of their own")
    llm = make_llm("llama").double()
    config = replace(attention_config(llm, (0, 2)), kv_heads=heads, addition_rank=rank, window=window)
    network = trained(config).double()
    generator = ExpertGenerator(network, llm, tokenizer)
    units, places = generator.generate_units(PASSAGES)
    for passage, own in zip(PASSAGES, places, strict=True):
        ids = torch.tensor([tokenizer(knowledge_block([passage]))["input_ids"]])
        real = torch.ones_like(ids)
        read = keys_and_values(llm, config.layers, ids, real, hidden=True)
        tokens = range(1, ids.shape[1])  # without BOS
        windows = [list(tokens)[begin : begin + window] for begin in range(0, len(tokens), window)]
        assert len(own) == len(windows)
        for number, layer in enumerate(config.layers):
            adder = network.head.adders[number]
            state = hidden_states(llm, layer, ids, real)[0]
            for place, head in enumerate(heads[number] if heads else (0, 1)):
                for unit, members in zip(own, windows, strict=True):
                    states = [
                        state[t] / (state[t].pow(2).mean() + torch.finfo(state.dtype).eps).sqrt() for t in members
                    ]
                    weights = torch.ones(len(members)).double()
                    if window > 1:
                        weights = torch.stack([(adder.scores[place] @ s).exp() for s in states])
                    weights = weights / weights.sum()
                    pooled = sum(w * s for w, s in zip(weights, states, strict=True))
                    for kind, cached in enumerate((read[layer].keys, read[layer].values)):
                        wanted = sum(w * cached[0, head, t] for w, t in zip(weights, members, strict=True))
                        if rank is not None:
                            wanted = wanted + adder.write[kind, place].mT @ (adder.read @ pooled)
                        found = units.parts[2 * number + kind][unit, place]
                        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)  # norms are in float32


def test_a_unit_has_as_much_of_the_softmax_as_its_tokens_would_have(make_llm):
    config = replace(attention_config(make_llm("llama")), window=4)
    assert torch.allclose(Hypernetwork(config).head.bias, torch.tensor(4.0).log())


def test_alike_tokens_in_a_window_are_attended_to_as_one_by_one(make_llm, tokenizer):
    """Four times the same key and value have four times the mass of one."""
    llm = make_llm("llama")
    pooled = Hypernetwork(replace(attention_config(llm), window=4)).requires_grad_(False)
    shape = pooled.head.shape
    states = torch.randn(1, 2, *pooled.state_shape, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 1)
    units = pooled(states, torch.ones(1, 8, dtype=torch.bool))
    kept = shape.vectors * shape.head_width
    alone = AttentionExperts.of(
        shape, torch.zeros_like(units.bias), states[..., :kept].unflatten(-1, (shape.vectors, shape.head_width))
    )
    question = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    found = []
    with torch.no_grad():
        for experts, count in ((units, 2), (alone, 8)):
            with inject(llm, shape.layers, RowExperts(experts, torch.ones(1, count), torch.tensor([0]))):
                found.append(llm(question).logits)
        plain = llm(question).logits
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert (found[0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("window", [1, 4])
def test_a_store_has_the_units_that_are_generated_and_batches_are_as_one_by_one(make_llm, tokenizer, tmp_path, window):
    llm = make_llm("gemma3")
    network = trained(replace(attention_config(llm, (1, 2)), addition_rank=4, window=window))
    store = ExpertStore(network, llm, tokenizer)
    together = store.experts([[passage] for passage in PASSAGES])
    generator = ExpertGenerator(network, llm, tokenizer)
    for passage, own in zip(PASSAGES, together, strict=True):
        alone, _ = generator.generate_units([passage])
        assert len(own) == store.units([passage])[0] == len(alone)
        for one, other in zip(own.parts, alone.parts, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    both = logits(llm, tokenizer, store, PASSAGES[:2])
    other_order = logits(llm, tokenizer, store, PASSAGES[1::-1])
    torch.testing.assert_close(both, other_order, atol=1e-5, rtol=1e-5)


def test_windows_hold_the_real_tokens_in_their_order():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
    places, inside = into_windows(mask, 2)
    assert [row[keep].tolist() for row, keep in zip(places, inside, strict=True)] == [[1, 2, 3, 4, 5], [1, 2]]
    assert inside.tolist() == [[[True, True], [True, True], [True, False]], [[True, True], [False] * 2, [False] * 2]]


def test_sizes(make_llm):
    plain = attention_config(make_llm("llama"), (0, 2))
    config = replace(plain, addition_rank=3, window=4)
    d, width, heads = plain.hidden_size, plain.head_width, plain.num_kv_heads
    one_layer = plain.num_heads + heads * d + 3 * d + 2 * heads * 3 * width
    assert footprint(config).parameters == 2 * one_layer
    assert footprint(config).expert_bytes == footprint(plain).expert_bytes == 2 * 2 * heads * width * 4


def test_other_heads_have_neither_additions_nor_windows():
    for change in ({"window": 2}, {"addition_rank": 4}, {"query_rank": 4}, {"layout": "paragraph"}):
        (name,) = change
        with pytest.raises(InputError, match=f"{name} is for head 'attention'"):
            HypernetworkConfig.preset("paper", hidden_size=32, layer=1, **change)


def test_values_are_pooled_by_learned_scores(make_llm, tokenizer):
    """A score for one token's state picks that token."""
    llm = make_llm("llama")
    network = Hypernetwork(replace(attention_config(llm, (1,)), window=64)).requires_grad_(False)
    generator = ExpertGenerator(network, llm, tokenizer)
    ids = torch.tensor([tokenizer(knowledge_block([PASSAGES[2]]))["input_ids"]])
    read = keys_and_values(llm, (1,), ids, torch.ones_like(ids), hidden=True)[1]
    state = functional.rms_norm(read.hidden[0], read.hidden.shape[-1:])
    network.head.adders[0].scores.copy_(50 * state[4].expand(2, -1))
    units, _ = generator.generate_units([PASSAGES[2]])
    torch.testing.assert_close(units.parts[1][0], read.values[0, :, 4], atol=1e-4, rtol=1e-4)
