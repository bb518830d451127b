"""A random Llama, a tokenizer with one token per word, and random texts. The LLM never ends an answer by itself."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 16_000
END, NEWLINE = "</s>", "\n"
MARKS = ("<unk>", END, NEWLINE, "Question:", "Answer:", "Knowledge:", "Who", "?")


def random_llm(
    width: int,
    layers: int,
    *,
    head_width: int = 64,
    kv_heads: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random LLM (100 million parameters for a width of 768 and 12 layers) and its tokenizer; equal in every process.

    The embeddings of end of text and newline are zero. So are their logits, because embeddings are tied. One of the
    other 16,000 logits is always larger, so every answer has the maximum number of tokens.
    """
    vocabulary = {word: number for number, word in enumerate([*MARKS, *(f"w{number}" for number in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(NEWLINE, "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token=END, pad_token=END, padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        num_key_value_heads=kv_heads or width // head_width,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    # Created in the final dtype and on the final device: float32 would need twice the memory first.
    with torch.random.fork_rng(devices=[]), torch.device(device), default_dtype(dtype):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[[vocabulary[END], vocabulary[NEWLINE]]] = 0
    return model, tokenizer


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_text(rng: random.Random, words: int) -> str:
    """``words`` uniformly random words of one token each."""
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(words))
