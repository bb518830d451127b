"""Tiny encoders made on the spot, and one of fixed vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.retrieval.encoder_options import EncoderOptions

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}


class FixedEncoder:
    """An encoder whose vectors are given, by passage id and by question."""

    name, fingerprint, precision, pooling = "fixed", "fixed-fingerprint", "float32", "none"
    options = EncoderOptions("", "")

    def __init__(self, passages: dict[str, np.ndarray], questions: dict[str, np.ndarray] | None = None) -> None:
        self.passages, self.questions = passages, questions or {}
        self.dimension = len(next(iter(passages.values())))

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        return np.array([self.passages[passage.id] for passage in passages], np.float32)

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        return np.array([self.questions[question] for question in questions], np.float32)


@pytest.fixture(scope="session")
def fixed_corpus() -> Callable[..., tuple[list[Passage], FixedEncoder]]:
    """``fixed_corpus(vectors)``: a passage for each vector, in their order, and the encoder that gives them."""

    def make(vectors: np.ndarray) -> tuple[list[Passage], FixedEncoder]:
        passages = [Passage(f"p{row}", f"title {row}", f"text of {row}") for row in range(len(vectors))]
        return passages, FixedEncoder({passage.id: vector for passage, vector in zip(passages, vectors, strict=True)})

    return make


def add_tokenizer(directory: Path) -> None:
    """The files that a BERT checkpoint of the hub has."""
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    settings = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def dpr_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a question and of a context encoder."""
    directory = tmp_path_factory.mktemp("dpr")
    for seed, (name, model) in enumerate({"question": DPRQuestionEncoder, "context": DPRContextEncoder}.items()):
        torch.manual_seed(seed)
        model(DPRConfig(**SIZES)).save_pretrained(directory / name)
        add_tokenizer(directory / name)
    return directory / "question", directory / "context"


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain BERT, which is no bi-encoder yet."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(2)
    BertModel(BertConfig(**SIZES)).save_pretrained(directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def make_sentence_encoder(bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_sentence_encoder(pooling="mean", **settings)``: a sentence-transformers directory over ``bert_dir``."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def make(pooling: str = "mean", **settings: object) -> Path:
        directory = tmp_path_factory.mktemp("sentence")
        modules = [Transformer(str(bert_dir), max_seq_length=40), Pooling(SIZES["hidden_size"], pooling_mode=pooling)]
        SentenceTransformer(modules=modules, device="cpu", **settings).save(str(directory))
        return directory

    return make
