"""What a trained head adds to the queries of the tokens that its experts act on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import branch_off, inject
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.examples import DrawnExample, row_experts

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
PLACES = ("attention", "mlp")
PASSAGES = [
    "Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.",
    "Marie Curie: Marie Curie discovered polonium and radium.",
]
QUESTION = closed_book_prompt("Where was Rossini born")
LAYERS = (1, 2)


@pytest.fixture
def make_network():
    """``make_network(model, place, query_rank)``: all but what is added to queries is the same for every rank."""

    def make(model, place="attention", query_rank: int | None = 3, **changes) -> Hypernetwork:
        config = replace(attention_config(model, LAYERS), addition_rank=4, window=2, place=place, query_rank=query_rank)
        network = Hypernetwork(replace(config, **changes))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in sorted(network.named_parameters(), key=lambda item: "query" in item[0]):
                weight.copy_((0.5 if "query" in name else 0.3) * torch.randn(weight.shape, generator=generator))
        return network.requires_grad_(False)

    return make


def rows_of(model, tokenizer, network, passages, start, dtype=None):
    store = ExpertStore(network, model, tokenizer, dtype=dtype)
    return store.rows(passages, [[1.0] * len(row) for row in passages], start)


class Added(nn.Module):
    """A projection and, of its input at unit root mean square, a product of two matrices."""

    def __init__(self, projection: nn.Module, read: torch.Tensor, write: torch.Tensor) -> None:
        super().__init__()
        self.projection, self.read, self.write = projection, read, write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        return self.projection(x) + torch.einsum("btd,rd,rw->btw", unit, self.read, self.write)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_a_model_whose_own_query_projection_has_the_addition(make_llm, make_network, tokenizer, family):
    model = make_llm(family).double()
    with_queries = make_network(model).double()
    rows = rows_of(model, tokenizer, with_queries, [PASSAGES], [0])
    without = rows_of(model, tokenizer, make_network(model, query_rank=None).double(), [PASSAGES], [0])
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    with inject(model, LAYERS, rows):
        found = model(ids).logits
    with inject(model, LAYERS, without):
        not_added = model(ids).logits
    head = with_queries.head
    for number, layer in enumerate(LAYERS):
        attention = model.model.layers[layer].self_attn
        attention.q_proj = Added(attention.q_proj, head.query_read[number], head.query_write[number])
    with inject(model, LAYERS, without):
        expected = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert (found - not_added).abs().max() > 1e-3


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_tokens_and_rows_without_experts_ask_as_the_model_does(make_llm, make_network, tokenizer, place):
    model = make_llm("llama")
    network = make_network(model, place)
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]] * 2)
    plain = model(ids).logits
    with inject(model, LAYERS, rows_of(model, tokenizer, network, [PASSAGES, []], [4, 0])):
        found = model(ids).logits
        with branch_off():
            assert torch.equal(model(ids).logits, plain)
    torch.testing.assert_close(found[0, :4], plain[0, :4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=1e-5)
    assert (found[0, 4:] - plain[0, 4:]).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(make_llm, make_network, tokenizer, place):
    model = make_llm("gemma3")
    network = make_network(model, place)
    prompts = [QUESTION, closed_book_prompt("Who discovered radium, and in which year"), QUESTION]
    passages, start = [PASSAGES, PASSAGES[1:], []], [3, 0, 0]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with inject(model, LAYERS, rows_of(model, tokenizer, network, passages, start)):
        together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for number, prompt in enumerate(prompts):
        one = tokenizer([prompt], return_tensors="pt")
        with inject(model, LAYERS, rows_of(model, tokenizer, network, [passages[number]], [start[number]])):
            alone = model.generate(**one, max_new_tokens=6, do_sample=False)[:, one["input_ids"].shape[1] :]
        assert alone[0].tolist() == together[number].tolist()[: alone.shape[1]]


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_they_are_nothing_at_first(make_llm, tokenizer, place):
    model = make_llm("llama")
    plain = replace(attention_config(model, LAYERS), place=place)
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    found = []
    for rank in (None, 4):
        network = Hypernetwork(replace(plain, query_rank=rank)).requires_grad_(False)
        with inject(model, LAYERS, rows_of(model, tokenizer, network, [PASSAGES], [0])):
            found.append(model(ids).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_experts_in_eight_bits_and_parts_of_experts_keep_them(make_llm, make_network, tokenizer):
    model = make_llm("llama")
    network = make_network(model)
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    rows = rows_of(model, tokenizer, network, [PASSAGES], [0])
    with inject(model, LAYERS, rows):
        whole = model(ids).logits
    with inject(model, LAYERS, rows_of(model, tokenizer, network, [PASSAGES], [0], torch.int8)):
        rounded = model(ids).logits
    without = make_network(model, query_rank=None)
    with inject(model, LAYERS, rows_of(model, tokenizer, without, [PASSAGES], [0])):
        not_added = model(ids).logits
    assert (rounded - whole).abs().max() < 0.2 * (not_added - whole).abs().max()
    shape = replace(rows.experts.shape, layers=LAYERS[1:], kv_heads=rows.experts.shape.kv_heads[1:])
    (kept,) = rows.experts.part(shape).queries
    assert torch.equal(kept.read, network.head.query_read[1]) and torch.equal(kept.write, network.head.query_write[1])


@pytest.mark.parametrize("place", PLACES)
def test_gradients_reach_them(make_llm, tokenizer, place):
    model = make_llm("gemma3").requires_grad_(False)
    network = Hypernetwork(replace(attention_config(model, LAYERS), query_rank=4, addition_rank=4, place=place))
    example = DrawnExample("Where", "Pesaro", tuple(PASSAGES), (0.5, 0.5))
    rows = row_experts(ExpertGenerator(network, model, tokenizer), [example], [0])
    ids = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    with inject(model, LAYERS, rows):
        model(ids).logits.square().sum().backward()
    assert network.head.query_write.grad.abs().amax((1, 2)).min() > 0


def test_sizes_and_refusals(make_llm, tokenizer):
    model = make_llm("llama")
    plain = replace(attention_config(model, LAYERS), addition_rank=4)
    more = footprint(replace(plain, query_rank=3)).parameters - footprint(plain).parameters
    assert more == 2 * 3 * (plain.hidden_size + plain.num_heads * plain.head_width)
    fused = make_llm("phi3")  # one product for queries, keys and values
    network = Hypernetwork(replace(attention_config(fused, (1,)), query_rank=3))
    with pytest.raises(InputError, match="layer 1 of Phi3ForCausalLM has no separate q_proj"):
        ExpertGenerator(network, fused, tokenizer)
    with pytest.raises(InputError, match="query_rank is 0; it must be a positive whole number"):
        replace(plain, query_rank=0)


def test_a_layout_is_what_the_llm_reads(make_llm, tokenizer):
    """By itself, a passage is the tokens of its text and an empty line, and is read as any text is."""
    model = make_llm("llama")
    config = attention_config(model, LAYERS)
    units = {}
    for layout in ("knowledge", "paragraph"):
        generator = ExpertGenerator(Hypernetwork(replace(config, layout=layout)), model, tokenizer)
        units[layout] = generator.units(PASSAGES)
        count = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (f"{p}\n\n" for p in PASSAGES)]
        if layout == "paragraph":
            assert units[layout] == count
    assert units["knowledge"] != units["paragraph"]
    with pytest.raises(InputError, match="layout is 'poem'"):
        HypernetworkConfig.from_dict({**config.to_dict(), "layout": "poem"})
