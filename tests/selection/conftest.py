"""Tiny rerankers made on the spot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

from tests.conftest import SENTENCES

# Qwen's: a line break after punctuation belongs to it.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
QWEN_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen's: no BOS, ``?`` and a line break are one token, and so are ``yes`` and ``no``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [*SENTENCES, *["yes", "no", "Who?\n<Document>: yes"] * 9]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )


@pytest.fixture(scope="session")
def qwen_dir(
    tmp_path_factory: pytest.TempPathFactory,
    make_llm: Callable[..., PreTrainedModel],
    qwen_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A directory with the name of a Qwen3-Reranker."""
    directory = tmp_path_factory.mktemp("qwen") / "Qwen3-Reranker-0.6B"
    make_llm("qwen3", vocab_size=len(qwen_tokenizer), pad_token_id=0, eos_token_id=2).save_pretrained(directory)
    qwen_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pair_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around and between the texts of a pair."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


@pytest.fixture(scope="session")
def make_cross_encoder(
    tmp_path_factory: pytest.TempPathFactory, pair_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """``make_cross_encoder(family, num_labels=1)``: a directory with an encoder and its classification head."""
    configs = {"bert": BertConfig, "xlm-roberta": XLMRobertaConfig, "modernbert": ModernBertConfig}

    def make(family: str, num_labels: int = 1) -> Path:
        directory = tmp_path_factory.mktemp(family)
        config = configs[family](
            vocab_size=len(pair_tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=140,
            initializer_range=0.3,
            pad_token_id=pair_tokenizer.pad_token_id,
            bos_token_id=pair_tokenizer.bos_token_id,
            eos_token_id=pair_tokenizer.eos_token_id,
            cls_token_id=pair_tokenizer.bos_token_id,
            sep_token_id=pair_tokenizer.eos_token_id,
            num_labels=num_labels,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
        pair_tokenizer.save_pretrained(directory)
        return directory

    return make
