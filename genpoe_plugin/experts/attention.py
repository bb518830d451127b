"""Experts in the LLM's own attention: a passage's keys and values join those of the context, in one softmax.

Let ``q`` be the query of a token at or after the start, in a layer with experts. The softmax is over the logits of the
context and the logits ``s · q · K_kt + log(g_k / max g) + b_h`` for unit ``t`` of expert ``k`` and head ``h``. This is
a mixture of experts, in which the context is one expert; the router is the attention's mass times the gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention_interface import AttentionCall
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Experts, Weights

MAX_PLAIN_LOGITS = 2**22
"""Up to this many logits, plain matrix products compute attention, without copying keys; above it, a fused kernel."""


@dataclass(frozen=True)
class AttentionShape:
    """The layers and heads that have experts.

    Attributes:
        layers: indices of the layers with experts, in ascending order.
        kv_heads: for each of these layers, the key-value heads with experts.
        num_heads, num_kv_heads, head_width: number of query heads, number of key-value heads, and head width of the
            LLM.
        place: as in `HypernetworkConfig`.
    """

    layers: tuple[int, ...]
    kv_heads: tuple[tuple[int, ...], ...]
    num_heads: int
    num_kv_heads: int
    head_width: int
    place: Literal["attention", "mlp"] = "attention"

    @classmethod
    def of(cls, config: HypernetworkConfig) -> AttentionShape:
        """The shape for a configuration with the head ``attention``."""
        assert config.num_heads and config.num_kv_heads and config.head_width
        every = tuple(range(config.num_kv_heads))
        kv_heads = config.kv_heads or (every,) * len(config.layers)
        return cls(config.layers, kv_heads, config.num_heads, config.num_kv_heads, config.head_width, config.place)

    @property
    def heads(self) -> list[int]:
        """The number of heads in each part of an expert: keys, then values, of every layer in turn."""
        return [len(heads) for heads in self.kv_heads for _ in ("keys", "values")]

    @property
    def vectors(self) -> int:
        """The number of vectors in a unit: keys and values for every head of every layer."""
        return sum(self.heads)

    def join(self, states: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Join keys and values ``[n, KV heads, tokens, width]`` to units ``[n, tokens, vectors, width]``."""
        parts = []
        for layer, heads in zip(self.layers, self.kv_heads, strict=True):
            parts += [state[:, list(heads)].transpose(1, 2) for state in states[layer]]
        return torch.cat(parts, -2)


class QueryAddition(NamedTuple):
    """A low-rank addition to the queries of a layer, computed from the input of the query projection.

    All experts share it.
    """

    read: Tensor
    """The matrix that reads the state, ``[rank, d]``."""
    write: Tensor
    """The matrix that writes to the queries, ``[rank, heads x head width]``."""

    def to(self, target: torch.device | torch.dtype) -> QueryAddition:
        return QueryAddition(self.read.to(target), self.write.to(target))

    def of(self, state: Tensor) -> Tensor:
        """Map states ``[..., d]``, scaled to unit root mean square, to ``[..., heads x head width]``."""
        return functional.rms_norm(state, state.shape[-1:]) @ self.read.mT @ self.write


@dataclass(frozen=True, eq=False)
class AttentionExperts(Experts):
    """Keys and values of passages: one unit per token, or per window of tokens.

    Attributes:
        shape: the layers and heads with experts.
        bias: ``b``, added to the logits of all units, ``[layers, heads]``; shared by all experts.
        parts: for each layer, its keys and then its values, each ``[..., heads, head width]``.
        queries: for each layer, the addition to the queries of the tokens that the experts act on; empty if there is
            none.
    """

    shape: AttentionShape
    bias: Tensor
    parts: tuple[Tensor, ...]
    queries: tuple[QueryAddition, ...] = ()

    @classmethod
    def of(cls, shape: AttentionShape, bias: Tensor, units: Tensor) -> AttentionExperts:
        """Experts from units ``[..., vectors, head width]``, whose vectors are the parts in turn."""
        return cls(shape, bias, units.split(shape.heads, -2))

    @property
    def units(self) -> Tensor:
        """All parts joined, ``[..., vectors, head width]``."""
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
        """As `Experts.select`. The result is laid out in memory with heads before rows, the order attention needs."""
        return self.with_weights(*(heads_first(part, index) for part in weights))

    def part(self, shape: AttentionShape) -> AttentionExperts:
        """These experts restricted to the layers and heads of ``shape``."""
        numbers = [self.shape.layers.index(layer) for layer in shape.layers]
        parts = []
        for number, heads in zip(numbers, shape.kv_heads, strict=True):
            index = [self.shape.kv_heads[number].index(head) for head in heads]
            parts += [part[..., index, :] for part in self.parts[2 * number : 2 * number + 2]]
        queries = tuple(self.queries[number] for number in numbers) if self.queries else ()
        return AttentionExperts(shape, self.bias[numbers], tuple(parts), queries)

    def layer(self, layer: int, gates: Tensor) -> LayerExperts:
        """The experts of a batch in one layer, prepared for the forward passes of a generation.

        The leading dimensions must be ``[rows, units]``, with the units of all experts of a row joined.

        Args:
            layer: index of a layer with experts.
            gates: for each unit the gate of its expert, ``[rows, units]``; 0 removes the unit.
        """
        shape = self.shape
        number = shape.layers.index(layer)
        heads, head_bias = list(shape.kv_heads[number]), self.bias[number]
        keys, values = (part.permute(2, 0, 1, 3) for part in self.parts[2 * number : 2 * number + 2])
        most = gates.amax(1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        bias = (gates / most).log().to(head_bias.dtype)[:, None, None, None]
        if head_bias.requires_grad or head_bias.any():
            bias = bias + head_bias.view(1, shape.num_kv_heads, -1, 1, 1)
        if len(heads) < shape.num_kv_heads:
            every = keys.new_zeros(2, shape.num_kv_heads, *keys.shape[1:])
            every[0, heads], every[1, heads] = keys, values
            keys, values = every
            missing = torch.ones(shape.num_kv_heads, dtype=torch.bool, device=bias.device)
            missing[heads] = False
            bias = bias.masked_fill(missing.view(1, -1, 1, 1, 1), -torch.inf)
        return LayerExperts(keys.contiguous(), values.contiguous(), bias)


@dataclass(frozen=True, eq=False)
class LayerExperts:
    """The experts of a batch's rows in one layer.

    Attributes:
        keys, values: keys and values of the units, ``[KV heads, rows, units, head width]``.
        bias: added to the units' logits, ``[rows, KV heads, query heads per KV head, 1, units]``; minus infinity at
            padding. The second and third dimension may be 1, for all heads.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


def heads_first(part: Tensor, index: Tensor) -> Tensor:
    """``part[index]`` of a part ``[units, heads, width]``, laid out in memory as ``[heads, *index, width]``."""
    order = part.new_empty(part.shape[1], index.numel(), part.shape[2])
    for number, vectors in enumerate(order):
        torch.index_select(part[:, number], 0, index.flatten(), out=vectors)
    return order.unflatten(1, index.shape).permute(*range(1, 1 + index.dim()), 0, -1)


def attend(call: AttentionCall, experts: LayerExperts, active: Tensor) -> Tensor:
    """Attention over the context and the experts, in one softmax.

    Args:
        call: the call of the layer's attention.
        experts: the experts of the call's rows.
        active: the tokens that attend to the experts, ``[rows, tokens]``.

    Returns:
        The attention's output, ``[rows, tokens, heads, width]``.

    Raises:
        InputError: the layer adds learned sinks or a position bias to its softmax.
    """
    for name in ("s_aux", "position_bias"):
        if call.options.get(name) is not None:
            raise InputError(f"{type(call.module).__name__} adds {name} to its softmax, which experts cannot join yet")
    seen = experts.bias.masked_fill(~active[:, None, None, :, None], -torch.inf)
    tokens, context = call.query.shape[2], call.key.shape[2]
    mask = _additive_mask(call.mask, tokens, context, call.query)
    rows, heads = call.query.shape[:2]
    if call.softcap is None and rows * heads * tokens * experts.keys.shape[2] > MAX_PLAIN_LOGITS:
        return _fused(call, experts, seen, mask)
    logits = _logits(call, experts.keys.transpose(0, 1)) + seen.to(mask.dtype)
    both = torch.cat([logits, _logits(call, call.key) + mask.unsqueeze(1)], -1)
    weights = both.softmax(-1, dtype=_softmax_dtype(both.dtype)).to(both.dtype)
    units = experts.keys.shape[2]
    from_experts = _weighted_sum(weights[..., :units], experts.values.transpose(0, 1))
    return from_experts + _weighted_sum(weights[..., units:], call.value)


def unit_mass(call: AttentionCall, experts: LayerExperts, active: Tensor) -> Tensor:
    """The share of the softmax that each unit gets from the last token, as a mean over heads: ``[rows, units]``.

    The rest up to 1 is the share of the context. The arguments are those of `attend`.
    """
    seen = experts.bias.masked_fill(~active[:, None, None, -1:, None], -torch.inf)
    last_mask = None if call.mask is None else call.mask[..., -1:, :]
    last = replace(call, query=call.query[:, :, -1:], mask=last_mask)
    mask = _additive_mask(last_mask, 1, call.key.shape[2], call.query)
    logits = _logits(last, experts.keys.transpose(0, 1)) + seen.to(mask.dtype)
    weights = torch.cat([logits, _logits(last, call.key) + mask.unsqueeze(1)], -1).float().softmax(-1)
    return weights[..., : experts.keys.shape[2]].mean((1, 2, 3))


def attend_with_null(call: AttentionCall, experts: LayerExperts, active: Tensor) -> Tensor:
    """Attention over the experts alone, with a null (logit 0, value 0) in place of the context in the softmax.

    The arguments, result and errors are those of `attend`.
    """
    rows, kv_heads, _, width = call.key.shape
    null = call.key.new_zeros(rows, kv_heads, 1, width)
    return attend(replace(call, key=null, value=null, mask=None), experts, active)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, otherwise ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _logits(call: AttentionCall, keys: Tensor) -> Tensor:
    """Logits, ``[rows, KV heads, query heads per KV head, tokens, keys]``, computed without repeating keys.

    Args:
        call: the call of the layer's attention.
        keys: ``[rows, KV heads, keys, width]``; in memory, heads may come first.
    """
    rows, heads, tokens, width = call.query.shape
    kv_heads = keys.shape[1]
    query = call.query.reshape(rows, kv_heads, heads // kv_heads * tokens, width) * call.scaling
    logits = _product(query, keys.mT).unflatten(2, (heads // kv_heads, tokens))
    return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of values, ``[rows, tokens, heads, width]``.

    Args:
        weights: shaped like the result of `_logits`.
        values: shaped like its keys.
    """
    groups, tokens = weights.shape[2:4]
    output = _product(weights.flatten(2, 3), values).unflatten(2, (groups, tokens))
    return output.flatten(1, 2).transpose(1, 2).contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The batched matrix product of two tensors ``[rows, heads, ...]``, in the memory order of ``right``.

    ``right`` is the larger tensor; in the other order, torch would copy it.
    """
    if right.stride(1) > right.stride(0):
        return (left.transpose(0, 1) @ right.transpose(0, 1)).transpose(0, 1)
    return left @ right


def _additive_mask(mask: Tensor | None, tokens: int, context: int, like: Tensor) -> Tensor:
    """The mask as finite terms to add to logits, so that padding tokens that attend to nothing produce no NaN."""
    least = torch.finfo(like.dtype).min / 2  # half, so that adding a logit does not reach minus infinity
    if mask is None:
        # The rule of transformers: without a mask, a single token attends to everything, several attend causally.
        mask = torch.ones(1, 1, tokens, context, dtype=torch.bool, device=like.device)
        if tokens > 1:
            mask = mask.tril()
    mask = mask[..., :context]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, least)
    return mask.to(like.dtype).clamp_min(least)


def _fused(call: AttentionCall, experts: LayerExperts, seen: Tensor, mask: Tensor) -> Tensor:
    """`attend` with a fused kernel, over the experts' and the context's keys joined."""
    rows, heads = call.query.shape[:2]
    repeat = heads // call.key.shape[1]
    keys = torch.cat([experts.keys.transpose(0, 1), call.key], 2).repeat_interleave(repeat, 1)
    values = torch.cat([experts.values.transpose(0, 1), call.value], 2).repeat_interleave(repeat, 1)
    bias = seen.to(mask.dtype).expand(-1, call.key.shape[1], repeat, -1, -1).flatten(1, 2)
    both = torch.cat([bias, mask.expand(rows, heads, -1, -1)], -1)
    scaling = call.scaling
    output = functional.scaled_dot_product_attention(call.query, keys, values, attn_mask=both, scale=scaling)
    return output.transpose(1, 2).contiguous()
