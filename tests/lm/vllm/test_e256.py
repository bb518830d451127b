"""The engine without lm-eval: every family and form against transformers with the branch, token by token."""

from __future__ import annotations

import random

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.experts.store import ExpertStore
from tests.lm.vllm.conftest import SIZES, SMALL, save_parts

FACTS = [f"Fact {number}: Rossini wrote {number * number} operas in {1792 + number}." for number in range(12)]
FORMS = {
    "dense": {"head": "dense"},
    "factored": {"head": "factored", "encoder": "mean"},
    "memory": {"head": "memory", "states": "contextual"},
}
HEADS_OF_32 = {"qwen3": {"head_dim": 32}, "gemma": {"head_dim": 32}}


@pytest.fixture
def make_parts(make_llm, tokenizer, tmp_path):
    """``make(family, **form)``: an LLM, a loud hypernetwork of it, and the directories of both and of the tokenizer."""

    def make(family: str, **form):
        llm = make_llm(family, **SIZES, **HEADS_OF_32.get(family, {}))
        values = {"hidden_size": 64, "layer": 1, "rank": 4, "core_size": 6, "expert_width": 16, "code_size": 16}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            config = HypernetworkConfig.from_dict({**values, "base": "random", "generator_gain": 3.0, **form})
            network = Hypernetwork(config).eval().requires_grad_(False)
        return llm, network, save_parts(tmp_path, llm, tokenizer, network)

    return make


@pytest.fixture
def start(make_parts):
    """``start(family, form, **options)``: the engine, and the same LLM with an expert store on transformers."""
    from genpoe_plugin.vllm_engine.engine import ExpertEngine

    def run(family: str = "llama", form: str = "factored", **options):
        llm, network, paths = make_parts(family, **FORMS[form])
        engine = ExpertEngine.load(
            paths["llm"],
            paths["hypernetwork"],
            tokenizer=paths["tokenizer"],
            **{"num_passages": 3, **SMALL, **options},
        )
        return engine, llm, network

    return run


def make_requests(tokenizer, count: int, seed: int = 0):
    """Prompts of different lengths with no to three experts, and starts in and behind the first chunk."""
    from vllm import SamplingParams

    from genpoe_plugin.vllm_engine.engine import ExpertRequest

    rng = random.Random(seed)
    requests = []
    for number in range(count):
        text = f"Question: Who wrote opera {number % 7}" + " again and again" * rng.randrange(12) + "?\nAnswer:"
        ids = tokenizer(text)["input_ids"]
        passages = tuple(rng.sample(FACTS, rng.randrange(4)))
        weights = [rng.random() + 0.1 for _ in passages]
        gates = tuple(weight / sum(weights) for weight in weights)
        begin = rng.choice([0, 5, len(ids) - 3]) if passages else 0
        sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        requests.append(ExpertRequest(ids, sampling, passages, gates, begin))
    return requests


@torch.no_grad()
def expected_tokens(llm, store, request, with_experts: bool = True) -> list[int]:
    """One prompt at a time, every step from its beginning: no cache, no padding."""
    rows = store.rows([request.passages], [request.gates], [request.start]) if with_experts else None
    ids = list(request.prompt)
    with inject(llm, store.layers, rows):
        for _ in range(6):
            ids.append(int(llm(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(request.prompt) :]


@pytest.mark.parametrize(
    ("family", "form"),
    [*(("llama", form) for form in FORMS), ("qwen2", "memory"), ("qwen3", "dense"), ("mistral", "dense"),
     ("gemma", "memory"), ("gemma", "dense")],
)  # fmt: skip
def test_tokens_are_those_of_transformers(start, tokenizer, family, form):
    engine, llm, network = start(family, form)
    store = ExpertStore(network, llm, tokenizer)
    requests = make_requests(tokenizer, 256)
    outputs = engine.generate(requests, progress=False)
    changed = 0
    for request, output in zip(requests, outputs, strict=True):
        expected = expected_tokens(llm, store, request)
        assert list(output.outputs[0].token_ids) == expected
        changed += expected != expected_tokens(llm, store, request, with_experts=False)
    assert changed > 5, "experts have to matter"


def test_equal_sets_are_loaded_once_and_the_least_used_leave(start, tokenizer, monkeypatch):
    engine, *_ = start()
    calls, rpc = [], engine.llm.collective_rpc
    from safetensors.torch import load

    def noted(method, args):
        removed, added = args
        calls.append((list(removed), sorted({int(name.split("/")[0]) for name in load(added)})))
        return rpc(method, args=args)

    monkeypatch.setattr(engine.llm, "collective_rpc", noted)
    few = make_requests(tokenizer, 6)
    engine.generate(few * 5, progress=False)
    different = {request.key for request in few if request.passages}
    assert sum(len(added) for _, added in calls) == len(different)
    engine.generate(few, progress=False)
    assert sum(len(added) for _, added in calls) == len(different), "they are still there"
    calls.clear()
    engine.generate(make_requests(tokenizer, 40, seed=1), progress=False)
    there: set[int] = set(range(1, len(different) + 1))
    for removed, added in calls:
        assert {*removed} <= there
        there = (there - {*removed}) | {*added}
        assert len(there) <= engine.capacity == 8
    (listed,) = {tuple(sorted(engine.llm.llm_engine.list_loras()))}
    assert listed == tuple(sorted(there))


@pytest.mark.parametrize(("stages", "most"), [(1, 8), (2, 4)])
def test_sets_under_way(start, tokenizer, monkeypatch, stages, most):
    """Between the stages of a pipeline vLLM counts only the adapters of one, and dies of more than max_loras."""
    from genpoe_plugin.vllm_engine.engine import ExpertEngine

    started, *_ = start()
    vllm = started.llm.llm_engine
    monkeypatch.setattr(vllm.vllm_config.parallel_config, "pipeline_parallel_size", stages)
    engine = ExpertEngine(started.llm, started.store)
    under_way, counts = {}, []
    add, step = vllm.add_request, vllm.step

    def noted_add(name, prompt, sampling, *, lora_request):
        if lora_request is not None:
            under_way[name] = lora_request.lora_int_id
        counts.append(len({*under_way.values()}))
        return add(name, prompt, sampling, lora_request=lora_request)

    def noted_step():
        outputs = step()
        for output in outputs:
            if output.finished:
                under_way.pop(output.request_id, None)
        return outputs

    monkeypatch.setattr(vllm, "add_request", noted_add)
    monkeypatch.setattr(vllm, "step", noted_step)
    engine.generate(make_requests(tokenizer, 40), progress=False)
    assert max(counts) == most


def test_large_sets_travel_by_parts(start, tokenizer, monkeypatch):
    from genpoe_plugin.vllm_engine import engine as module
    from genpoe_plugin.vllm_engine.engine import ExpertEngine

    started, *_ = start(form="dense")
    requests = make_requests(tokenizer, 256)
    expected = [output.outputs[0].token_ids for output in started.generate(requests, progress=False)]
    expert = 4 * (4 * 64 + 16 * 4 + 4 * 16 + 64 * 4)  # bytes of four matrices; at most three experts a set
    monkeypatch.setattr(module, "MESSAGE_BYTES", 7 * expert)
    for number in started.llm.llm_engine.list_loras():
        started.llm.llm_engine.remove_lora(number)
    sizes, rpc = [], started.llm.collective_rpc
    monkeypatch.setattr(
        started.llm, "collective_rpc", lambda method, args: sizes.append(len(args[1])) or rpc(method, args=args)
    )
    engine = ExpertEngine(started.llm, started.store)
    again = engine.generate(requests, progress=False)
    assert [output.outputs[0].token_ids for output in again] == expected
    assert max(sizes) < 8 * expert and len(engine.llm.llm_engine.list_loras()) == 8


def test_sets_that_somebody_removed_are_loaded_again(start, tokenizer):
    """An engine that is asked for an adapter that it lacks looks for a file, and dies."""
    engine, *_ = start()
    requests = make_requests(tokenizer, 6)
    expected = [output.outputs[0].token_ids for output in engine.generate(requests, progress=False)]
    assert engine.llm.llm_engine.list_loras()
    for number in engine.llm.llm_engine.list_loras():
        engine.llm.llm_engine.remove_lora(number)
    again = engine.generate(requests, progress=False)
    assert [output.outputs[0].token_ids for output in again] == expected


def test_a_stopped_run_leaves_an_engine_that_works(start, tokenizer, monkeypatch):
    engine, *_ = start()
    requests = make_requests(tokenizer, 20)
    expected = [output.outputs[0].token_ids for output in engine.generate(requests, progress=False)]
    step, steps = engine.llm.llm_engine.step, []

    def interrupted():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(requests, progress=False)
    again = engine.generate(requests, progress=False)
    assert [output.outputs[0].token_ids for output in again] == expected


def test_what_a_request_cannot_have(start, tokenizer):
    """Said before anything of it reaches the engine, which goes on."""
    from dataclasses import replace

    engine, *_ = start(num_passages=2)
    good = next(request for request in make_requests(tokenizer, 20) if len(request.passages) == 2)
    with pytest.raises(InputError, match="request 1 has 3 passages, more than num_passages=2"):
        engine.generate([good, replace(good, passages=tuple(FACTS[:3]), gates=(0.4, 0.3, 0.3))])
    with pytest.raises(InputError, match="request 0: 1 gates for 2 passages"):
        engine.generate([replace(good, gates=(1.0,))])
    assert len(engine.generate([good], progress=False)) == 1


def test_only_the_lower_layers_are_loaded_to_make_experts(start):
    for form, layers in (("factored", 1), ("memory", 2)):
        engine, llm, _ = start(form=form)
        model = engine.store._generator.model
        assert len(model.layers) == layers < llm.config.num_hidden_layers


def test_half_precision(start, tokenizer):
    engine, *_ = start(dtype="bfloat16")
    requests = make_requests(tokenizer, 8)
    assert engine.store.dtype == torch.bfloat16
    assert all(len(output.outputs[0].token_ids) == 6 for output in engine.generate(requests, progress=False))
