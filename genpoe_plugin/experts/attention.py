"""Experts in the LLM's own attention: a passage's keys and values beside those of the prompt, in one softmax.

At a chosen layer, with ``q`` the query of a token at or after the start, the logits are those of the own context, and
``s · q · K_kt + log(g_k / max g) + b_h`` for token ``t`` of expert ``k`` and head ``h``. One softmax over all of them
is a mixture of experts (the own context is one of them), whose router is the attention's mass times the gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention_interface import Call
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Experts, Weights

MOST_LOGITS = 2**22
"""Up to so many logits, attention is computed by plain products, which copy no keys; beyond, by a fused kernel."""


@dataclass(frozen=True)
class AttentionShape:
    """Layers and heads that experts have.

    Attributes:
        layers: those that have experts, in ascending order.
        kv_heads: for each of them the key-value heads that an expert has.
        num_heads, num_kv_heads, head_width: the LLM's.
        place: as of `HypernetworkConfig`.
    """

    layers: tuple[int, ...]
    kv_heads: tuple[tuple[int, ...], ...]
    num_heads: int
    num_kv_heads: int
    head_width: int
    place: Literal["attention", "mlp"] = "attention"

    @classmethod
    def of(cls, config: HypernetworkConfig) -> AttentionShape:
        """The shape of a configuration whose head is ``attention``."""
        assert config.num_heads and config.num_kv_heads and config.head_width
        every = tuple(range(config.num_kv_heads))
        kv_heads = config.kv_heads or (every,) * len(config.layers)
        return cls(config.layers, kv_heads, config.num_heads, config.num_kv_heads, config.head_width, config.place)

    @property
    def heads(self) -> list[int]:
        """Heads in each part of an expert: keys and values of every layer in turn."""
        return [len(heads) for heads in self.kv_heads for _ in ("keys", "values")]

    @property
    def vectors(self) -> int:
        """Vectors in a unit: a token's keys and values, for every head of every layer."""
        return sum(self.heads)

    def join(self, states: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Units ``[n, tokens, vectors, width]`` from keys and values ``[n, KV heads, tokens, width]`` of all layers."""
        parts = []
        for layer, heads in zip(self.layers, self.kv_heads, strict=True):
            parts += [state[:, list(heads)].transpose(1, 2) for state in states[layer]]
        return torch.cat(parts, -2)


class QueryAddition(NamedTuple):
    """What is added to the queries of a layer, from the state that enters their projection; shared by all experts."""

    read: Tensor
    """``[rank, d]``."""
    write: Tensor
    """``[rank, heads x head width]``."""

    def to(self, target: torch.device | torch.dtype) -> QueryAddition:
        return QueryAddition(self.read.to(target), self.write.to(target))

    def of(self, state: Tensor) -> Tensor:
        """``[..., d]`` to ``[..., heads x head width]``; the state is brought to unit root mean square."""
        return functional.rms_norm(state, state.shape[-1:]) @ self.read.mT @ self.write


@dataclass(frozen=True, eq=False)
class AttentionExperts(Experts):
    """Keys and values of passages' tokens: a unit for each token, or for each window of tokens.

    Attributes:
        shape: which layers and heads.
        bias: ``b``, ``[layers, heads]``: added to the logits of all experts' tokens; shared by all experts.
        parts: for each layer its keys and then its values, each ``[..., heads, head width]``.
        queries: for each layer what is added to the queries of the tokens that the experts act on; empty for nothing.
    """

    shape: AttentionShape
    bias: Tensor
    parts: tuple[Tensor, ...]
    queries: tuple[QueryAddition, ...] = ()

    @classmethod
    def of(cls, shape: AttentionShape, bias: Tensor, units: Tensor) -> AttentionExperts:
        """From units ``[..., vectors, head width]``, which have the parts one after the other."""
        return cls(shape, bias, units.split(shape.heads, -2))

    @property
    def units(self) -> Tensor:
        """``[..., vectors, head width]``."""
        return torch.cat(self.parts, -2)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.parts

    def with_weights(self, *weights: Tensor) -> AttentionExperts:
        return replace(self, parts=weights)

    def to(self, target: torch.device | torch.dtype) -> AttentionExperts:
        parts = tuple(part.to(target) for part in self.parts)
        queries = tuple(query.to(target) for query in self.queries)
        return replace(self, bias=self.bias.to(target), parts=parts, queries=queries)

    def select(self, weights: Weights, index: Tensor) -> AttentionExperts:
        """As `Experts.select`; in memory, heads come before rows, which is the order that attention needs."""
        return self.with_weights(*(heads_first(part, index) for part in weights))

    def part(self, shape: AttentionShape) -> AttentionExperts:
        """Experts with some of the layers and heads of these."""
        numbers = [self.shape.layers.index(layer) for layer in shape.layers]
        parts = []
        for number, heads in zip(numbers, shape.kv_heads, strict=True):
            index = [self.shape.kv_heads[number].index(head) for head in heads]
            parts += [part[..., index, :] for part in self.parts[2 * number : 2 * number + 2]]
        queries = tuple(self.queries[number] for number in numbers) if self.queries else ()
        return AttentionExperts(shape, self.bias[numbers], tuple(parts), queries)

    def layer(self, layer: int, gates: Tensor) -> LayerExperts:
        """The experts of a batch in one layer, laid out for the passes of a generation.

        The leading dimensions must be ``[rows, units]``, the units of all experts of a row side by side.

        Args:
            layer: one of those that have experts.
            gates: ``[rows, units]``, for each unit that of its expert; 0 takes it out.
        """
        shape = self.shape
        number = shape.layers.index(layer)
        kept, head_bias = list(shape.kv_heads[number]), self.bias[number]
        keys, values = (part.permute(2, 0, 1, 3) for part in self.parts[2 * number : 2 * number + 2])
        most = gates.amax(1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        bias = (gates / most).log().to(head_bias.dtype)[:, None, None, None]
        if head_bias.requires_grad or head_bias.any():
            bias = bias + head_bias.view(1, shape.num_kv_heads, -1, 1, 1)
        if len(kept) < shape.num_kv_heads:
            every = keys.new_zeros(2, shape.num_kv_heads, *keys.shape[1:])
            every[0, kept], every[1, kept] = keys, values
            keys, values = every
            missing = torch.ones(shape.num_kv_heads, dtype=torch.bool, device=bias.device)
            missing[kept] = False
            bias = bias.masked_fill(missing.view(1, -1, 1, 1, 1), -torch.inf)
        return LayerExperts(keys.contiguous(), values.contiguous(), bias)


@dataclass(frozen=True, eq=False)
class LayerExperts:
    """The experts of a batch's rows in one layer.

    Attributes:
        keys, values: ``[KV heads, rows, units, head width]``.
        bias: added to their logits, minus infinity where a row has no expert: ``[rows, KV heads, query heads of each,
            1, units]``, where the second and third may be 1, for all heads.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


def heads_first(part: Tensor, index: Tensor) -> Tensor:
    """``part[index]`` of a part ``[units, heads, width]``, in memory ``[heads, *index, width]``."""
    order = part.new_empty(part.shape[1], index.numel(), part.shape[2])
    for number, vectors in enumerate(order):
        torch.index_select(part[:, number], 0, index.flatten(), out=vectors)
    return order.unflatten(1, index.shape).permute(*range(1, 1 + index.dim()), 0, -1)


def attend(call: Call, experts: LayerExperts, active: Tensor) -> Tensor:
    """Attention over the own context and the experts, in one softmax.

    Args:
        call: of the layer's attention.
        experts: of the call's rows.
        active: ``[rows, tokens]``, which tokens see the experts.

    Returns:
        ``[rows, tokens, heads, width]``.

    Raises:
        InputError: the layer adds something of its own to the softmax.
    """
    for name in ("s_aux", "position_bias"):
        if call.options.get(name) is not None:
            raise InputError(f"{type(call.module).__name__} adds {name} to its softmax, which experts cannot join yet")
    seen = experts.bias.masked_fill(~active[:, None, None, :, None], -torch.inf)
    tokens, context = call.query.shape[2], call.key.shape[2]
    own = _additive(call.mask, tokens, context, call.query)
    rows, heads = call.query.shape[:2]
    if call.softcap is None and rows * heads * tokens * experts.keys.shape[2] > MOST_LOGITS:
        return _fused(call, experts, seen, own)
    logits = _logits(call, experts.keys.transpose(0, 1)) + seen.to(own.dtype)
    both = torch.cat([logits, _logits(call, call.key) + own.unsqueeze(1)], -1)
    weights = both.softmax(-1, dtype=_exact(both.dtype)).to(both.dtype)
    units = experts.keys.shape[2]
    of_experts = _weighted(weights[..., :units], experts.values.transpose(0, 1))
    return of_experts + _weighted(weights[..., units:], call.value)


def unit_mass(call: Call, experts: LayerExperts, active: Tensor) -> Tensor:
    """The share of the softmax that each unit has for the last token, a mean over heads: ``[rows, units]``.

    What is missing to 1 is the own context's. Args as of `attend`.
    """
    seen = experts.bias.masked_fill(~active[:, None, None, -1:, None], -torch.inf)
    mask = None if call.mask is None else call.mask[..., -1:, :]
    last = replace(call, query=call.query[:, :, -1:], mask=mask)
    own = _additive(mask, 1, call.key.shape[2], call.query)
    logits = _logits(last, experts.keys.transpose(0, 1)) + seen.to(own.dtype)
    weights = torch.cat([logits, _logits(last, call.key) + own.unsqueeze(1)], -1).float().softmax(-1)
    return weights[..., : experts.keys.shape[2]].mean((1, 2, 3))


def attend_with_null(call: Call, experts: LayerExperts, active: Tensor) -> Tensor:
    """Attention over the experts alone: in the softmax, a null of logit 0 and no value has the own context's place.

    Args, returns, raises: as of `attend`.
    """
    rows, kv_heads, _, width = call.key.shape
    null = call.key.new_zeros(rows, kv_heads, 1, width)
    return attend(replace(call, key=null, value=null, mask=None), experts, active)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _logits(call: Call, keys: Tensor) -> Tensor:
    """``[rows, KV heads, query heads of each, tokens, keys]``: heads that share keys side by side, none is repeated.

    Args:
        keys: ``[rows, KV heads, keys, width]``, in memory also heads first.
    """
    rows, heads, tokens, width = call.query.shape
    kv_heads = keys.shape[1]
    query = call.query.reshape(rows, kv_heads, heads // kv_heads * tokens, width) * call.scaling
    logits = _product(query, keys.mT).unflatten(2, (heads // kv_heads, tokens))
    return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The sum of values, weighted: ``[rows, tokens, heads, width]``.

    Args:
        weights: as logits of `_logits`.
        values: as its keys.
    """
    groups, tokens = weights.shape[2:4]
    output = _product(weights.flatten(2, 3), values).unflatten(2, (groups, tokens))
    return output.flatten(1, 2).transpose(1, 2).contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix products of two tensors ``[rows, heads, ...]``, in the order that the right one has in memory.

    It is the larger one, and would be copied in the other order.
    """
    if right.stride(1) > right.stride(0):
        return (left.transpose(0, 1) @ right.transpose(0, 1)).transpose(0, 1)
    return left @ right


def _additive(mask: Tensor | None, tokens: int, context: int, like: Tensor) -> Tensor:
    """The mask as something to add to logits, finite, so that a padding token that sees nothing makes no NaN."""
    least = torch.finfo(like.dtype).min / 2  # half, so that no logit beside it reaches minus infinity
    if mask is None:
        # As transformers has it: without a mask one token sees everything, and several see what is not after them.
        mask = torch.ones(1, 1, tokens, context, dtype=torch.bool, device=like.device)
        if tokens > 1:
            mask = mask.tril()
    mask = mask[..., :context]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, least)
    return mask.to(like.dtype).clamp_min(least)


def _fused(call: Call, experts: LayerExperts, seen: Tensor, own: Tensor) -> Tensor:
    """The same by a fused kernel over experts and context side by side."""
    rows, heads = call.query.shape[:2]
    repeat = heads // call.key.shape[1]
    keys = torch.cat([experts.keys.transpose(0, 1), call.key], 2).repeat_interleave(repeat, 1)
    values = torch.cat([experts.values.transpose(0, 1), call.value], 2).repeat_interleave(repeat, 1)
    bias = seen.to(own.dtype).expand(-1, call.key.shape[1], repeat, -1, -1).flatten(1, 2)
    both = torch.cat([bias, own.expand(rows, heads, -1, -1)], -1)
    scaling = call.scaling
    output = functional.scaled_dot_product_attention(call.query, keys, values, attn_mask=both, scale=scaling)
    return output.transpose(1, 2).contiguous()
