"""From passage strings to experts: tokenise, read the tokens' states off the LLM, generate in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.device_memory import available_memory
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert import Experts, Weights
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import find_layer
from genpoe_plugin.experts.states import hidden_states
from genpoe_plugin.language_model import embedding_table
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS

MOST = 128  # passages at a time


class ExpertGenerator:
    """A hypernetwork together with the LLM whose token states it reads.

    Args:
        hypernetwork: on the device of the LLM's embeddings.
        model: the frozen LLM, in evaluation mode; its embedding table is used, or the layers below the experts.
        tokenizer: the LLM's.

    Raises:
        InputError: the LLM lacks the layer whose states are to be read.
    """

    def __init__(self, hypernetwork: Hypernetwork, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.hypernetwork = hypernetwork
        self.model = model
        self.tokenizer = tokenizer
        self.contextual = hypernetwork.config.states == "contextual"
        if self.contextual:
            find_layer(model, hypernetwork.config.layer)
        with embedding_table(model) as table:
            self.device = table.device

    def embed(self, passages: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states ``[n, tokens, d]`` (float32, without gradients) and their mask ``[n, tokens]``.

        Passages longer than 256 tokens are cut. No special tokens are added to what is only looked up; where the LLM
        reads a passage it begins as the tokenizer begins any text, and the mask leaves those tokens out again.

        Raises:
            InputError: a passage has no tokens.
        """
        added = self.tokenizer.num_special_tokens_to_add() if self.contextual else 0
        rows = self.tokenizer(
            list(passages),
            add_special_tokens=self.contextual,
            truncation=True,
            max_length=MAX_PASSAGE_TOKENS + added,
            return_attention_mask=True,
            return_special_tokens_mask=True,
        )
        for number, special in enumerate(rows["special_tokens_mask"]):
            if all(special):
                raise InputError(f"passage {number} of {len(passages)} is empty; an expert needs text")
        ids = self._padded(rows["input_ids"], 0)
        mask = self._padded(rows["special_tokens_mask"], 1) == 0
        if self.contextual:
            real = self._padded(rows["attention_mask"], 0)
            states = hidden_states(self.model, self.hypernetwork.config.layer, ids, real).to(self.device)
        else:
            with torch.no_grad():
                states = self.model.get_input_embeddings()(ids)
        return states.float(), mask

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(self.device)

    def batch_size(self) -> int:
        """How many passages at a time a quarter of the free memory has room for; beyond `MOST` nothing is gained."""
        one = 2 * footprint(self.hypernetwork.config).expert_bytes
        # States as they are and normalised; a layer of the LLM, with its MLP, has about 16 times as many numbers.
        one += MAX_PASSAGE_TOKENS * self.hypernetwork.config.hidden_size * 4 * (20 if self.contextual else 4)
        return max(1, min(MOST, available_memory(str(self.device)) // 4 // one))

    def generate(self, passages: Sequence[str]) -> Experts:
        """One expert a passage, in the hypernetwork's dtype."""
        return self.hypernetwork(*self.embed(passages))

    def write(self, passages: Sequence[str], weights: Weights, rows: Tensor) -> None:
        """Generate experts into ``rows`` of ``weights``: see `Hypernetwork.write`."""
        self.hypernetwork.write(*self.embed(passages), weights, rows)
