from __future__ import annotations

import sys

import pytest

from genpoe_plugin.errors import InputError
from genpoe_plugin.lm.hf import GenPoEArguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "magic"}, "mode=magic: not one of closed_book, rag, genpoe, genpoe_rag"),
        ({"mode": "rag", "gates": "hard"}, "gates=hard: not one of softmax, uniform"),
        (
            {"mode": "rag", "passages": "best"},
            "passages=best: not one of retrieved, gold, shuffled, random, constant, none",
        ),
        ({"mode": "rag", "num_passages": 0}, "num_passages=0: give a whole number of at least 1"),
        ({"mode": "rag", "num_retrieved": 0}, "num_retrieved=0: give a whole number of at least 1"),
        ({"mode": "rag", "num_passages": 2.5}, "num_passages=2.5: give a whole number of at least 1"),
        ({"mode": "rag", "num_passages": True}, "num_passages=True: give a whole number of at least 1"),
        ({"mode": "rag", "num_passages": 30}, "num_passages=30 is more than num_retrieved=20"),
        ({"mode": "rag", "seed": "x"}, "seed=x: give a whole number of at least 0"),
        ({"mode": "genpoe"}, "genpoe train hypernetwork"),
        ({"mode": "genpoe_rag"}, "genpoe train hypernetwork"),
        ({"mode": "rag", "index": "/no/such/index"}, "index=/no/such/index: no such directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, says):
    with pytest.raises(InputError) as error:
        GenPoEArguments(**arguments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_modes_ask_only_for_what_they_use():
    assert not GenPoEArguments(mode="closed_book", index="/no/such/index", reranker="x").needs_index
    assert not GenPoEArguments(mode="closed_book", passages="gold", reranker="x").needs_reranker
    assert GenPoEArguments(mode="rag", reranker="x").needs_reranker
    assert not GenPoEArguments(mode="rag", reranker="x", passages="random").needs_reranker


def test_the_model_checks_before_it_loads(make_lm):
    with pytest.raises(InputError, match="not one of"):
        make_lm("magic", pretrained="/no/such/llm")


def test_closed_book_loads_neither_index_nor_reranker_nor_hypernetwork(make_lm):
    lm = make_lm("closed_book", index="/no/such/index", reranker="/no/such", hypernetwork="/no/such")
    assert lm.store is None
    assert lm.pipeline.retriever is None and lm.pipeline.reranker is None


def test_a_missing_checkpoint(make_lm):
    with pytest.raises(InputError, match="/no/such/checkpoint"):
        make_lm(hypernetwork="/no/such/checkpoint")


def test_a_checkpoint_of_another_llm(make_lm, make_llm):
    with pytest.raises(InputError, match="was trained for"):
        make_lm(pretrained=make_llm("llama", seed=9))


def test_without_index_the_vector_library_is_not_even_imported(make_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "genpoe_plugin.retrieval.retriever", None)
    monkeypatch.setitem(sys.modules, "genpoe_plugin.selection.reranking", None)
    make_lm("rag")
