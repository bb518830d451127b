"""The options of a bi-encoder: the prompts before its texts, and how many dimensions of its vectors are kept."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
# Question and passage prompt by the name of the model, from the authors' model cards.
_FAMILIES = {
    r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?": ("query: ", "passage: "),
    r"multilingual-e5-large-instruct": (f"{_INSTRUCTION} ", ""),
    r"bge-(small|base|large)-en(-v1\.5)?": ("Represent this sentence for searching relevant passages: ", ""),
    r"bge-(small|base|large)-zh(-v1\.5)?": ("为这个句子生成表示以用于检索相关文章\uff1a", ""),
    r"qwen3-embedding-\d.*": (_INSTRUCTION, ""),
}


@dataclass(frozen=True)
class EncoderOptions:
    """How a sentence-transformers encoder is used. A DPR pair has no options.

    Attributes:
        question_prompt: text before every question; None for the checkpoint's own.
        passage_prompt: text before every passage; None for the checkpoint's own.
        dimensions: number of the first dimensions that are kept; None for all.
        library_prompts: whether prompts that are not given are those that sentence-transformers chooses, as in indexes
            from before there were options, and not those of the checkpoint or of its family (`family_prompts`).
    """

    question_prompt: str | None = None
    passage_prompt: str | None = None
    dimensions: int | None = None
    library_prompts: bool = False

    @property
    def manifest(self) -> dict[str, Any]:
        """The options for the manifest of shards or an index; `options_of` reads them."""
        return {name: value for name, value in asdict(self).items() if name != "library_prompts"}


DEFAULT_OPTIONS = EncoderOptions()


def family_prompts(name: str) -> tuple[str, str]:
    """Question and passage prompt of E5, BGE and Qwen3-Embedding models, by the last part of their names."""
    model = Path(name).name.lower()
    return next((prompts for pattern, prompts in _FAMILIES.items() if re.fullmatch(pattern, model)), ("", ""))


def options_of(manifest: dict[str, Any]) -> EncoderOptions:
    """The options in the manifest of shards or an index.

    One from before there were options has none: texts got the library's prompts, and vectors were kept whole.

    Raises:
        TypeError: the options are not valid.
    """
    if "encoder_options" not in manifest:
        return EncoderOptions(library_prompts=True)
    options = EncoderOptions(**manifest["encoder_options"])
    prompts = (options.question_prompt, options.passage_prompt)
    if not all(isinstance(prompt, str) for prompt in prompts) or not isinstance(options.dimensions, int | None):
        raise TypeError("prompts must be texts, and dimensions a number")
    return options


def in_words(name: str, fingerprint: str, options: EncoderOptions) -> str:
    """An encoder with its fingerprint and options, for error messages."""
    words = [
        fingerprint[:12],
        f"question prompt {options.question_prompt!r}" if options.question_prompt else "",
        f"passage prompt {options.passage_prompt!r}" if options.passage_prompt else "",
        f"{options.dimensions} dimensions" if options.dimensions else "",
    ]
    return f"{name} ({', '.join(filter(None, words))})"
