"""The vLLM class against the transformers class, which has its own tests: the same answers and the same scores."""

from __future__ import annotations

import random

import pytest
from lm_eval.api.instance import Instance

WORDS = ["who", "wrote", "the", "opera", "about", "a", "barber", "where", "is", "capital", "of", "country", "founded"]


@pytest.fixture(scope="module")
def many(make_doc):
    """65 docs with prompts of different lengths, no to four passages, and contents that come again."""
    rng = random.Random(0)
    docs = [
        make_doc(" ".join(rng.choices(WORDS, k=rng.randrange(3, 20))), *rng.sample(range(5), rng.randrange(5)))
        for _ in range(60)
    ]
    return [*docs, *docs[:5]]


def texts(answers: list[str]) -> list[str]:
    """vLLM says nothing of a character whose last bytes are missing, transformers says that there is one."""
    return [answer.rstrip("\ufffd") for answer in answers]


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_answers_are_those_of_the_transformers_class(make_vllm, make_lm, generation, many, mode):
    requests = generation(many, max_gen_toks=10)
    expected = texts(make_lm(mode, batch_size=16, max_length=512).generate_until(requests))
    lm = make_vllm(mode)
    assert texts(lm.generate_until(requests)) == expected
    if mode.startswith("genpoe"):
        assert len({request.doc["question"] for request in requests}) > 4 * lm._engine.capacity
        plain = make_lm("rag" if mode == "genpoe_rag" else "closed_book", max_length=512).generate_until(requests)
        plain = texts(plain)
        assert sum(one != other for one, other in zip(plain, expected, strict=True)) > len(many) / 2
    # Once more, now that much of it is in the prefix cache, and in another order.
    assert texts(lm.generate_until(requests[::-1])) == expected[::-1]


@pytest.mark.parametrize("mode", ["closed_book", "rag", "genpoe", "genpoe_rag"])
def test_scores_are_those_of_the_transformers_class(make_vllm, make_lm, choices, many, mode):
    requests = choices(many[:20])
    expected = make_lm(mode, max_length=512).loglikelihood(requests)
    for (score, greedy), (other, other_greedy) in zip(make_vllm(mode).loglikelihood(requests), expected, strict=True):
        assert score == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy


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
    expected = texts(make_lm(trace=str(traces["transformers"]), **options).generate_until(requests))
    lm = make_vllm(trace=str(traces["vllm"]), **options)
    assert texts(lm.generate_until(requests)) == expected
    assert traces["vllm"].read_text() == traces["transformers"].read_text() != ""
    info = lm.get_model_info()["genpoe"]
    assert info["arguments"]["num_passages"] == 2
    assert info["fingerprint"]["engine"] == "vllm"
    assert info["questions"] == 20


def test_nothing_to_do(make_vllm):
    lm = make_vllm()
    assert lm.generate_until([]) == []
    assert lm.loglikelihood([]) == []
