"""`--use_cache`: lm-eval's keys know nothing of models, modes or passages."""

from __future__ import annotations

import copy

import pytest
from lm_eval.api.model import CachingLM, hash_args

from genpoe_plugin.errors import InputError


@pytest.fixture
def cached(make_lm, tmp_path):
    """``cached(mode, **options)``: a model behind the one cache file of the test."""
    opened = []

    def make(mode: str = "genpoe", **options):
        lm = CachingLM(make_lm(mode, **options), str(tmp_path / "cache.db"))
        opened.append(lm)
        return lm

    yield make
    for lm in opened:
        lm.dbdict.close()


def test_keys_are_those_of_the_original_requests(cached, docs, generation, choices):
    """Written while the run goes on, by HFLM itself, so an interrupted run keeps what it has."""
    lm = cached("genpoe_rag")
    answers = lm.lm.generate_until(generation(docs))
    scores = lm.lm.loglikelihood(choices(docs))
    assert [lm.dbdict[hash_args("generate_until", r.args)] for r in generation(docs)] == answers
    assert [lm.dbdict[hash_args("loglikelihood", r.args)] for r in choices(docs)] == scores


def test_hits_are_the_answers(cached, docs, generation, monkeypatch):
    answers = cached("genpoe_rag").generate_until(generation(docs))
    again = cached("genpoe_rag")
    asked = []
    generate = again.lm.generate_until
    monkeypatch.setattr(again.lm, "generate_until", lambda requests: asked.extend(requests) or generate(requests))
    assert again.generate_until(generation(docs)) == answers
    assert 0 < len(asked) <= 4, "a few are asked again to see whether their passages are still the same"


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"mode": "rag"}, "mode was genpoe, is rag"),
        ({"num_passages": 2}, "num_passages was 4, is 2"),
        ({"gates": "uniform"}, "gates was softmax, is uniform"),
        ({"gates": "retriever"}, "gates was softmax, is retriever"),
        ({"gate_temperature": 2}, "gate_temperature was None, is 2.0"),
        ({"passages": "none"}, "passages was retrieved, is none"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"num_retrieved": 7}, "num_retrieved was 20, is 7"),
        ({"max_length": 99}, "max_length was 2048, is 99"),
        ({"add_bos_token": False}, "options was {}, is {'add_bos_token': False}"),
        ({"gguf_file": "q4.gguf"}, "options was {}, is {'gguf_file': 'q4.gguf'}"),
    ],
)
def test_a_cache_of_another_run_is_refused(cached, docs, generation, options, differs):
    cached().generate_until(generation(docs[:1]))
    with pytest.raises(InputError, match=differs):
        cached(**options)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"max_batch_size": 8}, {"logits_cache": False}])
def test_a_cache_serves_other_batches(cached, docs, generation, options):
    cached().generate_until(generation(docs[:1]))
    cached(**options)


def test_a_cache_of_another_checkpoint_is_refused(cached, docs, generation, hypernetwork_dir, tmp_path, llm, tokenizer):
    from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, save_hypernetwork

    cached().generate_until(generation(docs[:1]))
    network = load_hypernetwork(hypernetwork_dir, llm, tokenizer)
    next(network.parameters()).data.add_(1e-3)
    save_hypernetwork(tmp_path / "other", network, llm, tokenizer, {})
    with pytest.raises(InputError, match="hypernetwork was"):
        cached(hypernetwork=str(tmp_path / "other"))


def test_a_cache_of_another_model_class_is_refused(cached, docs, generation, tmp_path):
    cached().dbdict.clear()
    cached().dbdict.clear()
    lm = cached()
    lm.dbdict.clear()
    lm.dbdict["some key"] = "some answer"
    with pytest.raises(InputError, match="filled by another model"):
        cached()


def test_other_passages_under_the_same_prompts_are_refused(cached, docs, generation):
    cached().generate_until(generation(docs))
    changed = copy.deepcopy(docs)
    changed[0]["ctxs"][0]["text"] += " And more."
    with pytest.raises(InputError, match="had other passages when the cache was filled"):
        cached().generate_until(generation(changed))


def test_one_prompt_with_two_sets_of_passages_is_refused(cached, make_doc, generation):
    with pytest.raises(InputError, match="two sets of passages"):
        cached().generate_until(generation([make_doc("who", 0), make_doc("who", 1)]))


def test_a_cache_grows(cached, docs, generation, make_lm):
    cached().generate_until(generation(docs[:2]))
    assert cached().generate_until(generation(docs)) == make_lm().generate_until(generation(docs))


@pytest.mark.parametrize("control", ["shuffled", "random", "constant"])
def test_controls_that_mix_questions_refuse_a_cache(cached, control):
    with pytest.raises(InputError, match="leave --use_cache out"):
        cached(passages=control)
