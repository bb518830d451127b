"""Experts as tensors that can be indexed, stacked and kept, and the maths of those beside an MLP.

Experts in the LLM's attention are in `genpoe_plugin.experts.attention`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]
"""Experts' own tensors, all with the experts along the first dimension."""


class Mixture(Protocol):
    """``Σ_k g_k · E_k(x)``, for every row its own experts."""

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, tokens, d]`` to ``[rows, tokens, d]``, in the dtype of the experts."""


class Experts(ABC):
    """Experts of one form, with any leading dimensions in common.

    ``weights`` are each expert's own and have the leading dimensions. What all experts of a hypernetwork share (such as
    the factored form's learned matrices) has none of them: it stays one object however experts are indexed, stacked or
    kept, and `nbytes` leaves it out.

    An expert beside an MLP is one entry of the leading dimensions. An expert in the attention is as many entries as
    its passage has tokens, or windows of tokens; an entry of either kind is called a unit.
    """

    @property
    @abstractmethod
    def weights(self) -> tuple[Tensor, ...]:
        """Each expert's own tensors, all with the same leading dimensions and dtype."""

    @abstractmethod
    def with_weights(self, *weights: Tensor) -> Experts:
        """Experts of this form, and with what these share, whose own tensors are ``weights``."""

    def select(self, weights: Weights, index: Tensor) -> Experts:
        """Experts of this form from some of many.

        Args:
            weights: of any number of such experts (units), along the first dimension.
            index: which of them, of any shape, which becomes the leading dimensions.
        """
        return self.with_weights(*(weight[index] for weight in weights))

    def map(self, change: Callable[[Tensor], Tensor]) -> Experts:
        """Experts whose own tensors are ``change`` of these."""
        return self.with_weights(*(change(weight) for weight in self.weights))

    def __len__(self) -> int:
        return len(self.weights[0])

    def __getitem__(self, index: Tensor | slice | int | tuple[slice | int, ...]) -> Experts:
        return self.map(lambda weight: weight[index])

    def unsqueeze(self, dim: int) -> Experts:
        """With a leading dimension of one put in: ``unsqueeze(1)`` makes ``[rows]`` experts ``[rows, 1]``."""
        return self.map(lambda weight: weight.unsqueeze(dim))

    def to(self, target: torch.device | torch.dtype) -> Experts:
        return self.map(lambda weight: weight.to(target))

    @property
    def nbytes(self) -> int:
        """Bytes of each expert's own tensors."""
        return sum(weight.nbytes for weight in self.weights)

    @staticmethod
    def stack(experts: Sequence[Experts]) -> Experts:
        """Experts of equal shapes, and of one hypernetwork, along a new first dimension."""
        own = zip(*(expert.weights for expert in experts), strict=True)
        return experts[0].with_weights(*(torch.stack(weights) for weights in own))


class MLPExperts(Experts):
    """Experts beside the MLP of one layer: functions of a token's state, which are added up."""

    @property
    @abstractmethod
    def width(self) -> int:
        """``d``, the width of what goes in and what comes out."""

    @abstractmethod
    def mixture(self, gates: Tensor) -> Mixture:
        """The gated sum of each row's experts, laid out once for the many passes of a generation.

        The experts' leading dimensions must be ``[rows, K]``.

        Args:
            gates: ``[rows, K]``; a gate of 0 on finite weights takes an expert out.
        """

    def mix(self, x: Tensor, gates: Tensor) -> Tensor:
        """``Σ_k g_k · E_k(x)``, for every row its own experts: as `mixture`, called once."""
        return self.mixture(gates)(x)


@dataclass(frozen=True, eq=False)
class DenseExperts(MLPExperts):
    """The paper's form, ``E(x) = W4 · W3 · ReLU(W2 · W1 · x)``.

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
    def weights(self) -> tuple[Tensor, ...]:
        return self.w1, self.w2, self.w3, self.w4

    @property
    def width(self) -> int:
        return self.w1.shape[-1]

    def with_weights(self, *weights: Tensor) -> DenseExperts:
        return DenseExperts(*weights)

    def mixture(self, gates: Tensor) -> Mixture:
        rows, count, rank, width = self.w1.shape
        # The first and the last product have the tokens' width on one side, so all experts of a row share one product.
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
    """What all factored experts of a hypernetwork share: learned matrices between full width and that of the cores."""

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
    """``E(x) = P_d · M_d · Q_d · ReLU(P_u · M_u · Q_u · x)``: two small cores each, everything of full width shared.

    Attributes:
        factors: shared by all, on the device and in the dtype of the cores.
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
        # Reading before the cores and writing after them is the same for all experts, so each is done once a token.
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
