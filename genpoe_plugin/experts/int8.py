"""Experts in the attention in eight bits with one scale per vector: about a quarter of the bytes of float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape, QueryAddition, heads_first
from genpoe_plugin.experts.expert import Experts, Weights

LARGEST = 127


def unit_bytes(vectors: int, width: int) -> int:
    """Bytes of a unit of ``vectors`` vectors of ``width`` values: one per value, and four for each vector's scale."""
    return vectors * (width + 4)


@dataclass(frozen=True, eq=False)
class Int8Experts(Experts):
    """`AttentionExperts` in their stored form; `select` dequantises them.

    Attributes:
        shape, bias, queries: as in `AttentionExperts`.
        dtype: dtype of the experts that `select` returns.
        parts: for each part of `AttentionExperts`, its codes, ``[units, heads, head width]`` in int8, and then their
            scales, ``[units, heads, 1]`` in float32.
    """

    shape: AttentionShape
    bias: Tensor
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    queries: tuple[QueryAddition, ...] = ()

    @classmethod
    def of(cls, experts: AttentionExperts) -> Int8Experts:
        """Quantise every key or value vector to 255 steps, scaled by its largest absolute value."""
        parts: list[Tensor] = []
        for part in experts.parts:
            scale = part.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
            parts += [(part.float() / scale).round().to(torch.int8), scale]
        return cls(experts.shape, experts.bias, experts.parts[0].dtype, tuple(parts), experts.queries)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.parts

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return unit_bytes(self.shape.vectors, self.shape.head_width)

    def with_weights(self, *weights: Tensor) -> Int8Experts:
        return replace(self, parts=weights)

    def to(self, target: torch.device | torch.dtype) -> Int8Experts:
        """Move to a device, or set the dtype that `select` returns."""
        bias, queries = self.bias.to(target), tuple(query.to(target) for query in self.queries)
        if isinstance(target, torch.dtype):
            return replace(self, bias=bias, queries=queries, dtype=target)
        return replace(self, bias=bias, queries=queries, parts=tuple(part.to(target) for part in self.parts))

    def select(self, weights: Weights, index: Tensor) -> AttentionExperts:
        parts = [
            (heads_first(codes, index) * heads_first(scales, index)).to(self.dtype)
            for codes, scales in zip(weights[::2], weights[1::2], strict=True)
        ]
        return AttentionExperts(self.shape, self.bias, tuple(parts), self.queries)
