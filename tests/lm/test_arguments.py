from __future__ import annotations

import sys

import pytest

from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.reranker_format import BGE


def test_the_model_checks_before_it_loads(make_lm):
    with pytest.raises(InputError, match="not one of"):
        make_lm("magic", pretrained="/no/such/llm")


def test_closed_book_loads_neither_index_nor_reranker_nor_hypernetwork(make_lm):
    lm = make_lm("closed_book", index="/no/such/index", reranker="/no/such", hypernetwork="/no/such")
    assert lm.store is None
    assert lm.pipeline.retriever is None and lm.pipeline.reranker is None


def test_the_reranker_is_read_in_its_format(make_lm, llm_dir):
    options = {"mode": "rag", "reranker": str(llm_dir)}
    lm = make_lm(**options, reranker_format="bge")
    assert lm.pipeline.reranker.format == BGE and lm.fingerprint["reranker_format"] == "bge"
    with pytest.raises(InputError, match="a reranker of unknown format"):
        make_lm(**options).pipeline  # noqa: B018
    with pytest.raises(InputError, match=r"reranker_format=bge without a reranker"):
        make_lm("rag", reranker_format="bge")


def test_a_missing_checkpoint(make_lm):
    with pytest.raises(InputError, match="/no/such/checkpoint"):
        make_lm(hypernetwork="/no/such/checkpoint")


def test_a_checkpoint_of_another_llm(make_lm, make_llm):
    with pytest.raises(InputError, match="was trained for"):
        make_lm(pretrained=make_llm("llama", seed=9))


def test_without_index_the_vector_library_is_not_even_imported(make_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "genpoe_plugin.retrieval.retriever", None)
    monkeypatch.setitem(sys.modules, "genpoe_plugin.selection.reranking", None)
    monkeypatch.setitem(sys.modules, "genpoe_plugin.selection.rerankers", None)
    make_lm("rag")
