"""Experts in the LLM's attention, against the plain LLM with the passage in its prompt, and against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts import attention, attention_interface
from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape, attend
from genpoe_plugin.experts.attention_interface import AttentionCall
from genpoe_plugin.experts.decoder import find_attention
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import branch_off, inject
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block
from genpoe_plugin.training.creation import attention_config

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt_neox")
WINDOWED = ("mistral", "gemma2", "gemma3")
ROSSINI = "Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792."
CURIE = "Marie Curie: Marie Curie discovered polonium and radium."
FOX = "The quick brown fox jumps over the lazy dog."
QUESTION = closed_book_prompt("Where was Rossini born")


@pytest.fixture
def make_store():
    """``make_store(model, tokenizer, layers=None)``: untrained experts of an LLM."""

    def make(model, tokenizer, layers=None, **changes) -> ExpertStore:
        config = attention_config(model, layers)
        return ExpertStore(Hypernetwork(config).requires_grad_(False), model, tokenizer, **changes)

    return make


def ids(tokenizer, text, **options):
    return torch.tensor([tokenizer(text, **options)["input_ids"]])


# One passage, all layers: the passage in the prompt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_passage_in_all_layers_is_the_passage_in_the_prompt(
    make_llm, make_store, bare_tokenizer, family, implementation, dtype
):
    """No weight of ours is in this: the oracle is the plain LLM, which reads the passage right before the question."""
    if dtype is torch.float64 and implementation == "eager":
        pytest.skip("transformers' eager attention has its softmax in float32")
    model = make_llm(family).to(dtype)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers 5.24 has no sdpa for it, since that caps no logits")
    model.set_attn_implementation(implementation)
    store = make_store(model, bare_tokenizer)
    passage, question = ids(bare_tokenizer, knowledge_block([ROSSINI])), ids(bare_tokenizer, QUESTION)
    prompt = model(torch.cat([passage, question], 1)).logits[:, passage.shape[1] :]
    alone = model(question).logits
    with inject(model, store.layers, store.rows([[ROSSINI]], [[1.0]], [0])):
        found = model(question).logits
    tolerance = 1e-5 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(found, prompt, atol=tolerance, rtol=tolerance)
    assert (found - alone).abs().max() > 0.1
    assert torch.equal(model(question).logits, alone)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_a_bos_it_is_a_plain_pass_whose_mask_says_the_same(make_llm, make_store, tokenizer, family, window):
    """BOS and passage, BOS and question in one sequence; the question does not see the passage's BOS.

    Sliding windows hide the own context, never the passage from the question.
    """
    if window and family not in WINDOWED:
        pytest.skip("has no sliding windows")
    model = make_llm(family, **({"sliding_window": window} if window else {})).double()
    store = make_store(model, tokenizer)
    passage, question = ids(tokenizer, knowledge_block([ROSSINI])), ids(tokenizer, QUESTION)
    before, after = passage.shape[1], question.shape[1]
    positions = torch.arange(-before, after)
    sees = torch.ones(before + after, before + after, dtype=torch.bool).tril()
    distance = positions[:, None] - positions[None]
    sees[before:, 0] = False

    def mask(windowed: bool) -> torch.Tensor:
        near = distance < window if windowed and window else torch.ones_like(sees)
        seen = sees & near
        seen[before:, 1:before] = True
        return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)[None, None]

    types = getattr(model.config, "layer_types", None)
    masks = {kind: mask(kind == "sliding_attention") for kind in set(types)} if types else mask(family == "mistral")
    both = torch.cat([passage, question], 1)
    expected = model(both, attention_mask=masks, position_ids=positions[None], use_cache=False).logits[:, before:]
    with inject(model, store.layers, store.rows([[ROSSINI]], [[1.0]], [0])):
        found = model(question).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# The mixture's formula


def naive(query, key, value, sees, experts, gates, active, scaling, bias, softcap=None):
    """The own context and every expert by itself, then mixed by their masses; loops, float64."""
    rows, heads, tokens, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(rows, tokens, heads, value.shape[3], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            for token in range(tokens):
                q = query[row, head, token]
                parts = [(0.0, key[row, head // group], value[row, head // group], sees[row, token])]
                for gate, (keys, values) in zip(gates[row], experts[row], strict=True):
                    if active[row, token] and gate > 0 and keys[head // group] is not None:
                        weight = math.log(gate) - math.log(max(gates[row])) + float(bias[head])
                        everything = torch.ones(keys[head // group].shape[0], dtype=torch.bool)
                        parts.append((weight, keys[head // group], values[head // group], everything))
                masses, answers = [], []
                for weight, keys, values, seen in parts:
                    logits = scaling * (keys @ q)
                    if softcap is not None:
                        logits = softcap * torch.tanh(logits / softcap)
                    exponentials = torch.exp(logits + weight) * seen
                    masses.append(exponentials.sum())
                    answers.append((exponentials / exponentials.sum()) @ values)
                total = sum(masses)
                output[row, token, head] = sum(
                    mass / total * answer for mass, answer in zip(masses, answers, strict=True)
                )
    return output


@pytest.mark.parametrize("kept", [(0, 1), (1,)], ids=["all heads", "one KV head"])
@pytest.mark.parametrize("way", ["products", "fused"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_experts_are_a_mixture_with_the_own_context(way, kept, softcap, monkeypatch):
    if way == "fused" and softcap:
        pytest.skip("no kernel caps logits")
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = draw(2, 4, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 8)
    sees = torch.tensor([[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]] * 2, dtype=torch.bool)
    sees[1, :, 0] = False  # padding
    active = torch.tensor([[True, True, True], [False, True, True]])
    lengths, gates = [[2, 3, 1], [4]], [[0.2, 0.7, 0.1], [1.0]]
    shape = AttentionShape((7,), (kept,), 4, 2, 8)
    units, unit_gates = torch.zeros(2, 6, shape.vectors, 8, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    experts = []
    for row, (own, own_gates) in enumerate(zip(lengths, gates, strict=True)):
        place, of_row = 0, []
        for length, gate in zip(own, own_gates, strict=True):
            keys, values = draw(length, len(kept), 8), draw(length, len(kept), 8)
            units[row, place : place + length] = torch.cat([keys, values], 1)
            unit_gates[row, place : place + length] = gate
            place += length
            by_head = [
                [part[:, kept.index(head)] if head in kept else None for head in (0, 1)] for part in (keys, values)
            ]
            of_row.append(tuple(by_head))
        experts.append(of_row)
    bias = draw(1, 4)
    laid_out = AttentionExperts.of(shape, bias, units).layer(7, unit_gates)
    module = nn.Module()
    module.layer_idx = 7
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64).masked_fill(~sees[:, None], torch.finfo(torch.float64).min)
    call = AttentionCall(
        "eager" if softcap else "sdpa", module, query, key, value, mask, {"scaling": 0.3, "softcap": softcap}
    )
    monkeypatch.setattr(attention, "MAX_PLAIN_LOGITS", 0 if way == "fused" else 10**9)

    expected = naive(query, key, value, sees, experts, gates, active, 0.3, bias[0], softcap)
    torch.testing.assert_close(attend(call, laid_out, active), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("family", "meanwhile"), [("llama", "sdpa"), ("gemma2", "eager")])
@torch.no_grad()
def test_a_model_with_another_kernel_computes_with_one_that_is_its_like(
    make_llm, make_store, tokenizer, family, meanwhile
):
    """Of a model whose logits are capped that is eager attention: sdpa caps none, other kernels do."""
    model = make_llm(family)
    model.set_attn_implementation(meanwhile)
    store = make_store(model, tokenizer)
    rows = store.rows([[ROSSINI, FOX]], [[0.7, 0.3]], [0])
    question = ids(tokenizer, QUESTION)
    with inject(model, store.layers, rows):
        expected = model(question).logits
    model.set_attn_implementation("flex_attention")
    with inject(model, store.layers, rows):
        assert torch.equal(model(question).logits, expected)
    assert model.config._attn_implementation == "flex_attention"


def test_a_layer_that_adds_to_its_softmax_is_refused():
    module = nn.Module()
    module.layer_idx = 0
    shape = AttentionShape((0,), ((0,),), 1, 1, 2)
    experts = AttentionExperts.of(shape, torch.zeros(1, 1), torch.zeros(1, 1, 2, 2)).layer(0, torch.ones(1, 1))
    one = torch.zeros(1, 1, 1, 2)
    with pytest.raises(InputError, match="adds s_aux"):
        attend(
            AttentionCall("sdpa", module, one, one, one, None, {"s_aux": one}),
            experts,
            torch.ones(1, 1, dtype=torch.bool),
        )


# Batches, positions and caches


@pytest.fixture
def ragged():
    """Rows with three passages, none, one, and two; gates; starts."""
    passages = [[ROSSINI, CURIE, FOX], [], [FOX], [CURIE, ROSSINI]]
    return passages, [[0.5, 0.3, 0.2], [], [1.0], [0.1, 0.9]], [0, 0, 3, 2]


PROMPTS = ("Where was he born?", "Who is it?", "Question: Which animal jumps over the dog?\nAnswer:", "What is radium?")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(make_llm, make_store, tokenizer, ragged, family, padding_side):
    model = make_llm(family)
    store = make_store(model, tokenizer, (0, 2))
    passages, gates, start = ragged
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side=padding_side)
    with inject(model, store.layers, store.rows(passages, gates, start)):
        together = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
    for row, prompt in enumerate(PROMPTS):
        with inject(
            model, store.layers, store.rows(passages[row : row + 1], gates[row : row + 1], start[row : row + 1])
        ):
            alone = model(ids(tokenizer, prompt)).logits[0]
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_is_decoding_without_a_cache(make_llm, make_store, tokenizer, ragged, family, cache):
    model = make_llm(family)
    store = make_store(model, tokenizer, (1, 2))
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    rows = store.rows(*ragged)
    with inject(model, store.layers, rows):
        generated = model.generate(**batch, **options)
        whole, mask = batch["input_ids"], batch["attention_mask"]
        for _ in range(6):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(whole, attention_mask=mask, position_ids=positions, use_cache=False).logits
            logits[:, :, model.generation_config.eos_token_id] = -math.inf  # as min_new_tokens has it
            whole = torch.cat([whole, logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(generated, whole)
    assert not torch.equal(model.generate(**batch, **options), whole)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_chunked_prefill_equals_one_pass(make_llm, make_store, tokenizer, family):
    model = make_llm(family)
    store = make_store(model, tokenizer)
    question = ids(tokenizer, QUESTION)
    with inject(model, store.layers, store.rows([[ROSSINI, FOX]], [[0.6, 0.4]], [3])):
        whole = model(question).logits
        cache = DynamicCache(config=model.config)
        chunks = [
            model(question[:, part], past_key_values=cache).logits for part in (slice(2), slice(2, 7), slice(7, None))
        ]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_before_the_start_and_rows_without_experts_do_not_see_them(make_llm, make_store, tokenizer, ragged):
    model = make_llm("llama")
    store = make_store(model, tokenizer)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="right")
    plain = model(**batch).logits
    with inject(model, store.layers, store.rows(*ragged)):
        found = model(**batch).logits
    assert torch.equal(found[1], plain[1]), "no passages: as it is, bit for bit"
    torch.testing.assert_close(found[2, :3], plain[2, :3], atol=1e-5, rtol=1e-5)
    assert (found[2, 3:] - plain[2, 3:]).abs().max() > 0.1
    with inject(model, store.layers, store.rows(*ragged)), branch_off():
        assert torch.equal(model(**batch).logits, plain)
    with inject(model, store.layers, store.rows([[]] * 4, [[]] * 4, [0] * 4)):
        assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_beams_share_the_experts_of_their_row(make_llm, make_store, tokenizer, ragged):
    model = make_llm("qwen2")
    store = make_store(model, tokenizer)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with inject(model, store.layers, store.rows(*ragged)):
        together = model.generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    passages, gates, start = ragged
    for row, prompt in enumerate(PROMPTS):
        with inject(
            model, store.layers, store.rows(passages[row : row + 1], gates[row : row + 1], start[row : row + 1])
        ):
            alone = model.generate(ids(tokenizer, prompt), **options)[0, len(tokenizer(prompt)["input_ids"]) :]
        assert together[row, width:][: len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_order_does_not_exist_and_only_the_ratios_of_gates_count(make_llm, make_store, tokenizer):
    model = make_llm("llama").double()
    store = make_store(model, tokenizer)
    question = ids(tokenizer, QUESTION)

    def logits(passages, gates):
        with inject(model, store.layers, store.rows([passages], [gates], [0])):
            return model(question).logits

    expected = logits([ROSSINI, CURIE, FOX], [0.6, 0.3, 0.1])
    torch.testing.assert_close(logits([FOX, ROSSINI, CURIE], [0.1, 0.6, 0.3]), expected)
    torch.testing.assert_close(logits([ROSSINI, CURIE, FOX], [6.0, 3.0, 1.0]), expected)
    torch.testing.assert_close(logits([ROSSINI, CURIE], [0.6, 0.0]), logits([ROSSINI], [1.0]))
    assert (logits([ROSSINI, CURIE, FOX], [0.3, 0.6, 0.1]) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_some_of_the_layers_are_those_experts(make_llm, make_store, tokenizer):
    """Experts in all layers, injected in two, are experts that were made for these two."""
    model = make_llm("llama")
    every, some = make_store(model, tokenizer), make_store(model, tokenizer, (0, 2))
    question = ids(tokenizer, QUESTION)
    with inject(model, (0, 2), every.rows([[ROSSINI]], [[1.0]], [0])):
        expected = model(question).logits
    with inject(model, (0, 2), some.rows([[ROSSINI]], [[1.0]], [0])):
        assert torch.equal(model(question).logits, expected)


@torch.no_grad()
def test_a_part_of_the_heads_is_the_same_experts_without_the_others(make_llm, make_store, tokenizer):
    model = make_llm("qwen3")
    store = make_store(model, tokenizer)
    rows = store.rows([[ROSSINI, FOX]], [[0.5, 0.5]], [0])
    shape = AttentionShape((0, 2), ((1,), (0, 1)), 4, 2, 8)
    part = rows.experts.part(shape)
    for number, layer in enumerate(shape.layers):
        for side in (0, 1):
            whole = rows.experts.parts[2 * layer + side]
            assert torch.equal(whole[:, :, list(shape.kv_heads[number])], part.parts[2 * number + side])
    assert part.units.shape[2:] == (2 * 3, 8)


@torch.no_grad()
def test_bfloat16_stays_bfloat16(make_llm, make_store, tokenizer):
    model = make_llm("gemma3").bfloat16()
    store = make_store(model, tokenizer)
    with inject(model, store.layers, store.rows([[ROSSINI, FOX]], [[0.9, 0.1]], [0])):
        logits = model(ids(tokenizer, QUESTION)).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


def test_gradients_reach_the_bias(make_llm, make_store, tokenizer):
    model = make_llm("llama").requires_grad_(False)
    config = attention_config(model)
    hypernetwork = Hypernetwork(config)
    store = ExpertStore(hypernetwork, model, tokenizer)
    rows = store.rows([[ROSSINI]], [[1.0]], [0])
    bias = torch.zeros(3, 4, requires_grad=True)
    experts = AttentionExperts.of(rows.experts.shape, bias, rows.experts.units)
    rows = type(rows)(experts, rows.gates, rows.start)
    with inject(model, store.layers, rows):
        model(ids(tokenizer, QUESTION), use_cache=False).logits.square().mean().backward()
    assert bias.grad is not None and (bias.grad != 0).any(1).all()


@torch.no_grad()
def test_the_model_is_left_as_it_was(make_llm, make_store, tokenizer):
    model = make_llm("llama")
    model.set_attn_implementation("eager")
    store = make_store(model, tokenizer)
    rows = store.rows([[ROSSINI]], [[1.0]], [0])
    with pytest.raises(RuntimeError, match="stop"), inject(model, store.layers, rows):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "eager"
    assert attention_interface._handler.get() is None


@torch.no_grad()
def test_a_compiled_model_hears_every_batch(make_llm, make_store, tokenizer):
    model = make_llm("llama")
    store = make_store(model, tokenizer)
    question = ids(tokenizer, QUESTION)
    one, other = (store.rows([[passage]], [[1.0]], [0]) for passage in (ROSSINI, FOX))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for given in (None, one, other, None, one):
        with inject(model, store.layers, given):
            expected = model(question, use_cache=False).logits
            torch.testing.assert_close(compiled(question, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_saved_and_loaded_experts_are_the_same(make_llm, tokenizer, tmp_path):
    model = make_llm("qwen2")
    config = attention_config(model, (0, 2))
    hypernetwork = Hypernetwork(config)
    hypernetwork.head.bias.normal_()
    save_hypernetwork(tmp_path / "out", hypernetwork, model, tokenizer, {})
    loaded = load_hypernetwork(tmp_path / "out", model, tokenizer)
    assert loaded.config == config
    question = ids(tokenizer, QUESTION)
    logits = []
    for network in (hypernetwork, loaded):
        store = ExpertStore(network, model, tokenizer)
        with inject(model, store.layers, store.rows([[ROSSINI, FOX]], [[0.5, 0.5]], [0])):
            logits.append(model(question).logits)
    assert torch.equal(*logits)


# What has no place for them


def test_another_attention_is_refused_in_one_line(make_llm):
    import transformers

    with pytest.raises(InputError, match="has no rotary positions"):
        attention_config(make_llm("gpt2"))
    with pytest.raises(InputError, match="layer 7"):
        attention_config(make_llm("llama"), (0, 7))
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(InputError, match="no softmax attention"):
        find_attention(mamba, 0)
    latent = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            kv_lora_rank=4,
            q_lora_rank=4,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            first_k_dense_replace=1,
        )
    )
    with pytest.raises(InputError, match="latent states"):
        find_attention(latent, 0)
    with_sinks = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    )
    with pytest.raises(InputError, match="learned sinks"):
        find_attention(with_sinks, 0)


@torch.no_grad()
def test_experts_of_another_shape_are_refused(make_llm, make_store, tokenizer):
    store = make_store(make_llm("llama"), tokenizer, (0,))
    rows = store.rows([[ROSSINI]], [[1.0]], [0])
    other = make_llm("llama", num_key_value_heads=4)
    with pytest.raises(InputError, match="layer 0 has 4 heads, 4 key-value heads"), inject(other, (0,), rows):
        other(ids(tokenizer, QUESTION))
    model = make_llm("llama")
    with pytest.raises(InputError, match="no keys and values for layer 1"), inject(model, (1,), rows):
        model(ids(tokenizer, QUESTION))
