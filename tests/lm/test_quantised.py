"""LLMs in low precision or quantised: what ours needs to know must not come from weights that are not numbers.

bitsandbytes, torchao and GPTQ are not installed here, so stand-ins have their ways of keeping weights: int8 parameters,
packed parameters of another shape, and buffers, with no parameter at all.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genpoe_plugin.checkpoints.checkpoint import llm_identity
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.decoder import find_mlp


class Rounded(nn.Module):
    """Weights rounded to int8 by row, kept as ``form`` says, in the place of a linear layer."""

    def __init__(self, weight: torch.Tensor, form: str) -> None:
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / scale).round().to(torch.int8)
        self.shape = rounded.shape
        if form == "packed parameters":
            rounded = rounded.flatten().unsqueeze(1)
        if form == "buffers":
            self.register_buffer("weight", rounded)
            self.register_buffer("scale", scale)
        elif form == "neither":
            self.state = (rounded, scale)
        else:
            self.weight = nn.Parameter(rounded, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)

    def whole(self) -> torch.Tensor:
        rounded, scale = self.state if hasattr(self, "state") else (self.weight, self.scale)
        return rounded.view(self.shape).to(scale.dtype) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.whole().to(x.dtype))


class RoundedEmbedding(Rounded):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.whole())


def quantised(llm, form: str, embeddings: bool = False):
    """A copy of ``llm`` with stand-ins in its decoder, and one whose weights are the rounded numbers."""
    ours, reference = copy.deepcopy(llm), copy.deepcopy(llm)
    for name, module in llm.model.named_modules():
        if isinstance(module, nn.Linear) or (embeddings and isinstance(module, nn.Embedding)):
            kind = Rounded if isinstance(module, nn.Linear) else RoundedEmbedding
            stand_in = kind(module.weight.detach(), form)
            ours.model.set_submodule(name, stand_in)
            reference.model.get_submodule(name).weight.data = stand_in.whole()
    ours.is_quantized = reference.is_quantized = True
    return ours.eval(), reference.eval()


FORMS = ["int8 parameters", "packed parameters", "buffers", "neither"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
def test_a_quantised_llm_is_that_of_its_rounded_weights(make_lm, llm, docs, generation, choices, form, mode):
    ours, reference = quantised(llm, form)
    lm, expected = make_lm(mode, pretrained=ours), make_lm(mode, pretrained=reference)
    assert lm.generate_until(generation(docs)) == expected.generate_until(generation(docs))
    scores = lm.loglikelihood(choices(docs))
    assert scores == expected.loglikelihood(choices(docs))
    plain = make_lm("closed_book", pretrained=ours).loglikelihood(choices(docs))
    assert max(abs(score - other) for (score, _), (other, _) in zip(scores, plain, strict=True)) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_mlp_is_found_by_structure(llm, form):
    ours, _ = quantised(llm, form)
    assert find_mlp(ours, 1) is ours.model.layers[1].mlp


@pytest.mark.parametrize("form", ["int8 parameters", "packed parameters"])
def test_quantised_embeddings_are_looked_up(make_lm, llm, docs, generation, form):
    ours, reference = quantised(llm, form, embeddings=True)
    assert llm_identity(ours)["embedding_sample"] == pytest.approx(llm_identity(reference)["embedding_sample"])
    answers = make_lm(pretrained=ours).generate_until(generation(docs))
    assert answers == make_lm(pretrained=reference).generate_until(generation(docs))


def test_quantised_embeddings_of_another_llm_are_refused(make_lm, make_llm):
    ours, _ = quantised(make_llm("llama", seed=9), "int8 parameters", embeddings=True)
    with pytest.raises(InputError, match="other embeddings"):
        make_lm(pretrained=ours)


def test_rounded_embeddings_of_an_llm_that_is_not_quantised_are_refused(make_lm, llm):
    """They are those of another training of it, as far as one can tell."""
    _, reference = quantised(llm, "int8 parameters", embeddings=True)
    del reference.is_quantized
    with pytest.raises(InputError, match="other embeddings"):
        make_lm(pretrained=reference)


@pytest.mark.parametrize(("dtype", "near"), [("bfloat16", 0.1), ("float16", 0.01)])
@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
def test_half_precision_is_close_to_float32(make_lm, llm_dir, docs, generation, choices, mode, dtype, near):
    lm, whole = make_lm(mode, pretrained=str(llm_dir), dtype=dtype), make_lm(mode)
    wanted = getattr(torch, dtype)
    seen = set()
    handle = find_mlp(lm.model, 1).register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    scores = [score for score, _ in lm.loglikelihood(choices(docs))]
    handle.remove()
    assert lm.model.dtype == lm.store.dtype == wanted and seen == {wanted}
    expected = [score for score, _ in whole.loglikelihood(choices(docs))]
    plain = [score for score, _ in make_lm("closed_book").loglikelihood(choices(docs))]
    far = [abs(a - b) for a, b, r in zip(expected, plain, choices(docs), strict=True) if r.doc["ctxs"]]
    assert scores == pytest.approx(expected, rel=near / 5, abs=near)
    assert sum(far) / len(far) > 10 * near, "experts have to matter for this test to mean anything"
    answers = lm.generate_until(generation(docs))
    assert any(ours == theirs for ours, theirs in zip(answers, whole.generate_until(generation(docs)), strict=True))


def test_automatic_mixed_precision(make_lm, llm_dir, docs, choices):
    lm = make_lm(pretrained=str(llm_dir), mixed_precision_dtype="bfloat16")
    scores = [score for score, _ in lm.loglikelihood(choices(docs))]
    assert scores == pytest.approx([score for score, _ in make_lm().loglikelihood(choices(docs))], rel=0.05, abs=0.2)
