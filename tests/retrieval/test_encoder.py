from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, BertTokenizer, DPRContextEncoder, DPRQuestionEncoder

from genpoe_plugin.errors import InputError
from genpoe_plugin.passages import Passage
from genpoe_plugin.retrieval.encoder import load_encoder

PASSAGES = [
    Passage("1", "Opera", "rossini wrote the barber"),
    Passage("2", "", "curie discovered radium and polonium"),
    Passage("3", "Long", "word " * 300),
    Passage("4", "A title of some length", "x"),
    Passage("5", "Opera", "ROSSINI wrote the barber again and again"),
]
QUESTIONS = ["who wrote the barber", "x", "word " * 300, "Who discovered RADIUM"]


def pair(directories: tuple[Path, Path]) -> str:
    return ",".join(map(str, directories))


def by_hand(model: torch.nn.Module, tokenizer: BertTokenizer, segments: list[str], type_of_text: int = 0) -> np.ndarray:
    """The [CLS] state of one text, without padding, from the BERT inside a DPR encoder."""
    ids = [tokenizer.encode(segment, add_special_tokens=False) for segment in segments]
    excess = sum(map(len, ids)) + 1 + len(ids) - 256
    if excess > 0:  # all texts here are longest in their last segment
        ids[-1] = ids[-1][:-excess]
    tokens, types = [tokenizer.cls_token_id], [0]
    for number, segment in enumerate(ids):
        tokens += [*segment, tokenizer.sep_token_id]
        types += [type_of_text if number else 0] * (len(segment) + 1)
    assert len(tokens) <= 256
    with torch.no_grad():
        states = model(torch.tensor([tokens]), token_type_ids=torch.tensor([types])).last_hidden_state
    return states[0, 0].numpy()


def test_dpr_vectors_are_raw_cls_states(dpr_pair: tuple[Path, Path]) -> None:
    encoder = load_encoder(pair(dpr_pair), batch_size=2)
    tokenizer = BertTokenizer.from_pretrained(dpr_pair[0])
    context = DPRContextEncoder.from_pretrained(dpr_pair[1]).ctx_encoder.bert_model.eval()
    question = DPRQuestionEncoder.from_pretrained(dpr_pair[0]).question_encoder.bert_model.eval()
    segments = [[passage.title, passage.text] if passage.title else [passage.text] for passage in PASSAGES]
    vectors = encoder.encode_passages(PASSAGES)
    assert vectors.dtype == np.float32 and vectors.shape == (5, encoder.dimension) == (5, 32)
    np.testing.assert_allclose(vectors, [by_hand(context, tokenizer, s) for s in segments], atol=2e-5)
    np.testing.assert_allclose(
        encoder.encode_questions(QUESTIONS), [by_hand(question, tokenizer, [q]) for q in QUESTIONS], atol=2e-5
    )
    assert np.abs(vectors[0] - by_hand(context, tokenizer, segments[0], type_of_text=1)).max() > 0.01


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_sentence_vectors_are_pooled_as_the_model_says(
    bert_dir: Path, make_sentence_encoder: Callable[..., Path], similarity: str
) -> None:
    prompts = {"query": "find ", "document": "text "}
    encoder = load_encoder(str(make_sentence_encoder(similarity_fn_name=similarity, prompts=prompts)), batch_size=2)
    model, tokenizer = BertModel.from_pretrained(bert_dir).eval(), BertTokenizer.from_pretrained(bert_dir)

    def expected(text: str) -> np.ndarray:
        with torch.no_grad():
            states = model(**tokenizer(text, truncation=True, max_length=40, return_tensors="pt")).last_hidden_state
        mean = states[0].mean(0).numpy()
        return mean / np.linalg.norm(mean) if similarity == "cosine" else mean

    passages = encoder.encode_passages(PASSAGES)
    assert passages.dtype == np.float32 and passages.shape == (5, encoder.dimension)
    np.testing.assert_allclose(passages, [expected(f"text {p.string}") for p in PASSAGES], atol=2e-5)
    np.testing.assert_allclose(
        encoder.encode_questions(QUESTIONS), [expected(f"find {q}") for q in QUESTIONS], atol=2e-5
    )


@pytest.fixture(params=["dpr", "sentence"])
def name(
    request: pytest.FixtureRequest, dpr_pair: tuple[Path, Path], make_sentence_encoder: Callable[..., Path]
) -> str:
    return pair(dpr_pair) if request.param == "dpr" else str(make_sentence_encoder())


def test_order_and_batch_size_do_not_matter(name: str) -> None:
    shuffled = random.Random(0).sample(range(5), 5)
    vectors = load_encoder(name, batch_size=1).encode_passages(PASSAGES)
    for batch_size in (2, 64):
        encoder = load_encoder(name, batch_size=batch_size)
        again = encoder.encode_passages([PASSAGES[i] for i in shuffled])
        np.testing.assert_allclose(again, vectors[shuffled], atol=2e-5)


def test_nothing_to_encode(name: str) -> None:
    encoder = load_encoder(name)
    assert encoder.encode_passages([]).shape == encoder.encode_questions([]).shape == (0, 32)


def copy(directories: tuple[Path, Path], target: Path) -> tuple[Path, Path]:
    question, context = (target / directory.name for directory in directories)
    shutil.copytree(directories[0], question)
    shutil.copytree(directories[1], context)
    return question, context


def test_fingerprint_is_of_the_content(dpr_pair: tuple[Path, Path], tmp_path: Path) -> None:
    fingerprint = load_encoder(pair(dpr_pair)).fingerprint
    copied = copy(dpr_pair, tmp_path)
    assert load_encoder(pair(copied)).fingerprint == fingerprint
    weights = load_file(copied[1] / "model.safetensors")
    torch.save(weights, copied[1] / "pytorch_model.bin")
    (copied[1] / "model.safetensors").unlink()
    assert load_encoder(pair(copied)).fingerprint == fingerprint


def change_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    next(iter(weights.values())).view(-1)[-1] += 1e-3
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_text(directory: Path, file: str, old: str, new: str) -> None:
    text = (directory / file).read_text()
    assert old in text
    (directory / file).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        lambda directory: change_text(directory, "config.json", '"num_attention_heads": 4', '"num_attention_heads": 2'),
        lambda directory: change_text(directory, "tokenizer_config.json", "true", "false"),
    ],
    ids=["weight", "heads", "tokenizer"],
)
def test_fingerprint_sees_a_change(dpr_pair: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None]) -> None:
    copied = copy(dpr_pair, tmp_path)
    change(copied[1])
    assert load_encoder(pair(copied)).fingerprint != load_encoder(pair(dpr_pair)).fingerprint


def test_fingerprint_sees_pooling_similarity_and_prompts(make_sentence_encoder: Callable[..., Path]) -> None:
    variants: list[dict] = [{}, {"pooling": "cls"}, {"similarity_fn_name": "dot"}, {"prompts": {"query": "q: "}}]
    fingerprints = [load_encoder(str(make_sentence_encoder(**variant))).fingerprint for variant in variants]
    assert len(set(fingerprints)) == len(variants)
    assert load_encoder(str(make_sentence_encoder())).fingerprint == fingerprints[0]


def test_name_of_a_directory_is_absolute(
    dpr_pair: tuple[Path, Path], make_sentence_encoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dpr_pair[0].parent)
    assert load_encoder("question, context").name == pair(dpr_pair)
    sentence = make_sentence_encoder()
    monkeypatch.chdir(sentence.parent)
    assert load_encoder(sentence.name).name == str(sentence)


def refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(name)
    assert "\n" not in str(caught.value)


def test_wrong_models_are_refused(
    dpr_pair: tuple[Path, Path], bert_dir: Path, make_sentence_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    question, context = dpr_pair
    refused(f"{context},{question}", "context: not a DPRQuestionEncoder .*in order")
    refused(f"{question},{question}", "question: not a DPRContextEncoder")
    refused(f"{question},{bert_dir}", "bert.*: not a DPRContextEncoder")
    refused(f"{question},{tmp_path / 'none'}", "none: cannot be loaded as a DPRContextEncoder")
    refused(str(context), "context: no sentence-transformers encoder .*QUESTION_ENCODER,CONTEXT_ENCODER")
    refused(str(bert_dir), "no sentence-transformers encoder")
    refused("no-such/encoder", "no-such/encoder: ")
    wide = tmp_path / "wide"
    torch.manual_seed(0)
    config = DPRContextEncoder.from_pretrained(context).config
    config.projection_dim = 16
    DPRContextEncoder(config).save_pretrained(wide)
    shutil.copy(context / "vocab.txt", wide)
    refused(f"{question},{wide}", "vectors of 32 and 16 numbers")


def test_truncated_weights_are_refused(
    dpr_pair: tuple[Path, Path], make_sentence_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    copied = copy(dpr_pair, tmp_path)
    sentence = make_sentence_encoder()
    for directory, name in [(copied[1], pair(copied)), (sentence, str(sentence))]:
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(name, f"{directory.name}: cannot be loaded")
