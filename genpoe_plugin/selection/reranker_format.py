"""The format of a decoder-LLM reranker: how the LLM reads a (query, passage) pair, and what the score is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genpoe_plugin.errors import InputError
from genpoe_plugin.json_text import read_json

PASSAGE, QUERY = "{passage}", "{query}"
_PLACES = re.compile(r"\{(query|passage|prompt)\}")


@dataclass(frozen=True)
class RerankerFormat:
    """How a decoder LLM reads a pair, and what the score is: logits at the last position, or the query's likelihood.

    Each piece is tokenised separately, so no token spans two pieces. The piece with the passage is cut at its end to
    fit ``max_length``; the pieces after it are never cut.

    Attributes:
        pieces: the pieces of the input. They may contain ``{query}``, ``{passage}`` and ``{prompt}``; one of them ends
            in ``{passage}``.
        yes: text whose first token's logit is the score. Without it, the score is the log-likelihood (in nats) of the
            tokens of the last piece, which contains ``{query}``, after all pieces before it.
        no: text whose first token's logit is subtracted from the score, if any.
        prompt: what ``{prompt}`` stands for.
        max_length: largest number of tokens of the input.
        bos: whether the input begins with the tokenizer's BOS, if it has one.
        counts_suffix: whether ``max_length`` counts the pieces after the passage.
        name: name of a built-in format.
    """

    pieces: tuple[str, ...]
    yes: str | None = None
    no: str | None = None
    prompt: str = ""
    max_length: int = 512
    bos: bool = True
    counts_suffix: bool = True
    name: str | None = None

    @property
    def passage_piece(self) -> int:
        """The number of the piece that ends in the passage, from 0."""
        return next(number for number, piece in enumerate(self.pieces) if PASSAGE in piece)

    def fill(self, piece: str, query: str, passage: str, prompt: str) -> str:
        """A piece with the texts in their places."""
        texts = {"query": query, "passage": passage, "prompt": prompt}
        return _PLACES.sub(lambda place: texts[place[1]], piece)

    @property
    def saved(self) -> str | dict[str, Any]:
        """The format as JSON: its name, or the content of a template file."""
        if self.name is not None:
            return self.name
        return {name: getattr(self, name) for name in TEMPLATE} | {"pieces": list(self.pieces)}


# FlagEmbedding's layout for bge-reranker-v2-gemma.
BGE = RerankerFormat(
    pieces=("A: {query}", "\n", "B: {passage}", "\n", "{prompt}"),
    yes="Yes",
    prompt=(
        "Given a query A and a passage B, determine whether the passage contains an answer to the query "
        "by providing a prediction of either 'Yes' or 'No'."
    ),
    counts_suffix=False,
    name="bge",
)
# The layout of the model cards of Qwen3-Reranker. Its middle is one piece because Qwen's tokenizer joins punctuation
# and a line break after it to one token.
QWEN3 = RerankerFormat(
    pieces=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        "<Instruct>: {prompt}\n<Query>: {query}\n<Document>: {passage}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    yes="yes",
    no="no",
    prompt="Given a web search query, retrieve relevant passages that answer the query",
    max_length=8192,
    bos=False,
    name="qwen3",
)
# Query likelihood (Sachan et al. 2022, "Improving passage retrieval with zero-shot question generation"). Since the
# score is log P(query | passage), a softmax over passages is the posterior of the passages under a uniform prior.
LIKELIHOOD = RerankerFormat(pieces=("{passage}", "\n\n", "Question:", " {query}"), name="likelihood")
FORMATS = {"bge": BGE, "qwen3": QWEN3, "likelihood": LIKELIHOOD}
"""The built-in formats, by name."""
CHOICES = f"{', '.join(FORMATS)} or a template file (JSON)"
TEMPLATE: dict[str, Any] = {
    "pieces": (list, tuple),
    "yes": (str, type(None)),
    "no": (str, type(None)),
    "max_length": int,
    "bos": bool,
}
"""The keys of a template file and the types of their values."""


def read_format(name: str) -> RerankerFormat:
    """A built-in format by its name, or that of a template file.

    A template file is a JSON object with the key ``pieces``, and if they differ from the defaults ``yes``, ``no``,
    ``max_length`` and ``bos``, with the meaning that they have in `RerankerFormat`.

    Raises:
        InputError: there is no such format and no such file, or the file is not a template.
    """
    if name in FORMATS:
        return FORMATS[name]
    if not (path := Path(name)).is_file():
        raise InputError(f"reranker format {name}: no such file; give {CHOICES}")
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: a reranker format must be a JSON file") from error
    return format_from(content, path)


def format_from(saved: Any, path: Path) -> RerankerFormat:
    """The format that `RerankerFormat.saved` wrote, or a template file's.

    Raises:
        InputError: it is not a format; the message names ``path``.
    """
    if isinstance(saved, str) and saved in FORMATS:
        return FORMATS[saved]
    if not isinstance(saved, dict) or not {"pieces"} <= saved.keys() <= TEMPLATE.keys():
        raise InputError(f"{path}: a reranker format has the key pieces, and if needed yes, no, max_length, bos")
    wrong = [name for name, value in saved.items() if not isinstance(value, TEMPLATE[name]) or value == ""]
    pieces = saved["pieces"]
    if wrong or not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise InputError(
            f"{path}: a wrong value of {wrong[0] if wrong else 'pieces'}; pieces is a list of texts, yes and no are "
            "texts, max_length is a number, bos is true or false"
        )
    whole = "\0".join(pieces)
    if whole.count(PASSAGE) != 1 or not any(piece.endswith(PASSAGE) for piece in pieces) or QUERY not in whole:
        raise InputError(f"{path}: pieces must contain {QUERY}, and {PASSAGE} once, at the end of a piece")
    if saved.get("yes") is None and (QUERY not in pieces[-1] or PASSAGE in pieces[-1] or saved.get("no") is not None):
        raise InputError(
            f"{path}: without yes, the score is the likelihood of the last piece, which must contain {QUERY} but not "
            f"{PASSAGE}, and there is no no"
        )
    return RerankerFormat(**{**saved, "pieces": tuple(pieces)})
