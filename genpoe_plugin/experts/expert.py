"""The maths of an expert: a low-rank MLP, and the gated sum of several of them over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Experts:
    """Dense experts, ``E(x) = W4 · W3 · ReLU(W2 · W1 · x)``, with any leading dimensions in common.

    The weights are whole ones: the shared base is already added.

    Attributes:
        w1: ``[..., r, d]``.
        w2: ``[..., h, r]``.
        w3: ``[..., r, h]``.
        w4: ``[..., d, r]``.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor
    w4: Tensor

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.w1, self.w2, self.w3, self.w4

    def __len__(self) -> int:
        return len(self.w1)

    def __getitem__(self, index: Tensor | slice | int) -> Experts:
        return Experts(*(weight[index] for weight in self.weights))

    def to(self, target: torch.device | torch.dtype) -> Experts:
        return Experts(*(weight.to(target) for weight in self.weights))

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    @classmethod
    def stack(cls, experts: Sequence[Experts]) -> Experts:
        """Experts of equal shapes along a new first dimension."""
        return cls(*(torch.stack(weights) for weights in zip(*(expert.weights for expert in experts), strict=True)))


def mix_experts(x: Tensor, experts: Experts, gates: Tensor) -> Tensor:
    """The gated sum ``Σ_k g_k · E_k(x)``, for every row its own experts.

    Args:
        x: ``[rows, tokens, d]``.
        experts: weights with leading dimensions ``[rows, K]``.
        gates: ``[rows, K]``; a gate of 0 on finite weights takes an expert out.

    Returns:
        ``[rows, tokens, d]``, in the dtype of the experts.
    """
    rows, tokens, _ = x.shape
    count, rank, width = experts.w1.shape[1:]
    # The first and the last product have the tokens' width on one side, so all experts of a row share one product.
    inner = x.to(experts.w1.dtype) @ experts.w1.reshape(rows, count * rank, width).mT
    inner = inner.view(rows, tokens, count, rank).transpose(1, 2)
    inner = torch.relu(inner @ experts.w2.mT) @ experts.w3.mT
    inner = inner * gates.to(inner.dtype)[:, :, None, None]
    inner = inner.transpose(1, 2).reshape(rows, tokens, count * rank)
    return inner @ experts.w4.transpose(1, 2).reshape(rows, width, count * rank).mT
