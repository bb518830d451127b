"""From passage strings to experts: tokenise, embed with the LLM's own table, generate in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert import Experts
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.language_model import embedding_table
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS


class ExpertGenerator:
    """A hypernetwork together with the LLM whose embeddings it reads.

    Args:
        hypernetwork: on the device of the LLM's embeddings.
        model: the frozen LLM; only its embedding table is used.
        tokenizer: the LLM's.
    """

    def __init__(self, hypernetwork: Hypernetwork, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.hypernetwork = hypernetwork
        self.embed_tokens = model.get_input_embeddings()
        with embedding_table(model) as table:
            self.device = table.device
        self.tokenizer = tokenizer

    def embed(self, passages: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings ``[n, tokens, d]`` (float32) and their mask ``[n, tokens]``.

        Passages longer than 256 tokens are cut; no special tokens are added.

        Raises:
            InputError: a passage has no tokens.
        """
        rows = self.tokenizer(list(passages), add_special_tokens=False, truncation=True, max_length=MAX_PASSAGE_TOKENS)
        lengths = [len(row) for row in rows["input_ids"]]
        if 0 in lengths:
            raise InputError(f"passage {lengths.index(0)} of {len(lengths)} is empty; an expert needs text")
        width = max(lengths)
        device = self.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows["input_ids"]], device=device)
        mask = torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
        with torch.no_grad():
            return self.embed_tokens(ids).float(), mask

    def generate(self, passages: Sequence[str]) -> Experts:
        """One expert a passage, in the hypernetwork's dtype."""
        return self.hypernetwork(*self.embed(passages))
