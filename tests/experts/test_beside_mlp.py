"""Experts of passages' tokens beside an MLP, against a pass written out token by token."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import branch_off, inject
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.training.creation import attention_config

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
PASSAGES = [
    "Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.",
    "Marie Curie: Marie Curie discovered polonium and radium.",
]
GATES = [0.75, 0.25]
QUESTION = closed_book_prompt("Where was Rossini born")


@pytest.fixture
def make_store(tokenizer):
    """``make_store(model, layers)``: experts beside the MLPs below these layers, with biases that are not zero."""

    def make(model, layers=(1, 2), **changes) -> ExpertStore:
        network = Hypernetwork(replace(attention_config(model, layers), place="mlp", **changes))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in network.parameters():
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
        return ExpertStore(network.requires_grad_(False), model, tokenizer)

    return make


def tokens(tokenizer, texts):
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")


def written_out(model, ids, store, start) -> torch.Tensor:
    """The logits of one prompt whose experts are read by loops over heads, tokens and units.

    What enters an MLP is summed up from what enters its layer and what the layer's attention returns.
    """
    decoder, layers = model.model, list(model.model.layers)
    eager = model.config._attn_implementation == "eager"  # sdpa caps no logits
    cap = getattr(model.config, "attn_logit_softcapping", None) if eager else None
    rotate = sys.modules[type(layers[0].self_attn).__module__].apply_rotary_pos_emb
    sandwich = model.config.model_type.startswith("gemma")
    count = ids.shape[1]
    positions = torch.arange(count)[None]
    rows = store.rows([PASSAGES], [GATES], [start])
    shape = rows.experts.shape
    entered, attended = {}, {}

    def reading(layer: int, residual: torch.Tensor) -> torch.Tensor:
        own = layers[layer]
        attention = own.self_attn
        x = own.input_layernorm(residual)
        query = attention.q_proj(x).view(1, count, shape.num_heads, shape.head_width)
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        kinds = (model.config.layer_types[layer],) if model.config.model_type.startswith("gemma3") else ()
        cos, sin = decoder.rotary_emb(x, positions, *kinds)
        query, _ = rotate(query.transpose(1, 2), query.transpose(1, 2), cos, sin)
        number = shape.layers.index(layer)
        keys, values = rows.experts.parts[2 * number : 2 * number + 2]
        bias, group = rows.experts.bias[number], shape.num_heads // shape.num_kv_heads
        out = x.new_zeros(1, count, shape.num_heads, shape.head_width)
        for head in range(shape.num_heads):
            for token in range(start, count):
                mass, summed = 1.0, torch.zeros(shape.head_width, dtype=x.dtype)
                for unit, gate in enumerate(rows.gates[0].tolist()):
                    logit = float(query[0, head, token] @ keys[0, unit, head // group]) * attention.scaling
                    logit = logit if cap is None else cap * math.tanh(logit / cap)
                    weight = gate / max(GATES) * math.exp(logit + float(bias[head]))
                    mass += weight
                    summed = summed + weight * values[0, unit, head // group]
                out[0, token, head] = summed / mass
        found = attention.o_proj(out.flatten(2))
        found = own.post_attention_layernorm(found) if sandwich else found
        return found * (positions >= start).unsqueeze(-1)

    def enter(layer):
        return lambda _, args: entered.update({layer: args[0]})

    def attend(layer):
        return lambda _, args, output: attended.update({layer: output[0]})

    def add(layer):
        def also_read(below, _, output):
            own = attended[layer - 1]
            residual = entered[layer - 1] + (below.post_attention_layernorm(own) if sandwich else own)
            return output + reading(layer, residual)

        return also_read

    hooks = []
    for layer in shape.layers:
        below = layers[layer - 1]
        hooks.append(below.register_forward_pre_hook(enter(layer - 1)))
        hooks.append(below.self_attn.register_forward_hook(attend(layer - 1)))
        hooks.append(below.register_forward_hook(add(layer)))
    try:
        return model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_are_read_as_the_layer_above_reads(make_llm, make_store, tokenizer, family):
    model = make_llm(family).double()
    store = make_store(model)
    ids = tokens(tokenizer, [QUESTION])["input_ids"]
    for start in (0, 3):
        expected = written_out(model, ids, store, start)
        with inject(model, store.layers, store.rows([PASSAGES], [GATES], [start])):
            found = model(ids).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        plain = model(ids).logits
        torch.testing.assert_close(found[:, :start], plain[:, :start], atol=0, rtol=0)
        assert (found[:, start:] - plain[:, start:]).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one_also_where_some_have_no_experts(make_llm, make_store, tokenizer, family):
    model = make_llm(family)
    store = make_store(model)
    prompts = [QUESTION, closed_book_prompt("Who wrote the opera about a barber, and when"), QUESTION]
    passages, gates = [PASSAGES, PASSAGES[1:], []], [GATES, [1.0], []]
    batch = tokens(tokenizer, prompts)
    with inject(model, store.layers, store.rows(passages, gates, [0] * 3)):
        together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for number, prompt in enumerate(prompts):
        one = tokens(tokenizer, [prompt])
        with inject(model, store.layers, store.rows([passages[number]], [gates[number]], [0])):
            alone = model.generate(**one, max_new_tokens=6, do_sample=False)[:, one["input_ids"].shape[1] :]
        assert alone[0].tolist() == together[number].tolist()[: alone.shape[1]]
    plain = tokens(tokenizer, prompts[2:])
    without = model.generate(**plain, max_new_tokens=6, do_sample=False)[:, plain["input_ids"].shape[1] :]
    assert without[0].tolist() == together[2].tolist()[: without.shape[1]]


@torch.no_grad()
def test_the_model_is_left_as_it_was_and_passages_are_read_without_experts(make_llm, make_store, tokenizer):
    model = make_llm("gemma3")
    store = make_store(model)
    ids = tokens(tokenizer, [QUESTION])["input_ids"]
    before = model(ids).logits
    with inject(model, store.layers, store.rows([PASSAGES], [GATES], [0])):
        assert not torch.equal(model(ids).logits, before)
        with branch_off():
            assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_reach_additions_and_biases(make_llm, tokenizer):
    from genpoe_plugin.experts.generator import ExpertGenerator
    from genpoe_plugin.training.examples import DrawnExample, row_experts

    model = make_llm("gemma3").requires_grad_(False)
    network = Hypernetwork(replace(attention_config(model, (1, 2)), place="mlp", addition_rank=4, window=2))
    rows = row_experts(
        ExpertGenerator(network, model, tokenizer), [DrawnExample("Where", "Pesaro", tuple(PASSAGES), (0.5, 0.5))], [0]
    )
    ids = tokens(tokenizer, [QUESTION])["input_ids"]
    with inject(model, network.config.layers, rows):
        model(ids).logits.square().sum().backward()
    assert network.head.bias.grad.abs().min() > 0
    assert all(adder.write.grad.abs().sum() > 0 for adder in network.head.adders)


def test_where_there_is_no_place_it_says_so(make_llm, make_store, tokenizer):
    with pytest.raises(InputError, match="no MLP is below layer 0"):
        replace(attention_config(make_llm("llama"), (0, 1)), place="mlp")
    with pytest.raises(InputError, match="place is for head 'attention'"):
        HypernetworkConfig.preset("memory", hidden_size=32, layer=1, place="mlp")
    parallel = make_llm("phi")  # one norm for attention and MLP, side by side
    wrong = "layers 0 and 1 of PhiForCausalLM are not each a norm and an attention, then a norm and an MLP"
    with pytest.raises(InputError, match=wrong):  # before anything is read or trained
        make_store(parallel, (1,))
    store = make_store(make_llm("llama", num_key_value_heads=4), (1,))
    with pytest.raises(InputError, match=wrong), inject(parallel, (1,), store.rows([PASSAGES], [GATES], [0])):
        pass


@torch.no_grad()
def test_tokens_without_experts_get_no_bias_of_the_output_projection(make_llm, make_store, tokenizer):
    model = make_llm("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.fill_(3.0)
    store = make_store(model)
    batch = tokens(tokenizer, [QUESTION, QUESTION])
    plain = model(**batch).logits
    with inject(model, store.layers, store.rows([PASSAGES, []], [GATES, []], [3, 0])):
        found = model(**batch).logits
    torch.testing.assert_close(found[0, :3], plain[0, :3], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1], plain[1], atol=1e-6, rtol=1e-6)
    assert (found[0, 3:] - plain[0, 3:]).abs().max() > 0.05
