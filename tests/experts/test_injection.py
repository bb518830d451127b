from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.decoder import find_mlp
from genpoe_plugin.experts.injection import RowExperts, inject

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox", "gpt2")
LAYER = 1


@pytest.fixture
def rows(random_experts, head):
    """Two rows: three experts from the first token on, and one expert from the fourth."""
    gates = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    return RowExperts(random_experts(2, 3, head=head), gates, torch.tensor([0, 3]))


@pytest.fixture
def prompts(tokenizer):
    return torch.randint(5, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(3))


def by_hand(model, ids, rows):
    """Logits with the branch written into the MLP's own forward, positions counted from the first column."""
    mlp = find_mlp(model, LAYER)
    original = mlp.forward

    def forward(x):
        mask = (torch.arange(x.shape[1]) >= rows.start.unsqueeze(1)).unsqueeze(-1)
        return original(x) + rows.experts.mix(x, rows.gates) * mask

    mlp.forward = forward
    try:
        return model(ids, use_cache=False).logits
    finally:
        del mlp.forward


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_runs_the_branch_and_forgets_it(make_llm, rows, prompts, family):
    model = make_llm(family)
    plain = model(prompts).logits
    with inject(model, LAYER, rows):
        branched = model(prompts).logits
    torch.testing.assert_close(branched, by_hand(model, prompts, rows), atol=1e-5, rtol=1e-5)
    assert torch.equal(branched[1, :3], plain[1, :3])
    assert (branched - plain)[0].abs().max() > 1e-2
    assert torch.equal(model(prompts).logits, plain)
    with inject(model, LAYER, None):
        assert torch.equal(model(prompts).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_cache_do_not_move_the_start(make_llm, rows, prompts, family):
    model = make_llm(family)
    padded = torch.cat([torch.full((2, 4), model.config.pad_token_id), prompts], 1)
    mask = (torch.arange(13) >= 4).long().expand(2, 13)
    with inject(model, LAYER, rows):
        generated = model.generate(padded, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        whole = prompts
        for _ in range(6):
            whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated[:, 4:], whole)


@torch.no_grad()
def test_chunked_prefill_equals_one_pass(make_llm, rows, prompts):
    model = make_llm("llama")
    with inject(model, LAYER, rows):
        whole = model(prompts).logits
        first = model(prompts[:, :2], use_cache=True)
        second = model(prompts[:, 2:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_found_by_either_of_its_names(make_llm, rows, prompts, monkeypatch):
    """As of transformers 5.24, where a decoder's cache is called otherwise, and the older name is still taken."""
    model = make_llm("llama")
    decoder, forward = model.model, model.model.forward

    def renamed(input_ids=None, *, cache=None, **kwargs):
        if cache is not None:
            kwargs["past_key_values"] = cache
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", renamed)
    with inject(model, LAYER, rows):
        whole = decoder(prompts).last_hidden_state
        for name in ("cache", "past_key_values"):
            cache = DynamicCache(config=model.config)
            chunks = [decoder(prompts[:, part], **{name: cache})[0] for part in (slice(2), slice(2, None))]
            torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beams_share_the_experts_of_their_row(make_llm, rows, prompts):
    model = make_llm("llama")
    with inject(model, LAYER, rows):
        repeated = model(prompts.repeat_interleave(3, 0)).logits
        once = model(prompts).logits
    torch.testing.assert_close(repeated, once.repeat_interleave(3, 0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_stays_bfloat16(make_llm, rows, prompts):
    model = make_llm("llama").bfloat16()
    low = RowExperts(rows.experts.to(torch.bfloat16), rows.gates, rows.start)
    with inject(model, LAYER, low):
        logits = model(prompts).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


def test_hooks_go_away_after_an_error(make_llm, rows, prompts):
    model = make_llm("llama")
    with torch.no_grad():
        plain = model(prompts).logits
        with pytest.raises(RuntimeError, match="stop"), inject(model, LAYER, rows):
            raise RuntimeError("stop")
        assert torch.equal(model(prompts).logits, plain)


def test_what_does_not_fit_is_named(make_llm, random_experts, head, prompts):
    model = make_llm("llama")
    with pytest.raises(InputError, match="layer 7"):
        find_mlp(model, 7)
    narrow = RowExperts(random_experts(2, 1, head=head, d=16), torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="width 16"), inject(model, LAYER, narrow):
        model(prompts)
    three = RowExperts(random_experts(3, 1, head=head), torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="3 rows"), inject(model, LAYER, three):
        model(prompts)


def test_gradients_reach_the_experts_and_not_the_llm(make_llm, random_experts, head, prompts):
    model = make_llm("llama").requires_grad_(False)
    experts = random_experts(2, 1, head=head)
    learning = [*experts.weights, *(experts.factors if head != "dense" else ())]
    for tensor in learning:
        tensor.requires_grad_()
    rows = RowExperts(experts, torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
    with inject(model, LAYER, rows):
        model(prompts, use_cache=False).logits.square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in learning)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["factored", "memory"])
@torch.no_grad()
def test_untrained_silent_experts_leave_the_llm_as_it_is_bit_for_bit(
    make_llm, make_hypernetwork, prompts, family, form
):
    model = make_llm(family)
    untrained = make_hypernetwork(head=form, base="silent")
    experts = untrained(torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)).unsqueeze(1)
    plain = model(prompts).logits
    with inject(model, LAYER, RowExperts(experts, torch.ones(2, 1), torch.zeros(2, dtype=torch.long))):
        assert torch.equal(model(prompts).logits, plain)


@torch.no_grad()
def test_rows_without_experts_are_left_as_they_are(make_llm, random_experts, head, prompts):
    """Only the second and third of three rows have experts; alone, and as beams."""
    model = make_llm("llama")
    ids = torch.cat([prompts, prompts[:1]])
    experts, gates, start = random_experts(2, 3, head=head), torch.full((2, 3), 1 / 3), torch.tensor([0, 2, 4])
    some = RowExperts(experts, gates, start, torch.tensor([1, 2]))
    plain = model(ids).logits
    with inject(model, LAYER, some):
        branched = model(ids).logits
        beams = model(ids.repeat_interleave(2, 0)).logits
    expected = by_hand(model, ids[1:], RowExperts(experts, gates, start[1:]))
    assert torch.equal(branched[0], plain[0])
    torch.testing.assert_close(branched[1:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(beams, branched.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_static_cache_changes_nothing(make_llm, rows, prompts):
    model = make_llm("llama")
    padded = torch.cat([torch.full((2, 4), model.config.pad_token_id), prompts], 1)
    options = {"attention_mask": (torch.arange(13) >= 4).long().expand(2, 13), "max_new_tokens": 6, "do_sample": False}
    with inject(model, LAYER, rows):
        expected = model.generate(padded, **options)
        # Where there is a GPU transformers compiles the decoding step as well.
        assert torch.equal(model.generate(padded, cache_implementation="static", **options), expected)
    assert not torch.equal(model.generate(padded, **options), expected)


@torch.no_grad()
def test_a_compiled_model_hears_every_batch(make_llm, rows, prompts):
    """Also batches that come after it was compiled without, or with others' experts."""
    model = make_llm("llama")
    others = RowExperts(rows.experts.map(torch.neg), rows.gates, torch.tensor([1, 2]))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for given in (None, rows, others, None, rows):
        with inject(model, LAYER, given):
            expected = model(prompts, use_cache=False).logits
            torch.testing.assert_close(compiled(prompts, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_generation_lays_its_experts_out_once(make_llm, rows, prompts, monkeypatch):
    laid_out = []
    mixture = type(rows.experts).mixture
    monkeypatch.setattr(type(rows.experts), "mixture", lambda *given: laid_out.append(1) or mixture(*given))
    model = make_llm("llama")
    with inject(model, LAYER, rows):
        model.generate(prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(laid_out) == 1


class Unknown:
    """A cache that no class of transformers is."""


class Counting:
    def get_seq_length(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"past_key_values": Unknown()},
            "past_key_values is a Unknown; experts need one of transformers' Cache classes",
        ),
        (
            {"memory": Counting()},
            "unknown cache argument memory; with experts, pass the cache as past_key_values or cache",
        ),
        (
            {"layer_past": ()},
            "unknown cache argument layer_past; with experts, pass the cache as past_key_values or cache",
        ),
        (
            {"cache_params": Unknown()},
            "unknown cache argument cache_params; with experts, pass the cache as past_key_values or cache",
        ),
    ],
)
def test_a_cache_that_is_not_known_is_refused(make_llm, rows, prompts, given, message):
    """Else experts would begin at a wrong position, without a word."""
    model = make_llm("llama")
    with pytest.raises(InputError, match=message), inject(model, 1, rows):
        model.model(prompts, **given)


@torch.no_grad()
def test_what_is_only_named_after_a_cache_is_no_cache(make_llm, rows, prompts):
    model = make_llm("llama")
    with inject(model, LAYER, rows):
        expected = model(prompts, use_cache=False).logits
        given = {"use_cache": False, "past_key_values": None, "cache_position": torch.arange(prompts.shape[1])}
        assert torch.equal(model(prompts, **given).logits, expected)
