"""Experts in the LLM's attention on the engine, against transformers one prompt at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.training.creation import attention_config
from tests.experts.test_trained_attention import trained
from tests.lm.vllm.conftest import SMALL, save_parts
from tests.lm.vllm.test_engine import make_requests

# vLLM's attention on a CPU needs heads of 32.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    # The cap is near the logits' size, or it would change nothing.
    "gemma2": {"head_dim": 32, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32, "initializer_range": 0.05},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "initializer_range": 0.05},
}
PLAIN: dict = {}
TRAINED = {"addition_rank": 4, "query_rank": 3, "window": 4}


@pytest.fixture
def make_parts(make_llm, tokenizer, tmp_path):
    """``make(family, form, layers)``: an LLM, a hypernetwork of it, and the directories of both and the tokenizer."""

    def make(family: str = "llama", form: dict = PLAIN, layers: tuple[int, ...] = (0, 2), **changes):
        llm = make_llm(family, **SIZES, **HEADS.get(family, {}), **changes)
        # With the default, transformers leaves out Gemma 2's softcap.
        llm.set_attn_implementation("eager")
        network = trained(replace(attention_config(llm, layers), **form)).eval().requires_grad_(False)
        return llm, network, save_parts(tmp_path, llm, tokenizer, network)

    return make


@pytest.fixture
def start(make_parts):
    """``start(family, form, **options)``: the engine, and the same LLM and hypernetwork on transformers."""
    from genpoe_plugin.vllm_engine.engine import ExpertEngine

    def run(*parts, options: dict | None = None, **changes):
        llm, network, paths = make_parts(*parts, **changes)
        engine = ExpertEngine.load(
            paths["llm"],
            paths["hypernetwork"],
            tokenizer=paths["tokenizer"],
            **{"num_passages": 3, **SMALL, **(options or {})},
        )
        return engine, llm, network

    return run


CASES = [
    *((family, PLAIN) for family in ("qwen2", "mistral", "gemma")),
    *((family, TRAINED) for family in ("llama", "qwen3", "gemma2", "gemma3")),
    ("llama", {"kv_heads": ((1,), (0, 1)), "addition_rank": 4}),
]


@torch.no_grad()
def generated(llm, store, request, layers=None) -> tuple[list[int], list[float]]:
    """Six tokens and their log-probabilities, every step from the beginning: no cache, no padding."""
    rows = store.rows([request.passages], [request.gates], [request.start]) if store else None
    ids, values = list(request.prompt), []
    with inject(llm, layers or (store.layers if store else ()), rows):
        for _ in range(6):
            best = llm(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            ids.append(int(best.indices))
            values.append(best.values.item())
    return ids[len(request.prompt) :], values


def with_values(requests):
    for request in requests:
        request.sampling.logprobs = 1
    return requests


def found(output) -> tuple[list[int], list[float]]:
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    return tokens, [entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_tokens_are_those_of_transformers(start, tokenizer, family, form):
    """Prompts in chunks of 32 tokens, sets in waves, no to three passages, starts before and after the first chunk."""
    engine, llm, network = start(family, form)
    # Passages are read by transformers' default attention, without Gemma 2's softcap.
    store = engine.store if family == "gemma2" else ExpertStore(network, llm, tokenizer)
    requests = with_values(make_requests(tokenizer, 256))
    outputs = engine.generate(requests, progress=False)
    changed = 0
    for request, output in zip(requests, outputs, strict=True):
        (tokens, values), (own_tokens, own_values) = generated(llm, store, request), found(output)
        assert own_tokens == tokens
        assert own_values == pytest.approx(values, abs=1e-4)
        # A random Gemma 3 repeats its last token, whatever it reads; its probability differs.
        changed += abs(generated(llm, None, request)[1][0] - values[0]) > 0.01
    assert changed > 5, "experts have to matter"


def test_likelihoods_are_those_of_transformers(start, tokenizer):
    from vllm import SamplingParams

    engine, llm, network = start("llama", TRAINED)
    store = ExpertStore(network, llm, tokenizer)
    scoring = SamplingParams(temperature=0, prompt_logprobs=0, max_tokens=1)
    requests = [replace(request, sampling=scoring) for request in make_requests(tokenizer, 12, seed=3)]
    for request, output in zip(requests, engine.generate(requests, progress=False), strict=True):
        rows = store.rows([request.passages], [request.gates], [request.start])
        with inject(llm, store.layers, rows), torch.no_grad():
            expected = llm(torch.tensor([list(request.prompt)])).logits[0].log_softmax(-1)
        for at in range(1, len(request.prompt)):
            found = output.prompt_logprobs[at][request.prompt[at]].logprob
            assert found == pytest.approx(expected[at - 1, request.prompt[at]].item(), abs=1e-4)


def test_the_same_prompt_with_other_experts_is_not_taken_from_the_cache(start, tokenizer):
    engine, llm, network = start("llama")
    store = ExpertStore(network, llm, tokenizer)
    (longest,) = sorted(make_requests(tokenizer, 256), key=lambda request: len(request.prompt))[-1:]
    others = [request for request in make_requests(tokenizer, 256) if request.passages][:6]
    same = [
        replace(longest, prompt=longest.prompt * 3, passages=other.passages, gates=other.gates, start=0)
        for other in [*others, replace(others[0], passages=(), gates=())]
    ]
    for _ in range(2):  # the second time, everything is in the cache
        for request in same:
            (output,) = engine.generate([request], progress=False)
            assert list(output.outputs[0].token_ids) == generated(llm, store, request)[0]
    cached = engine.llm.llm_engine.vllm_config.cache_config
    assert cached.enable_prefix_caching


def test_a_part_of_the_layers(make_parts, tokenizer):
    from vllm import LLM

    from genpoe_plugin.vllm_engine.engine import ExpertEngine, load_expert_models
    from genpoe_plugin.vllm_engine.engine_arguments import engine_arguments

    llm, network, paths = make_parts("llama", PLAIN, (0, 1, 2))
    models = load_expert_models(paths["llm"], paths["hypernetwork"], tokenizer=paths["tokenizer"], dtype="float32")
    options = {**SMALL, "tokenizer": paths["tokenizer"]}
    arguments = engine_arguments(paths["llm"], paths["hypernetwork"], models[0].config, 3, options, (1,))
    engine = ExpertEngine(LLM(paths["llm"], **{**options, **arguments}), ExpertStore(*models, dtype=torch.float32))
    store = ExpertStore(network, llm, tokenizer)
    for request, output in zip(
        requests := make_requests(tokenizer, 12), engine.generate(requests, progress=False), strict=True
    ):
        assert list(output.outputs[0].token_ids) == generated(llm, store, request, (1,))[0]


def test_sets_that_left_the_engine_leave_the_bank(start, tokenizer):
    engine, *_ = start("llama")
    engine.generate(make_requests(tokenizer, 40, seed=1), progress=False)
    model = engine.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    assert 0 < len(model.bank.sets) <= engine.capacity == 8
    engine.llm.llm_engine.remove_lora(next(iter(model.bank.sets)))
    engine.generate(make_requests(tokenizer, 40, seed=2), progress=False)
    assert set(model.bank.sets) == set(engine.llm.llm_engine.list_loras())


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
def test_the_vllm_class_answers_and_scores_as_the_transformers_class(
    make_vllm, make_lm, llm, tokenizer, docs, generation, choices, tmp_path, mode
):
    network = trained(replace(attention_config(llm, (0, 2)), **TRAINED))
    save_hypernetwork(tmp_path / "hypernetwork", network, llm, tokenizer, {})
    arguments = {"hypernetwork": str(tmp_path / "hypernetwork"), "expert_layers": "2"}
    reference, lm = make_lm(mode, **arguments), make_vllm(mode, **arguments)
    # vLLM leaves out an unfinished character at the end of an answer.
    answers, expected = (
        [text.rstrip("\ufffd") for text in m.generate_until(generation(docs))] for m in (lm, reference)
    )
    assert answers == expected
    pairs = zip(lm.loglikelihood(choices(docs)), reference.loglikelihood(choices(docs)), strict=True)
    for (one, greedy), (other, other_greedy) in pairs:
        assert one == pytest.approx(other, abs=1e-3) and greedy == other_greedy
