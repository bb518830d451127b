from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, BertTokenizer, DPRContextEncoder, DPRQuestionEncoder

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
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


def as_published(directory: Path, target: Path, tokenizer_class: str | None) -> Path:
    """A DPR encoder in the form of facebook/dpr-*: a pickle of weights, two more of them than the model has and the
    positions that old versions stored, and a tokenizer whose class is named seldom."""
    target.mkdir(parents=True)
    shutil.copy(directory / "config.json", target)
    shutil.copy(directory / "vocab.txt", target)
    named = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (target / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512} | named))
    weights = load_file(directory / "model.safetensors")
    prefix = next(iter(weights)).split("embeddings")[0]
    weights[f"{prefix}pooler.dense.weight"] = torch.ones(32, 32)
    weights[f"{prefix}pooler.dense.bias"] = torch.ones(32)
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(weights, target / "pytorch_model.bin")
    return target


@pytest.mark.parametrize(
    ("family", "tokenizers"),
    [
        ("single-nq", (None, None)),
        ("multiset", ("DPRQuestionEncoderTokenizer", "DPRContextEncoderTokenizer")),
    ],
)
def test_published_dpr_encoders_give_transformers_own_vectors(
    dpr_pair: tuple[Path, Path], tmp_path: Path, family: str, tokenizers: tuple[str | None, str | None]
) -> None:
    names = (f"dpr-question_encoder-{family}-base", f"dpr-ctx_encoder-{family}-base")
    published = [as_published(d, tmp_path / n, t) for d, n, t in zip(dpr_pair, names, tokenizers, strict=True)]
    encoder = load_encoder(",".join(map(str, published)), batch_size=3)
    assert encoder.fingerprint == load_encoder(pair(dpr_pair)).fingerprint
    tokenizer = BertTokenizer(str(dpr_pair[0] / "vocab.txt"), do_lower_case=True)
    models = DPRQuestionEncoder.from_pretrained(dpr_pair[0]), DPRContextEncoder.from_pretrained(dpr_pair[1])
    texts = [[(q,) for q in QUESTIONS], [(p.title, p.text) if p.title else (p.text,) for p in PASSAGES]]
    found = [encoder.encode_questions(QUESTIONS), encoder.encode_passages(PASSAGES)]
    for model, rows, vectors in zip(models, texts, found, strict=True):
        for row, vector in zip(rows, vectors, strict=True):
            inputs = tokenizer(*row, truncation=True, max_length=256, return_tensors="pt")
            with torch.no_grad():  # without token types, the model takes zeros
                wanted = model.eval()(inputs["input_ids"]).pooler_output[0]
            np.testing.assert_allclose(vector, wanted.numpy(), atol=2e-5)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(name: str, dtype: str) -> None:
    single, half = load_encoder(name), load_encoder(name, dtype=dtype)
    assert (single.precision, half.precision) == ("float32", dtype)
    assert half.fingerprint == single.fingerprint and half.pooling == single.pooling
    exact, rounded = single.encode_passages(PASSAGES), half.encode_passages(PASSAGES)
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < (0.01 if dtype == "float16" else 0.1)
    error = np.linalg.norm(half.encode_questions(QUESTIONS) - single.encode_questions(QUESTIONS))
    assert 0 < error < 0.1 * np.linalg.norm(single.encode_questions(QUESTIONS))
    with pytest.raises(InputError, match=r"dtype int8: .*float32, float16, bfloat16"):
        load_encoder(name, dtype="int8")


def test_normalised_in_single_precision(make_sentence_encoder: Callable[..., Path]) -> None:
    encoder = load_encoder(str(make_sentence_encoder(similarity_fn_name="cosine")), dtype="bfloat16")
    np.testing.assert_allclose(np.linalg.norm(encoder.encode_passages(PASSAGES), axis=1), 1, rtol=1e-6)


def test_pooling_in_words(dpr_pair: tuple[Path, Path], make_sentence_encoder: Callable[..., Path]) -> None:
    assert load_encoder(pair(dpr_pair)).pooling == "state of [CLS]"
    assert load_encoder(str(make_sentence_encoder(similarity_fn_name="cosine"))).pooling == "mean, normalised"
    assert load_encoder(str(make_sentence_encoder("cls", similarity_fn_name="dot"))).pooling == "cls"


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
    refused(f"{question},{wide}", "dimensions 32 and 16")


def test_truncated_weights_are_refused(
    dpr_pair: tuple[Path, Path], make_sentence_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    copied = copy(dpr_pair, tmp_path)
    sentence = make_sentence_encoder()
    for directory, name in [(copied[1], pair(copied)), (sentence, str(sentence))]:
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(name, f"{directory.name}: cannot be loaded")
