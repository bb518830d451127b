"""Reranker scores against the same sum done by hand, one pair at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.reranker_format import LIKELIHOOD
from genpoe_plugin.selection.reranking import DEFAULT_PROMPT, Reranker

PAIRS = [
    ("Who wrote the opera about a barber?", "Rossini: Gioachino Rossini was an Italian composer born in Pesaro."),
    ("Who wrote the opera about a barber?", "radium"),
    ("where?", "Marie Curie: Marie Curie discovered polonium and radium, and won two Nobel prizes. " * 3),
    ("東京", "The quick brown fox\njumps over the lazy dog; naïve façade, Zürich."),
    ("where?", "radium"),
]


@pytest.fixture(scope="module")
def llama(make_llm: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_llm("llama")


def by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]], prompt: str
) -> list[float]:
    """All positions' full logits of one unpadded sequence at a time."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scores = []
    for query, passage in pairs:
        pieces = [ids("A: " + query), ids("\n"), ids("B: " + passage), ids("\n"), ids(prompt)]
        row = [tokenizer.bos_token_id, *(token for piece in pieces for token in piece)]
        with torch.no_grad():
            scores.append(model(torch.tensor([row])).logits[0, -1, ids("Yes")[0]].item())
    return scores


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gpt_neox", "gpt2"])
def test_scores_are_the_yes_logit_of_the_pieces(
    make_llm: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    model = make_llm(family)
    scores = Reranker(model, tokenizer, batch_size=3).score(PAIRS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, by_hand(model, tokenizer, PAIRS, DEFAULT_PROMPT), atol=1e-5)


def likelihood_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> list[float]:
    """Sum of the log-probabilities of the query's tokens, one unpadded sequence at a time, in float64."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scores = []
    for query, passage in pairs:
        before = [tokenizer.bos_token_id, *ids(passage), *ids("\n\n"), *ids("Question:")]
        row = before + ids(" " + query)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        scores.append(sum(log_probabilities[at - 1, row[at]].item() for at in range(len(before), len(row))))
    return scores


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
def test_likelihoods_are_those_of_the_querys_tokens(
    make_llm: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    model = make_llm(family)
    scores = Reranker(model, tokenizer, format=LIKELIHOOD, batch_size=3).score(PAIRS)
    np.testing.assert_allclose(scores, likelihood_by_hand(model, tokenizer, PAIRS), rtol=1e-5, atol=1e-4)
    assert len(set(scores.round(2))) == len(PAIRS)


def test_only_the_passage_of_a_likelihood_is_cut(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    reranker = Reranker(llama, tokenizer, format=LIKELIHOOD, max_length=40)
    [row] = reranker.encode([("where is it?", "radium and polonium " * 20)])
    query = tokenizer(" where is it?", add_special_tokens=False)["input_ids"]
    assert len(row.ids) == 40 and row.ids[-len(query) :] == query and row.scored == len(query)


def test_the_first_token_of_all_is_not_scored(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = replace(LIKELIHOOD, pieces=("{passage}", "{query}"), bos=False)
    [row] = Reranker(llama, tokenizer, format=bare).encode([("where is it?", "")])
    assert row.scored == len(row.ids) - 1 > 0


def test_every_piece_is_tokenised_on_its_own(llama: PreTrainedModel) -> None:
    bpe = Tokenizer(models.BPE())  # Nothing keeps it from merging across lines.
    bpe.train_from_iterator(["A: who?\nB: radium\nYes?"] * 9, trainers.BpeTrainer(show_progress=False))
    merging = PreTrainedTokenizerFast(tokenizer_object=bpe)
    [row] = Reranker(llama, merging, prompt="Yes?").encode([("who?", "radium")])
    assert len(merging("A: who?\nB: radium\nYes?")["input_ids"]) == 1
    pieces = ["A: who?", "\n", "B: radium", "\n", "Yes?"]
    assert row.ids == [token for piece in pieces for token in merging(piece)["input_ids"]]


def test_only_the_passage_is_cut(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    reranker = Reranker(llama, tokenizer, prompt="Yes or No?", max_length=30)
    tail = ids("\n") + ids("Yes or No?")
    head = [tokenizer.bos_token_id, *ids("A: where?"), *ids("\n")]
    [row] = reranker.encode([("where?", "radium and polonium " * 20)])
    assert row.ids == (head + ids("B: " + "radium and polonium " * 20))[:30] + tail
    # A query that would leave nothing of the passage is cut itself, to 3/4.
    [row] = reranker.encode([("where is it " * 20, "radium and polonium " * 20)])
    head = [tokenizer.bos_token_id, *ids("A: " + "where is it " * 20)[:22], *ids("\n")]
    assert row.ids == (head + ids("B: " + "radium and polonium " * 20))[:30] + tail


def test_no_bos_where_the_tokenizer_pads_with_it_or_has_none(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    [with_bos] = Reranker(llama, tokenizer).encode(PAIRS[:1])
    for change in ({"bos_token": None}, {"pad_token": tokenizer.bos_token}):
        changed = PreTrainedTokenizerFast.from_pretrained(tmp_path, **change)
        [without] = Reranker(llama, changed).encode(PAIRS[:1])
        assert without.ids == with_bos.ids[1:]


words = st.text(alphabet="abc RaYo?\n", max_size=40)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), pairs=st.lists(st.tuples(words, words), min_size=1, max_size=9), batch_size=st.integers(1, 10))
def test_scores_do_not_depend_on_batch_or_order(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: st.DataObject,
    pairs: list[tuple[str, str]],
    batch_size: int,
) -> None:
    one_by_one = np.concatenate([Reranker(llama, tokenizer).score([pair]) for pair in pairs])
    order = data.draw(st.permutations(range(len(pairs))))
    shuffled = Reranker(llama, tokenizer, batch_size=batch_size).score([pairs[index] for index in order])
    np.testing.assert_allclose(shuffled, one_by_one[order], atol=1e-5)


def test_windows_do_not_show(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = Reranker(llama, tokenizer, batch_size=2)
    whole = reranker.score(PAIRS)
    monkeypatch.setattr("genpoe_plugin.selection.reranking.WINDOW", 3)
    np.testing.assert_allclose(reranker.score(PAIRS), whole, atol=1e-5)


def test_no_pairs(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert Reranker(llama, tokenizer).score([]).shape == (0,)


def test_batches_are_of_like_length(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    reranker = Reranker(llama, tokenizer, batch_size=4)
    widths: list[int] = []
    hook = llama.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    try:
        reranker.score([("where?", "radium " * (1 if index % 2 else 40)) for index in range(8)])
    finally:
        hook.remove()
    assert len(widths) == 2
    assert widths[1] < widths[0] - 30


def test_full_logits_are_never_made(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    shapes: list[torch.Size] = []
    hook = llama.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    try:
        Reranker(llama, tokenizer).score(PAIRS)
    finally:
        hook.remove()
    assert [shape[1] for shape in shapes] == [1]


def test_save_and_load_is_identity(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    reranker = Reranker(llama, tokenizer, prompt="Yes or No?", max_length=40)
    reranker.save(tmp_path / "a")
    loaded = Reranker.load(tmp_path / "a")
    assert (loaded.prompt, loaded.max_length) == ("Yes or No?", 40)
    assert np.array_equal(loaded.score(PAIRS), reranker.score(PAIRS))
    assert not list((tmp_path / "a").glob("*.bin"))
    overridden = Reranker.load(tmp_path / "a", prompt="Well?", max_length=20)
    assert (overridden.prompt, overridden.max_length) == ("Well?", 20)


def test_an_llm_without_settings_has_the_default_prompt(llm_dir: Path) -> None:
    assert Reranker.load(llm_dir, format="bge").prompt == DEFAULT_PROMPT


def test_fingerprint_is_of_content(llm_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llm_dir, tmp_path / "copy")
    fingerprint = Reranker.load(llm_dir, format="bge").fingerprint
    assert Reranker.load(copy, format="bge").fingerprint == fingerprint
    assert Reranker.load(copy, format="bge", prompt="Well?").fingerprint != fingerprint
    changed = Reranker.load(copy, format="bge")
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0] += 1e-3
    assert changed.fingerprint != fingerprint


def test_the_fingerprint_is_what_it_was_before_there_were_formats(llm_dir: Path) -> None:
    """Or response caches and result files of earlier versions would be refused."""
    reranker = Reranker.load(llm_dir, format="bge")
    config = reranker.model.config.to_dict()
    del config["_name_or_path"], config["transformers_version"]
    facts = [config, sorted(reranker.tokenizer.get_vocab().items()), DEFAULT_PROMPT, 512]
    expected = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in sorted(reranker.model.state_dict().items()):
        expected.update(name.encode() + weight.numpy().tobytes())
    assert reranker.fingerprint == expected.hexdigest()


def test_an_adapter_directory_scores_as_base_and_adapter(llm_dir: Path, tmp_path: Path) -> None:
    reranker = Reranker.load(llm_dir, format="bge")
    base_scores = reranker.score(PAIRS)
    torch.manual_seed(0)
    adapter = peft.get_peft_model(
        reranker.model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(str(tmp_path))
    reranker.save_text_side(tmp_path)
    scores = Reranker.load(tmp_path).score(PAIRS)
    assert np.abs(scores - base_scores).max() > 1e-2
    np.testing.assert_allclose(scores, reranker.score(PAIRS), atol=1e-5)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Reranker.load(tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere: no such directory" in one_line(error)


def test_truncated_weights(llm_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llm_dir, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError) as error:
        Reranker.load(copy, format="bge")
    assert str(copy) in one_line(error)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_incomplete_directory(llm_dir: Path, tmp_path: Path, name: str, content: str | None) -> None:
    copy = shutil.copytree(llm_dir, tmp_path / "copy")
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    with pytest.raises(InputError) as error:
        Reranker.load(copy, format="bge")
    assert str(copy) in one_line(error)


def test_not_a_causal_lm(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        Reranker.load(tmp_path, format="bge")
    assert "not a causal language model" in one_line(error)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"prompt": "Well?"})])
def test_broken_settings(llm_dir: Path, tmp_path: Path, content: str) -> None:
    copy = shutil.copytree(llm_dir, tmp_path / "copy")
    (copy / "reranker.json").write_text(content)
    with pytest.raises(InputError) as error:
        Reranker.load(copy)
    assert "reranker.json" in one_line(error)
