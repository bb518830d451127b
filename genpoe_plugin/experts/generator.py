"""From passage strings to experts: tokenise, read the tokens' states off the LLM, generate in batches."""

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
from genpoe_plugin.experts.states import hidden_states, keys_and_values
from genpoe_plugin.llm.language_model import embedding_table
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS, cut_passages, knowledge_block, paragraph

MOST = 128  # passages at a time
MOST_READ_ON_CPU = 16  # by the LLM; what its layers compute for more leaves the CPU's caches


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
        # Here, for what is trained in several processes is wrapped by something without it.
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

        The states are embeddings or hidden states (float32), or with the head ``attention`` the keys and values of all
        its layers, and where it is trained the hidden states that enter them (in the LLM's dtype). Passages longer than
        256 tokens are cut. No special tokens are added to what is only looked up; where the LLM reads a passage it
        begins as the tokenizer begins any text, and the mask leaves those tokens out again. For experts in the
        attention, the LLM reads a passage as it would stand in the prompt.

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
        """How many units the expert of each passage has: one, or with the head ``attention`` one for each window of the
        tokens that it has in the prompt.

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
        # Each layer of a large LLM may be on a device of its own.
        own = {layer: (states.keys.to(self.device), states.values.to(self.device)) for layer, states in read.items()}
        units = AttentionShape.of(config).join(own)
        if not config.reads_states:
            return units
        hidden = [states.hidden.to(self.device) for states in read.values() if states.hidden is not None]
        return torch.cat([units.flatten(-2), *hidden], -1)

    def _tokenise(self, passages: Sequence[str]) -> BatchEncoding:
        added = self.contextual or self.attention
        texts, limit = list(passages), MAX_PASSAGE_TOKENS
        limit += self.tokenizer.num_special_tokens_to_add() if added else 0
        if self.attention:
            # Cut before what the prompt puts around it.
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
        """Token ids, which of them are real, and which are of the passage, each ``[n, tokens]``."""
        rows = self._tokenise(passages)
        real, special = self._padded(rows["attention_mask"], 0), self._padded(rows["special_tokens_mask"], 1)
        return self._padded(rows["input_ids"], 0), real, special == 0

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(self.device)

    def batch_size(self) -> int:
        """How many passages at a time a quarter of the free memory has room for; more than `MOST` gain nothing."""
        one = 2 * footprint(self.config).expert_bytes
        if self.attention:
            read = 4 * math.prod(self.hypernetwork.state_shape) if self.config.reads_states else 0
            one = MAX_PASSAGE_TOKENS * (one + read)
        # States as they are and normalised; a layer of the LLM, with its MLP, has about 16 times as many numbers.
        one += MAX_PASSAGE_TOKENS * self.config.hidden_size * 4 * (4 if not (self.contextual or self.attention) else 20)
        most = MOST_READ_ON_CPU if self.attention and self.device.type == "cpu" else MOST
        return max(1, min(most, available_memory(str(self.device)) // 4 // one))

    def generate_units(self, passages: Sequence[str]) -> tuple[Experts, list[list[int]]]:
        """The units of all experts, ``[units]`` in the hypernetwork's dtype, and which of them are each passage's."""
        states, mask = self.embed(passages)
        experts = self.hypernetwork(states, mask)
        if not self.attention:
            return experts, [[number] for number in range(len(passages))]
        real = unit_mask(mask, self.config.window)
        ends = [0, *real.sum(1).cumsum(0).tolist()]
        return experts[real], [list(range(*pair)) for pair in pairwise(ends)]

    def write(self, passages: Sequence[str], weights: Weights, rows: Tensor) -> None:
        """Generate experts into ``rows`` of ``weights``: see `Hypernetwork.write`."""
        self.hypernetwork.write(*self.embed(passages), weights, rows)


def attention_dimensions(model: PreTrainedModel) -> dict[str, int]:
    """The LLM's query heads, key-value heads and their width, as a configuration names them.

    Raises:
        InputError: they are not the same in all layers.
    """
    config = model.config.get_text_config()
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
    except ValueError as error:  # of transformers, for an LLM whose layers differ in this
        name = type(model).__name__
        raise InputError(
            f"{name}: its layers have different heads, so attention experts have no place in it"
        ) from error
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_width": width}


def _check_heads(model: PreTrainedModel, config: HypernetworkConfig) -> None:
    for layer in config.layers:
        find_attention(model, layer)
        if config.query_rank is not None:
            find_query_projection(model, layer)
        if config.place == "mlp":
            find_beside_mlp(model, layer)
    for name, here in attention_dimensions(model).items():
        if (there := getattr(config, name)) != here:
            raise InputError(f"hypernetwork {name} is {there}, the LLM's is {here}")
