"""`parallelize=True`: accelerate spreads the LLM over devices and puts hooks of its own around every module."""

from __future__ import annotations

import pytest
import torch

from genpoe_plugin.lm.hf import GenPoELM


@pytest.fixture
def make(llm_dir, hypernetwork_dir, tmp_path):
    def make(mode: str = "genpoe", **options) -> GenPoELM:
        if mode.startswith("genpoe"):
            options.setdefault("hypernetwork", str(hypernetwork_dir))
        folder = str(tmp_path / "offload")
        return GenPoELM(str(llm_dir), mode=mode, device="cpu", batch_size=3, offload_folder=folder, **options)

    return make


HERE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
LAYERS = [f"model.layers.{number}" for number in range(3)]
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
PLACES = {
    "all on disk, as happens without a GPU": "auto",
    "one layer on disk": HERE | {layer: "disk" if layer == LAYERS[1] else "cpu" for layer in LAYERS},
    "another layer on disk": HERE | {layer: "disk" if layer == LAYERS[2] else "cpu" for layer in LAYERS},
    "one MLP on disk": HERE
    | {f"{layer}.{part}": "cpu" for layer in LAYERS for part in PARTS}
    | {f"{LAYERS[1]}.mlp": "disk"},
    "the embeddings on disk": HERE | dict.fromkeys(LAYERS, "cpu") | {"model.embed_tokens": "disk"},
}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("mode", ["closed_book", "genpoe", "genpoe_rag"])
def test_an_offloaded_llm_answers_and_scores_the_same(make, make_lm, docs, generation, choices, mode, places):
    spread, whole = make(mode, parallelize=True, device_map=PLACES[places]), make_lm(mode, batch_size=3)
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    assert spread.generate_until(generation(docs)) == whole.generate_until(generation(docs))
    scores = spread.loglikelihood(choices(docs))
    assert scores == whole.loglikelihood(choices(docs))
    plain = make_lm("closed_book", batch_size=3).loglikelihood(choices(docs))
    moved = max(abs(score - other) for (score, _), (other, _) in zip(scores, plain, strict=True))
    assert (moved > 0.1) == (mode != "closed_book"), "experts have to matter for this test to mean anything"


@pytest.mark.parametrize("places", ["all on disk, as happens without a GPU", "the embeddings on disk"])
def test_an_offloaded_llm_reads_passages_the_same(make, make_lm, make_hypernetwork_dir, docs, choices, places):
    directory = str(make_hypernetwork_dir(head="factored", states="contextual"))
    spread = make(hypernetwork=directory, parallelize=True, device_map=PLACES[places])
    scores = spread.loglikelihood(choices(docs))
    assert scores == make_lm(hypernetwork=directory, batch_size=3).loglikelihood(choices(docs))
    # The pass that was stopped left nothing loaded.
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    assert scores == spread.loglikelihood(choices(docs))


def test_without_passages_it_is_the_original(make, make_lm, docs, generation):
    spread = make(parallelize=True, passages="none")
    assert spread.generate_until(generation(docs)) == make_lm("closed_book").generate_until(generation(docs))


def test_experts_go_where_the_layer_computes(make, docs, generation):
    """And not where its weights lie in between."""
    lm = make(parallelize=True)
    lm.generate_until(generation(docs[:1]))
    assert lm.store._generator.device == torch.device("cpu")
    assert lm._batch.rows.experts.w1.device == torch.device("cpu")
    assert all(parameter.device.type == "cpu" for parameter in lm.store._generator.hypernetwork.parameters())
