"""Prompts and cut of an encoder, against its own model and tokenizer; what an index keeps of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertModel, BertTokenizer

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.encoding import encode_shards, index_passages
from genpoe_plugin.indexing.shards import MANIFEST as SHARDS
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.encoder import load_encoder
from genpoe_plugin.retrieval.encoder_options import EncoderOptions, family_prompts, options_of
from genpoe_plugin.retrieval.index import MANIFEST, PassageIndex

PASSAGES = [Passage("1", "Opera", "rossini wrote the barber"), Passage("2", "", "curie discovered radium")]
QUESTIONS = ["who wrote the barber", "radium"]
WEB = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
BGE = "Represent this sentence for searching relevant passages: "


def by_hand(bert: Path, texts: list[str], dimensions: int = 32, normalised: bool = True) -> np.ndarray:
    model, tokenizer = BertModel.from_pretrained(bert).eval(), BertTokenizer.from_pretrained(bert)
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, truncation=True, max_length=40, return_tensors="pt")).last_hidden_state
        mean = states[0].mean(0).numpy()[:dimensions]
        vectors.append(mean / np.linalg.norm(mean) if normalised else mean)
    return np.array(vectors)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("intfloat/e5-base-v2", ("query: ", "passage: ")),
        ("intfloat/multilingual-e5-small", ("query: ", "passage: ")),
        ("intfloat/multilingual-e5-large-instruct", (f"{WEB} ", "")),
        ("BAAI/bge-large-en-v1.5", (BGE, "")),
        ("/models/bge-small-en", (BGE, "")),
        ("BAAI/bge-base-zh-v1.5", ("为这个句子生成表示以用于检索相关文章\uff1a", "")),
        ("Qwen/Qwen3-Embedding-0.6B", (WEB, "")),
        ("BAAI/bge-m3", ("", "")),
        ("someone/my-e5-base", ("", "")),
        ("sentence-transformers/all-MiniLM-L6-v2", ("", "")),
    ],
)
def test_prompts_of_the_families(name: str, expected: tuple[str, str]) -> None:
    assert family_prompts(name) == expected


@pytest.fixture
def e5(make_sentence_encoder: Callable[..., Path], tmp_path: Path) -> str:
    """An encoder with a name of E5's family and no prompts of its own."""
    return str(shutil.copytree(make_sentence_encoder(similarity_fn_name="cosine"), tmp_path / "e5-small-v2"))


def test_a_family_has_its_prompts_and_says_so(e5: str, bert_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_encoder(e5)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "e5-small-v2 has no prompts of its own" in record.message and "\n" not in record.message
    assert "'query: ' before questions, 'passage: ' before passages" in record.message
    close(encoder.encode_questions(QUESTIONS), by_hand(bert_dir, [f"query: {text}" for text in QUESTIONS]))
    close(encoder.encode_passages(PASSAGES), by_hand(bert_dir, [f"passage: {p.string}" for p in PASSAGES]))


def test_given_prompts_come_first(e5: str, bert_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_encoder(e5, options=EncoderOptions("find ", ""))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    close(encoder.encode_questions(QUESTIONS), by_hand(bert_dir, [f"find {text}" for text in QUESTIONS]))
    close(encoder.encode_passages(PASSAGES), by_hand(bert_dir, [p.string for p in PASSAGES]))
    one = load_encoder(e5, options=EncoderOptions(passage_prompt="text "))
    close(one.encode_questions(QUESTIONS), by_hand(bert_dir, [f"query: {text}" for text in QUESTIONS]))
    close(one.encode_passages(PASSAGES), by_hand(bert_dir, [f"text {p.string}" for p in PASSAGES]))


@pytest.mark.parametrize("name", ["document", "passage", "corpus"])
def test_the_checkpoints_own_prompts_come_before_those_of_its_family(
    make_sentence_encoder: Callable[..., Path],
    bert_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    own = make_sentence_encoder(similarity_fn_name="cosine", prompts={"query": "ask ", name: "told "})
    encoder = load_encoder(str(shutil.copytree(own, tmp_path / "e5-base")))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    close(encoder.encode_questions(QUESTIONS), by_hand(bert_dir, [f"ask {text}" for text in QUESTIONS]))
    close(encoder.encode_passages(PASSAGES), by_hand(bert_dir, [f"told {p.string}" for p in PASSAGES]))
    assert encoder.fingerprint == load_encoder(str(own)).fingerprint
    # As before there were options.
    before = load_encoder(str(own), options=EncoderOptions(library_prompts=True))
    library = SentenceTransformer(str(own), device="cpu")
    close(
        before.encode_passages(PASSAGES),
        library.encode_document([p.string for p in PASSAGES], normalize_embeddings=True),
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_first_dimensions_are_kept_and_normalised_again(
    make_sentence_encoder: Callable[..., Path], bert_dir: Path, similarity: str
) -> None:
    directory = str(make_sentence_encoder(similarity_fn_name=similarity))
    encoder = load_encoder(directory, options=EncoderOptions(dimensions=12))
    vectors = encoder.encode_passages(PASSAGES)
    assert vectors.shape == (2, 12) and encoder.dimension == 12 and vectors.flags.c_contiguous
    close(vectors, by_hand(bert_dir, [p.string for p in PASSAGES], 12, similarity == "cosine"))
    close(encoder.encode_questions(QUESTIONS), by_hand(bert_dir, QUESTIONS, 12, similarity == "cosine"))
    assert encoder.pooling == "mean, first 12 dimensions" + (", normalised" if similarity == "cosine" else "")
    assert (
        load_encoder(directory, options=EncoderOptions(dimensions=32)).fingerprint
        == load_encoder(directory).fingerprint
    )


def test_fingerprints_are_of_the_options(e5: str) -> None:
    options = [
        EncoderOptions(),
        EncoderOptions("", ""),
        EncoderOptions("query: ", "text: "),
        EncoderOptions("text: ", "passage: "),
        EncoderOptions(dimensions=12),
        EncoderOptions(dimensions=13),
    ]
    assert len({load_encoder(e5, options=one).fingerprint for one in options}) == len(options)
    given = EncoderOptions("query: ", "passage: ")
    assert load_encoder(e5, options=given).fingerprint == load_encoder(e5).fingerprint


def test_an_index_keeps_the_options_and_refuses_others(
    e5: str, bert_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = EncoderOptions("find ", "text ", 12)
    index_passages(PASSAGES, load_encoder(e5, options=options), tmp_path / "index", progress=False)
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    assert manifest["encoder_options"] == {"question_prompt": "find ", "passage_prompt": "text ", "dimensions": 12}
    assert manifest["dimension"] == 12
    retriever = DenseRetriever.load(tmp_path / "index")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    questions = by_hand(bert_dir, [f"find {text}" for text in QUESTIONS], 12)
    scores = questions @ by_hand(bert_dir, [f"text {p.string}" for p in PASSAGES], 12).T
    for question, found in zip(scores, retriever.retrieve(QUESTIONS, 2), strict=True):
        assert [item.passage.id for item in found] == [PASSAGES[row].id for row in np.argsort(-question)]
        np.testing.assert_allclose([item.score for item in found], np.sort(question)[::-1], atol=2e-5)
    moved = str(shutil.copytree(e5, tmp_path / "moved"))
    assert DenseRetriever.load(tmp_path / "index", encoder=moved).fingerprint == retriever.fingerprint
    for other in (EncoderOptions(), EncoderOptions("find ", "text "), EncoderOptions("ask ", "text ", 12)):
        with pytest.raises(InputError) as error:
            DenseRetriever(PassageIndex.load(tmp_path / "index"), load_encoder(e5, options=other))
        message = str(error.value)
        assert "question prompt 'find ', passage prompt 'text ', 12 dimensions), opened with" in message
        assert "\n" not in message


def without_options(directory: Path, file: str) -> None:
    """A manifest as it was written before there were options."""
    manifest = json.loads((directory / file).read_text())
    del manifest["encoder_options"]
    (directory / file).write_text(json.dumps(manifest))


def test_indexes_and_shards_from_before_have_no_prompts_of_a_family(
    e5: str, bert_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_encoder(e5, options=EncoderOptions(library_prompts=True))
    index_passages(PASSAGES, plain, tmp_path / "index", progress=False)
    encode_shards(PASSAGES, plain, tmp_path / "shards", progress=False)
    fingerprint = PassageIndex.load(tmp_path / "index").fingerprint
    without_options(tmp_path / "index", MANIFEST)
    without_options(tmp_path / "shards", SHARDS)
    retriever = DenseRetriever.load(tmp_path / "index")
    assert retriever.fingerprint == fingerprint
    close(retriever.encoder.encode_questions(QUESTIONS), by_hand(bert_dir, QUESTIONS))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert Shards.open(tmp_path / "shards").encoder_options == EncoderOptions(library_prompts=True)
    encode_shards(PASSAGES, plain, tmp_path / "shards", progress=False)
    with pytest.raises(InputError, match=r"created with encoder .*not encoder .*question prompt 'query: '") as error:
        encode_shards(PASSAGES, load_encoder(e5), tmp_path / "shards", progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        [],
        {"question_prompt": None, "passage_prompt": "", "dimensions": None},
        {"question_prompt": "", "passage_prompt": "", "dimensions": "12"},
        {"question_prompt": "", "prompts": ""},
    ],
)
def test_damaged_options(e5: str, tmp_path: Path, saved: object) -> None:
    encoder = load_encoder(e5)
    index_passages(PASSAGES, encoder, tmp_path / "index", progress=False)
    encode_shards(PASSAGES, encoder, tmp_path / "shards", progress=False)
    for path in (tmp_path / "index" / MANIFEST, tmp_path / "shards" / SHARDS):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"encoder_options": saved}))
    with pytest.raises(InputError, match=r"index.json: not a valid index manifest"):
        PassageIndex.load(tmp_path / "index")
    with pytest.raises(InputError, match=r"shards.json: damaged \(encoder_options\)"):
        Shards.open(tmp_path / "shards")


def test_a_dpr_pair_has_no_options(dpr_pair: tuple[Path, Path]) -> None:
    name = ",".join(map(str, dpr_pair))
    assert load_encoder(name, options=EncoderOptions("", "")).fingerprint == load_encoder(name).fingerprint
    assert options_of({"encoder_options": load_encoder(name).options.manifest}) == EncoderOptions("", "")
    for options in (EncoderOptions("query: "), EncoderOptions(passage_prompt="x"), EncoderOptions(dimensions=3)):
        with pytest.raises(InputError, match="a DPR pair has neither prompts nor dimensions") as error:
            load_encoder(name, options=options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dimensions", [33, 0, -1])
def test_dimensions_that_a_vector_does_not_have(e5: str, dimensions: int) -> None:
    with pytest.raises(InputError, match=rf"its vectors have 32 dimensions, not {dimensions}; give fewer"):
        load_encoder(e5, options=EncoderOptions(dimensions=dimensions))
