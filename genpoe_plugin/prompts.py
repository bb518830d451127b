"""Build the prompts of the four modes, and find the token where the question begins.

Experts act on the question's first token and on all tokens after it. The index of this token comes from the tokenizer's
character offsets, never from the length of a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("closed_book", "rag", "genpoe", "genpoe_rag")
PROMPT_MODES = ("rag", "genpoe_rag")
"""The modes whose prompts contain the passages."""
EXPERT_MODES = ("genpoe", "genpoe_rag")
"""The modes that turn passages into experts."""
MAX_PASSAGE_TOKENS = 256
MAX_NEW_TOKENS, STOP = 32, "\nQuestion:"
"""Largest number of tokens of an answer, and the string that ends it, because some LLMs continue with a question.

The tasks have the same values.
"""

_LABEL = re.compile(r"(?<!\w)[A-Za-z]{1,16}:\s?$")
_QUERY_WORDS = 100


def normalise_question(question: str) -> str:
    """Capitalise the first letter of a question and add a missing question mark."""
    question = question.strip()
    question = question[:1].upper() + question[1:]
    return question if question.endswith("?") else question + "?"


def closed_book_prompt(question: str) -> str:
    """The prompt without passages."""
    return f"Question: {normalise_question(question)}\nAnswer:"


def rag_prompt(question: str, passages: Sequence[str]) -> str:
    """A block with the passages, followed by the closed-book prompt; without passages, the closed-book prompt alone."""
    return knowledge_block(passages) + closed_book_prompt(question)


def knowledge_block(passages: Sequence[str]) -> str:
    """The line ``Knowledge:`` and one line per passage; empty without passages."""
    return "".join(f"{line}\n" for line in ("Knowledge:", *passages)) if passages else ""


def paragraph(passage: str) -> str:
    """The passage followed by an empty line."""
    return f"{passage}\n\n"


def cut_passages(
    passages: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int = MAX_PASSAGE_TOKENS
) -> list[str]:
    """Cut every passage to at most ``limit`` tokens."""
    if not passages:
        return []
    offsets = tokenizer(list(passages), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        passage if len(tokens) <= limit else passage[: tokens[limit][0]].rstrip()
        for passage, tokens in zip(passages, offsets, strict=True)
    ]


def first_token_at(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """The index of the first token that overlaps the text from ``character`` on; ``len(offsets)`` if there is none.

    Args:
        offsets: the begin and end character of each token. Special tokens have empty ranges and are skipped.
        character: index of a character.
    """
    return next((i for i, (begin, end) in enumerate(offsets) if end > max(begin, character)), len(offsets))


def tokens_from(text: str, character: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of ``text`` from the first one that overlaps ``text[character:]`` to the last.

    A position counted from the end stays correct if a BOS token is added or tokens are truncated on the left.
    """
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return len(offsets) - first_token_at(offsets, character)


def last_question(context: str, bos: str | None = None) -> str:
    """Extract a retrieval query from a prompt: the line after the last ``Question:``, otherwise the last 100 words."""
    _, label, rest = context.rpartition("Question:")
    question = rest.strip().partition("\n")[0].strip() if label else ""
    return question or " ".join(context[_bos_length(context, bos) :].split()[-_QUERY_WORDS:])


def find_question(context: str, question: str | None, bos: str | None = None) -> int:
    """Find the character where the current question begins in a prompt with few-shot examples or a chat template.

    The first of these that exists:

    1. the last ``Question: {question}``, with the question normalised or unchanged;
    2. the last occurrence of the question's text, or of a short label such as ``Q: `` directly before it;
    3. the last ``Question:``;
    4. the beginning of the context, after the string ``bos`` if the context begins with it.
    """
    question = (question or "").strip()
    if question:
        forms = (normalise_question(question), question)
        position = max(context.rfind(f"Question: {form}") for form in forms)
        if position >= 0:
            return position
        position = max(context.rfind(form) for form in forms)
        if position >= 0:
            label = _LABEL.search(context, max(0, position - 20), position)
            return label.start() if label else position
    position = context.rfind("Question:")
    return position if position >= 0 else _bos_length(context, bos)


def _bos_length(context: str, bos: str | None) -> int:
    return len(bos) if bos and context.startswith(bos) else 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that may contain passages.

    Attributes:
        text: the whole prompt.
        passages: number of passages in it; these are the best ones.
        question_at: index of the character where the question begins; None if no passage is before it. Experts then
            act on the whole prompt.
    """

    text: str
    passages: int = 0
    question_at: int | None = None


def with_knowledge(
    context: str,
    question: str | None,
    passages: Sequence[str],
    *,
    fits: Callable[[str], bool],
    bos: str | None = None,
) -> Prompt:
    """Insert passages directly before the question of a prompt, as many of the best ones as fit.

    Args:
        context: the prompt without passages. An empty one, as for the unconditional score of a choice, stays empty.
        question: the question; None if it is unknown.
        passages: the passages, best first.
        fits: whether a prompt is short enough.
        bos: the string of the BOS token.
    """
    if not context.strip():
        return Prompt(context)
    position = find_question(context, question, bos)
    for count in range(len(passages), 0, -1):
        knowledge = knowledge_block(passages[:count])
        text = context[:position] + knowledge + context[position:]
        if fits(text):
            return Prompt(text, count, position + len(knowledge))
    return Prompt(context)


def in_mode(
    mode: str,
    context: str,
    question: str | None,
    passages: Sequence[str],
    *,
    fits: Callable[[str], bool],
    bos: str | None = None,
) -> Prompt:
    """The prompt of a mode: with passages in it, by `with_knowledge`, or the context unchanged."""
    if mode not in PROMPT_MODES:
        return Prompt(context)
    return with_knowledge(context, question, passages, fits=fits, bos=bos)


def expert_start(question_at: int | None, text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The index of the first token that the experts act on.

    It is counted from the end, so it is also correct with a BOS token or after truncation on the left.

    Args:
        question_at: index of the character where the question begins; None for 0.
        text: the prompt. Leave out white space at its end that is tokenized with the continuation.
        tokens: number of tokens up to the end of ``text``, after any truncation.
        tokenizer: tokenizer of the LLM.
    """
    return 0 if question_at is None else max(0, tokens - tokens_from(text, question_at, tokenizer))
