"""Experts in eight bits: how far from the others, how many bytes, and that they are kept."""

from __future__ import annotations

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.experts.int8 import Int8Experts
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.training.creation import attention_config

PASSAGES = ["Rossini: Gioachino Rossini was born in Pesaro in 1792.", "Marie Curie discovered polonium and radium."]


def store_of(llm, tokenizer, layers=None, **options) -> ExpertStore:
    return ExpertStore(Hypernetwork(attention_config(llm, layers)).requires_grad_(False), llm, tokenizer, **options)


def logits(llm, tokenizer, store: ExpertStore) -> torch.Tensor:
    question = torch.tensor([tokenizer(closed_book_prompt("Where was Rossini born"))["input_ids"]])
    with torch.no_grad(), inject(llm, store.layers, store.rows([PASSAGES], [[1.0, 0.5]], [0])):
        return llm(question).logits


def test_every_number_is_within_half_a_step_of_its_vector():
    shape = AttentionShape((1,), ((0, 1),), 4, 2, 8)
    torch.manual_seed(0)
    parts = tuple(torch.randn(5, 2, 8) * scale for scale in (1e-4, 300.0))
    parts[0][3] = 0
    experts = AttentionExperts(shape, torch.zeros(1, 4), parts)
    kept = Int8Experts.of(experts)
    back = kept.select(kept.weights, torch.arange(5))
    for one, other in zip(back.parts, parts, strict=True):
        step = other.abs().amax(-1, keepdim=True) / 127
        assert ((one - other).abs() <= 0.501 * step).all()
    assert (back.parts[0][3] == 0).all()
    assert {weight.dtype for weight in kept.weights} == {torch.int8, torch.float32}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_nearly_the_same_from_a_quarter_of_the_bytes(make_llm, tokenizer, tmp_path, family):
    llm = make_llm(family)
    whole = store_of(llm, tokenizer)
    small = store_of(llm, tokenizer, dtype=torch.int8, files=ExpertFiles(tmp_path, "int8"))
    expected, found = logits(llm, tokenizer, whole), logits(llm, tokenizer, small)
    assert (found - expected).abs().max() < 0.05 * expected.std()
    assert not torch.equal(found, expected)
    bytes_of = [
        sum(w.nbytes for w in store._device_pool.weights) / len(store._device_pool.weights[0])
        for store in (whole, small)
    ]
    width = 8
    assert bytes_of[1] / bytes_of[0] == pytest.approx((width + 4) / (4 * width))
    again = store_of(llm, tokenizer, dtype=torch.int8, files=ExpertFiles(tmp_path, "int8"))
    again._generator.generate_units = None  # type: ignore[method-assign,assignment]
    assert torch.equal(logits(llm, tokenizer, again), found), "from the folder"


def test_experts_in_sixteen_bits_serve_an_llm_in_thirty_two(make_llm, tokenizer):
    llm = make_llm("llama")
    expected = logits(llm, tokenizer, store_of(llm, tokenizer))
    found = logits(llm, tokenizer, store_of(llm, tokenizer, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.05 * expected.std()


def test_experts_beside_an_mlp_are_refused(make_llm, tokenizer):
    network = Hypernetwork(HypernetworkConfig.preset("paper", hidden_size=32, layer=1, rank=4, expert_width=8))
    with pytest.raises(InputError, match="cannot be stored in int8"):
        ExpertStore(network, make_llm("llama"), tokenizer, dtype=torch.int8)
