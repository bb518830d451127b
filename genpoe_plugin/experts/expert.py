"""Experts as tensors that can be indexed, stacked and stored, and the maths of experts beside an MLP.

The maths of experts in the LLM's attention is in `genpoe_plugin.experts.attention`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]
"""The tensors of several experts, with the experts (or their units) along the first dimension."""


class Mixture(Protocol):
    """``Σ_k g_k · E_k(x)``, with separate experts for every row."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[rows, tokens, d]`` to ``[rows, tokens, d]``, in the dtype of the experts."""


class Experts(ABC):
    """Several experts of one form, with the same leading dimensions.

    ``weights`` belong to the single experts and have the leading dimensions. Tensors that all experts of a hypernetwork
    share (such as the learned matrices of the factored form) do not: they remain one object when experts are indexed,
    stacked or stored, and `nbytes` does not count them.

    An entry of the leading dimensions is a unit. An expert beside an MLP is one unit. An expert in the attention has
    one unit per token of its passage, or per window of tokens.
    """

    @property
    @abstractmethod
    def weights(self) -> tuple[Tensor, ...]:
        """The tensors of the single experts, all with the same leading dimensions and dtype."""

    @abstractmethod
    def with_weights(self, *weights: Tensor) -> Experts:
        """Experts of this form with other ``weights`` and the same shared tensors."""

    def select(self, weights: Weights, index: Tensor) -> Experts:
        """Experts of this form with units selected from ``weights``.

        Args:
            weights: tensors with any number of units along the first dimension.
            index: indices of the units; its shape becomes the leading dimensions.
        """
        return self.with_weights(*(weight[index] for weight in weights))

    def map(self, change: Callable[[Tensor], Tensor]) -> Experts:
        """Experts with ``change`` applied to each of the weights."""
        return self.with_weights(*(change(weight) for weight in self.weights))

    def __len__(self) -> int:
        return len(self.weights[0])

    def __getitem__(self, index: Tensor | slice | int | tuple[slice | int, ...]) -> Experts:
        return self.map(lambda weight: weight[index])

    def unsqueeze(self, dim: int) -> Experts:
        """Insert a leading dimension of size one: ``unsqueeze(1)`` turns ``[rows]`` experts into ``[rows, 1]``."""
        return self.map(lambda weight: weight.unsqueeze(dim))

    def to(self, target: torch.device | torch.dtype) -> Experts:
        return self.map(lambda weight: weight.to(target))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; shared tensors are not counted."""
        return sum(weight.nbytes for weight in self.weights)

    @staticmethod
    def stack(experts: Sequence[Experts]) -> Experts:
        """Stack experts of equal shapes and of one hypernetwork along a new first dimension."""
        columns = zip(*(expert.weights for expert in experts), strict=True)
        return experts[0].with_weights(*(torch.stack(weights) for weights in columns))


class MLPExperts(Experts):
    """Experts beside the MLP of one layer: functions of a token's state whose gated outputs are summed."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width ``d`` of the input and the output."""

    @abstractmethod
    def mixture(self, gates: Tensor) -> Mixture:
        """The gated sum of each row's experts, prepared once for the many forward passes of a generation.

        The experts' leading dimensions must be ``[rows, K]``.

        Args:
            gates: the experts' gates, ``[rows, K]``; a gate of 0 removes an expert with finite weights.
        """

    def mix(self, x: Tensor, gates: Tensor) -> Tensor:
        """``Σ_k g_k · E_k(x)`` with separate experts for every row: one call of `mixture`."""
        return self.mixture(gates)(x)


@dataclass(frozen=True, eq=False)
class DenseExperts(MLPExperts):
    """The paper's form, ``E(x) = W4 · W3 · ReLU(W2 · W1 · x)``.

    The weights include the shared base.

    Attributes:
        w1: ``W1``, ``[..., r, d]``.
        w2: ``W2``, ``[..., h, r]``.
        w3: ``W3``, ``[..., r, h]``.
        w4: ``W4``, ``[..., d, r]``.
    """

    w1: Tensor
    w2: Tensor
    w3: Tensor
    w4: Tensor

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.w1, self.w2, self.w3, self.w4

    @property
    def width(self) -> int:
        return self.w1.shape[-1]

    def with_weights(self, *weights: Tensor) -> DenseExperts:
        return DenseExperts(*weights)

    def mixture(self, gates: Tensor) -> Mixture:
        rows, count, rank, width = self.w1.shape
        # The first and the last product have width d on one side, so one product serves all experts of a row.
        up = self.w1.reshape(rows, count * rank, width).mT
        down = self.w4.transpose(2, 3).reshape(rows, count * rank, width)
        gates = gates.to(self.w1.dtype)[:, :, None, None]

        def mix(x: Tensor) -> Tensor:
            tokens = x.shape[1]
            inner = (x.to(up.dtype) @ up).view(rows, tokens, count, rank).transpose(1, 2)
            inner = torch.relu(inner @ self.w2.mT) @ self.w3.mT
            inner = (inner * gates).transpose(1, 2).reshape(rows, tokens, count * rank)
            return inner @ down

        return mix


class Factors(NamedTuple):
    """Learned matrices between full width and core width, shared by all factored experts of a hypernetwork."""

    read_up: Tensor
    """``Q_u``, ``[p, d]``."""
    write_up: Tensor
    """``P_u``, ``[h, p]``."""
    read_down: Tensor
    """``Q_d``, ``[p, h]``."""
    write_down: Tensor
    """``P_d``, ``[d, p]``."""


@dataclass(frozen=True, eq=False)
class FactoredExperts(MLPExperts):
    """``E(x) = P_d · M_d · Q_d · ReLU(P_u · M_u · Q_u · x)``: two small cores per expert; other matrices are shared.

    Attributes:
        factors: the shared matrices, on the device and in the dtype of the cores.
        core_up: ``M_u``, ``[..., p, p]``.
        core_down: ``M_d``, ``[..., p, p]``.
    """

    factors: Factors
    core_up: Tensor
    core_down: Tensor

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.core_up, self.core_down

    @property
    def width(self) -> int:
        return self.factors.read_up.shape[-1]

    def with_weights(self, *weights: Tensor) -> FactoredExperts:
        return FactoredExperts(self.factors, *weights)

    def to(self, target: torch.device | torch.dtype) -> FactoredExperts:
        factors = Factors(*(factor.to(target) for factor in self.factors))
        return FactoredExperts(factors, *(weight.to(target) for weight in self.weights))

    def mixture(self, gates: Tensor) -> Mixture:
        rows, count, size, _ = self.core_up.shape
        # All experts share the products before and after the cores, so each is computed once per token.
        up = self.core_up.reshape(rows, count * size, size).mT
        down = self.core_down.transpose(2, 3).reshape(rows, count * size, size)
        gates = gates.to(self.core_up.dtype)[:, None, :, None]
        factors = self.factors

        def mix(x: Tensor) -> Tensor:
            inner = (x.to(up.dtype) @ factors.read_up.mT) @ up
            inner = inner.view(rows, x.shape[1], count, size)
            inner = torch.relu(inner @ factors.write_up.mT) @ factors.read_down.mT
            return (inner * gates).flatten(2) @ down @ factors.write_down.mT

        return mix
