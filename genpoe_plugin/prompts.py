"""The prompts of the four modes, and where in them the question begins.

A position in a prompt is found from token offsets, never from the lengths of strings: experts see the question's first
token and everything after it, and nothing before.
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
"""At most how many tokens an answer has, and what ends it, in the tasks as well: some LLMs go on with a question."""

_LABEL = re.compile(r"(?<!\w)[A-Za-z]{1,16}:\s?$")
_QUERY_WORDS = 100


def normalise_question(question: str) -> str:
    """The question as prompts show it: first letter capitalised, ``?`` ensured. Applying it twice changes nothing."""
    question = question.strip()
    question = question[:1].upper() + question[1:]
    return question if question.endswith("?") else question + "?"


def closed_book_prompt(question: str) -> str:
    return f"Question: {normalise_question(question)}\nAnswer:"


def rag_prompt(question: str, passages: Sequence[str]) -> str:
    """The closed-book prompt after a ``Knowledge:`` block with ``passages``, best first; alone if there are none."""
    return knowledge_block(passages) + closed_book_prompt(question)


def knowledge_block(passages: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in ("Knowledge:", *passages)) if passages else ""


def paragraph(passage: str) -> str:
    """The passage by itself, with an empty line behind it."""
    return f"{passage}\n\n"


def cut_passages(
    passages: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int = MAX_PASSAGE_TOKENS
) -> list[str]:
    """Cut every passage string to at most ``limit`` tokens, at the beginning of the first token that is too many."""
    if not passages:
        return []
    offsets = tokenizer(list(passages), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        passage if len(tokens) <= limit else passage[: tokens[limit][0]].rstrip()
        for passage, tokens in zip(passages, offsets, strict=True)
    ]


def first_token_at(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the first token that overlaps the text from ``character`` on; ``len(offsets)`` if none does.

    ``offsets`` are the (begin, end) characters of each token; special tokens have empty ones and are passed over.
    """
    return next((i for i, (begin, end) in enumerate(offsets) if end > max(begin, character)), len(offsets))


def tokens_from(text: str, character: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of ``text`` there are from the first one that overlaps ``text[character:]`` to the last.

    Counted from the end, the place stays right whether or not a BOS token or tokens cut off on the left come before.
    """
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return len(offsets) - first_token_at(offsets, character)


def last_question(context: str, bos: str | None = None) -> str:
    """The retrieval query that a rendered context holds: the line after its last ``Question:``, else its last words."""
    _, label, rest = context.rpartition("Question:")
    question = rest.strip().partition("\n")[0].strip() if label else ""
    return question or " ".join(context[_bos_length(context, bos) :].split()[-_QUERY_WORDS:])


def find_question(context: str, question: str | None, bos: str | None = None) -> int:
    """The character of a rendered context (few-shot examples, chat template) where the task's own question begins.

    That is the last ``Question: {question}``, normalised or as it is; else the last place of the question's text,
    with a short label directly before it (``Q: ``); else the last ``Question:``; else the beginning of the context,
    after a ``bos`` string that it may begin with.
    """
    question = (question or "").strip()
    if question:
        forms = (normalise_question(question), question)
        place = max(context.rfind(f"Question: {form}") for form in forms)
        if place >= 0:
            return place
        place = max(context.rfind(form) for form in forms)
        if place >= 0:
            label = _LABEL.search(context, max(0, place - 20), place)
            return label.start() if label else place
    place = context.rfind("Question:")
    return place if place >= 0 else _bos_length(context, bos)


def _bos_length(context: str, bos: str | None) -> int:
    return len(bos) if bos and context.startswith(bos) else 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with passages put into it.

    text: the whole prompt; passages: how many are in it, best first; question_at: the character where the question
    part begins, None where no passage stands before it (experts then see the prompt from its first token on).
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
    """Put ``passages`` right before the question of ``context``, leaving out the worst (last) until the prompt fits.

    An empty context (the unconditional score of a choice) stays empty.
    """
    if not context.strip():
        return Prompt(context)
    place = find_question(context, question, bos)
    for count in range(len(passages), 0, -1):
        knowledge = knowledge_block(passages[:count])
        text = context[:place] + knowledge + context[place:]
        if fits(text):
            return Prompt(text, count, place + len(knowledge))
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
    """What the LLM reads in a mode: the context as it is, or with the best passages in it (see `with_knowledge`)."""
    if mode not in PROMPT_MODES:
        return Prompt(context)
    return with_knowledge(context, question, passages, fits=fits, bos=bos)


def expert_start(question_at: int | None, text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token that sees the experts, of a prompt whose first ``tokens`` tokens end where ``text`` does.

    Counted from the end, so it does not matter what is before: BOS, or what left truncation took away.

    Args:
        question_at: of the `Prompt`.
        text: the prompt, without white space at its end where that became part of what follows.
    """
    return 0 if question_at is None else max(0, tokens - tokens_from(text, question_at, tokenizer))
