"""``gguf_file=`` among the model arguments: the same answers and scores as from the directory that the file was."""

from __future__ import annotations

import pytest

from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.llm.language_model import load_language_model
from genpoe_plugin.lm.hf import GenPoELM
from tests.gguf_llm import write_gguf


@pytest.fixture(scope="module")
def gguf_dir(tmp_path_factory, make_llm, tokenizer):
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / "tiny.gguf", make_llm("llama"), tokenizer)
    return directory


@pytest.mark.parametrize("mode", ["closed_book", "genpoe_rag"])
def test_same_answers_and_scores(
    mode, gguf_dir, llm_dir, llm, tokenizer, hypernetwork_dir, docs, generation, choices, tmp_path
):
    # The same hypernetwork for the LLM of the file, whose reader adds a word that is never met to the tokenizer.
    network = load_hypernetwork(hypernetwork_dir, llm, tokenizer)
    save_hypernetwork(tmp_path / "of-file", network, *load_language_model(str(gguf_dir), gguf_file="tiny.gguf"), {})
    options = {"mode": mode, "device": "cpu", "batch_size": 2}
    of_file = GenPoELM(str(gguf_dir), gguf_file="tiny.gguf", hypernetwork=str(tmp_path / "of-file"), **options)
    of_directory = GenPoELM(str(llm_dir), hypernetwork=str(hypernetwork_dir), **options)
    assert of_file.generate_until(generation(docs)) == of_directory.generate_until(generation(docs))
    assert of_file.loglikelihood(choices(docs)) == of_directory.loglikelihood(choices(docs))
    assert of_file.fingerprint["options"] == {"gguf_file": "tiny.gguf"}


def test_a_hypernetwork_of_another_llm_is_refused(hypernetwork_dir, make_llm, tokenizer, tmp_path):
    write_gguf(tmp_path / "other.gguf", make_llm("llama", seed=1), tokenizer)
    with pytest.raises(InputError, match="other embeddings"):
        GenPoELM(str(tmp_path), gguf_file="other.gguf", device="cpu", hypernetwork=str(hypernetwork_dir))


def test_no_such_file(gguf_dir):
    with pytest.raises(InputError, match=r"other\.gguf: no such file"):
        GenPoELM(str(gguf_dir), gguf_file="other.gguf", mode="closed_book")
