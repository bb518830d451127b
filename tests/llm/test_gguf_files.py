"""LLMs whose weights and tokenizer are in a GGUF file, here a tiny Llama, unquantised: the very same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.llm import gguf_files
from genpoe_plugin.llm.empty_model import empty_model
from genpoe_plugin.llm.language_model import load_language_model, load_tokenizer
from tests.gguf_llm import write_gguf

TEXT = "Who wrote the opera about a barber? Zürich,  1792"


@pytest.fixture(scope="module")
def gguf_dir(tmp_path_factory, make_llm, tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / "tiny.gguf", make_llm("llama"), tokenizer)
    return directory


def test_weights_and_tokens_are_those_of_the_llm(gguf_dir, make_llm, tokenizer):
    loaded, its_tokenizer = load_language_model(str(gguf_dir), gguf_file="tiny.gguf")
    expected = make_llm("llama").state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert its_tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_begins_as_the_file_says(tmp_path, make_llm, tokenizer, adds_bos):
    write_gguf(tmp_path / "tiny.gguf", make_llm("llama"), tokenizer, adds_bos=adds_bos)
    ids = load_tokenizer(str(tmp_path), gguf_file="tiny.gguf")(TEXT)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == adds_bos
    assert ids[-1] == tokenizer(TEXT)["input_ids"][-1]


def test_shapes_are_those_of_the_directory_that_it_was(gguf_dir, llm_dir):
    def shapes(name: Path, **options: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        empty = empty_model(str(name), **options)
        return {name: (weight.shape, weight.dtype) for name, weight in empty.named_parameters()}

    assert shapes(gguf_dir, gguf_file="tiny.gguf") == shapes(llm_dir)
    assert shapes(gguf_dir, gguf_file="tiny.gguf", dtype="bfloat16") == shapes(llm_dir, dtype="bfloat16")


@pytest.mark.parametrize("load", [load_language_model, load_tokenizer, empty_model])
def test_no_such_file(gguf_dir, load):
    with pytest.raises(InputError, match=r"other\.gguf: no such file"):
        load(str(gguf_dir), gguf_file="other.gguf")


@pytest.mark.parametrize("load", [load_language_model, load_tokenizer, empty_model])
def test_no_gguf_file_at_all(tmp_path, load):
    (tmp_path / "x.gguf").write_bytes(b"no such thing" * 9)
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(tmp_path), gguf_file="x.gguf")


@pytest.mark.parametrize("load", [load_language_model, load_tokenizer, empty_model])
def test_without_the_package(gguf_dir, load, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(InputError, match=r"needs the package gguf; pip install"):
        load(str(gguf_dir), gguf_file="tiny.gguf")
