"""From passage strings to experts: tokenise, compute token states with the LLM, generate in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.device_memory import available_memory
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionShape
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.decoder import find_attention, find_beside_mlp, find_layer, find_query_projection
from genpoe_plugin.experts.expert import Experts, Weights
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.hypernetwork import Hypernetwork, unit_mask
from genpoe_plugin.experts.llm_states import hidden_states, keys_and_values
from genpoe_plugin.llm.language_model import embedding_table
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS, cut_passages, knowledge_block, paragraph

MAX_BATCH = 128  # passages
MAX_READ_BATCH_ON_CPU = 16  # passages that the LLM reads; activations of more do not fit the CPU's caches


class ExpertGenerator:
    """A hypernetwork and the LLM whose token states it reads.

    Args:
        hypernetwork: the hypernetwork, on the device of the LLM's embeddings.
        model: the frozen LLM, in evaluation mode. Only its embedding table, or its layers up to those with experts, is
            used.
        tokenizer: the LLM's tokenizer.

    Raises:
        InputError: the LLM has no such layer, or its dimensions or modules do not match the hypernetwork.
    """

    def __init__(self, hypernetwork: Hypernetwork, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.hypernetwork = hypernetwork
        self.model = model
        self.tokenizer = tokenizer
        # Stored here because distributed training wraps the hypernetwork in a module without ``config``.
        self.config = config = hypernetwork.config
        self.attention = config.head == "attention"
        self.contextual = config.states == "contextual" and not self.attention
        if self.contextual:
            find_layer(model, config.layer)
        if self.attention:
            _check_heads(model, config)
        with embedding_table(model) as table:
            self.device = table.device

    def embed(self, passages: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token states without gradients (see `Hypernetwork.forward`), and their mask ``[n, tokens]``.

        The states are embeddings or hidden states (float32). With the head ``attention`` they are the keys and values
        of all layers with experts and, if the head needs them, the hidden states that enter these layers (in the LLM's
        dtype). Passages are cut at 256 tokens. Embeddings are looked up without special tokens. If the LLM reads the
        passage, the tokenizer adds its special tokens, and the mask excludes them. For experts in the attention, the
        LLM reads the passage in its prompt layout (`HypernetworkConfig.layout`).

        Raises:
            InputError: a passage has no tokens.
        """
        ids, real, mask = self._tokens(passages)
        config = self.config
        if self.attention:
            return self._attention_states(ids, real), mask
        if self.contextual:
            return hidden_states(self.model, config.layer, ids, real).to(self.device).float(), mask
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids).float(), mask

    def units(self, passages: Sequence[str]) -> list[int]:
        """The number of units of each passage's expert.

        It is one, or with the head ``attention`` one per window of the passage's tokens in its prompt layout.

        Raises:
            InputError: a passage has no tokens.
        """
        if not self.attention:
            return [1] * len(passages)
        return [
            -(-special.count(0) // self.config.window) for special in self._tokenise(passages)["special_tokens_mask"]
        ]

    def _attention_states(self, ids: Tensor, real: Tensor) -> Tensor:
        config = self.config
        read = keys_and_values(self.model, config.layers, ids, real, hidden=config.reads_states)
        # The layers of a large LLM may be on several devices.
        here = {layer: (states.keys.to(self.device), states.values.to(self.device)) for layer, states in read.items()}
        units = AttentionShape.of(config).join(here)
        if not config.reads_states:
            return units
        hidden = [states.hidden.to(self.device) for states in read.values() if states.hidden is not None]
        return torch.cat([units.flatten(-2), *hidden], -1)

    def _tokenise(self, passages: Sequence[str]) -> BatchEncoding:
        added = self.contextual or self.attention
        texts, limit = list(passages), MAX_PASSAGE_TOKENS
        limit += self.tokenizer.num_special_tokens_to_add() if added else 0
        if self.attention:
            # Cut the passage before the prompt layout adds text to it.
            laid_out = paragraph if self.config.layout == "paragraph" else lambda text: knowledge_block([text])
            texts = [laid_out(text) if text else "" for text in cut_passages(texts, self.tokenizer)]
        rows = self.tokenizer(
            texts,
            add_special_tokens=added,
            truncation=not self.attention,
            max_length=None if self.attention else limit,
            return_attention_mask=True,
            return_special_tokens_mask=True,
        )
        for number, special in enumerate(rows["special_tokens_mask"]):
            if all(special):
                raise InputError(f"passage {number} of {len(passages)} is empty; an expert needs text")
        return rows

    def _tokens(self, passages: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, the mask of real tokens, and the mask of the passage's own tokens, each ``[n, tokens]``."""
        rows = self._tokenise(passages)
        real, special = self._padded(rows["attention_mask"], 0), self._padded(rows["special_tokens_mask"], 1)
        return self._padded(rows["input_ids"], 0), real, special == 0

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(self.device)

    def batch_size(self) -> int:
        """The number of passages per batch that fits a quarter of the free memory, at most `MAX_BATCH`."""
        passage_bytes = 2 * footprint(self.config).expert_bytes
        if self.attention:
            read = 4 * math.prod(self.hypernetwork.state_shape) if self.config.reads_states else 0
            passage_bytes = MAX_PASSAGE_TOKENS * (passage_bytes + read)
        # Token states and their normalised copy; a layer of the LLM, with its MLP, has about 16 times as many values.
        copies = 4 if not (self.contextual or self.attention) else 20
        passage_bytes += MAX_PASSAGE_TOKENS * self.config.hidden_size * 4 * copies
        limit = MAX_READ_BATCH_ON_CPU if self.attention and self.device.type == "cpu" else MAX_BATCH
        return max(1, min(limit, available_memory(str(self.device)) // 4 // passage_bytes))

    def generate_units(self, passages: Sequence[str]) -> tuple[Experts, list[list[int]]]:
        """The units of all experts, ``[units]`` in the hypernetwork's dtype, and the unit indices of each passage."""
        states, mask = self.embed(passages)
        experts = self.hypernetwork(states, mask)
        if not self.attention:
            return experts, [[number] for number in range(len(passages))]
        real = unit_mask(mask, self.config.window)
        ends = [0, *real.sum(1).cumsum(0).tolist()]
        return experts[real], [list(range(*pair)) for pair in pairwise(ends)]

    def write(self, passages: Sequence[str], weights: Weights, rows: Tensor) -> None:
        """Generate experts into ``rows`` of ``weights``; see `Hypernetwork.write`."""
        self.hypernetwork.write(*self.embed(passages), weights, rows)


def attention_dimensions(model: PreTrainedModel) -> dict[str, int]:
    """``num_heads``, ``num_kv_heads`` and ``head_width`` of an LLM, as in `HypernetworkConfig`.

    Raises:
        InputError: the layers differ in these numbers.
    """
    config = model.config.get_text_config()
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
    except ValueError as error:  # raised by transformers for an LLM whose layers differ
        name = type(model).__name__
        raise InputError(f"{name}: its layers have different heads, so attention experts cannot be added") from error
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_width": width}


def _check_heads(model: PreTrainedModel, config: HypernetworkConfig) -> None:
    for layer in config.layers:
        find_attention(model, layer)
        if config.query_rank is not None:
            find_query_projection(model, layer)
        if config.place == "mlp":
            find_beside_mlp(model, layer)
    for name, actual in attention_dimensions(model).items():
        if (configured := getattr(config, name)) != actual:
            raise InputError(f"hypernetwork {name} is {configured}, the LLM's is {actual}")
