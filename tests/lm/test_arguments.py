from __future__ import annotations

import sys

import pytest

from genpoe_plugin.errors import InputError


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
