"""Experts side by side: one tensor for each of their weights, a slot for each expert."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

Weights = tuple[Tensor, ...]
"""Experts' own tensors, all with the experts along the first dimension."""


class Slab:
    """At most ``capacity`` experts on one device; those that were used longest ago make room for others.

    It takes the memory of the experts that it has been given room for (`reserve`), not of its capacity.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.weights: Weights = ()
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._free: list[int] = []

    def __contains__(self, passage: str) -> bool:
        return passage in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def use(self, passages: Sequence[str]) -> None:
        """The passages that are there count as just used, the last of them last."""
        for passage in passages:
            if passage in self._slots:
                self._slots.move_to_end(passage)

    def slots(self, passages: Sequence[str]) -> list[int]:
        """Where in ``weights`` the experts of passages are that are all there."""
        return [self._slots[passage] for passage in passages]

    def select(self, passages: Sequence[str]) -> Weights:
        """Copies of the experts of passages that are all there."""
        index = torch.tensor(self.slots(passages), device=self.device)
        return tuple(weight[index] for weight in self.weights)

    def oldest(self, count: int) -> list[str]:
        """The passages whose experts make room if so many others come."""
        leaving = max(0, len(self) + count - self.capacity)
        return [passage for passage, _ in zip(self._slots, range(leaving), strict=False)]

    def put(self, passages: Sequence[str], weights: Weights) -> None:
        """Keep experts that are not there yet, as just used; of more than the capacity the last ones."""
        passages = passages[-self.capacity :] if self.capacity else []
        if not passages:
            return
        weights = tuple(weight[-len(passages) :] for weight in weights)
        for passage in self.oldest(len(passages)):
            self._free.append(self._slots.pop(passage))
        self._reserve(len(self) + len(passages), weights)
        taken = [self._free.pop() for _ in passages]
        self._slots.update(zip(passages, taken, strict=True))
        index = torch.tensor(taken, device=self.device)
        for kept, weight in zip(self.weights, weights, strict=True):
            kept.index_copy_(0, index, weight.to(self.device))

    def _reserve(self, count: int, like: Weights) -> None:
        """Room for ``count`` experts, and for half as many again as there were, so that it is seldom made."""
        before = len(self.weights[0]) if self.weights else 0
        if count <= before:
            return
        size = min(self.capacity, max(count, before * 3 // 2))
        larger = tuple(weight.new_empty((size, *weight.shape[1:]), device=self.device) for weight in like)
        for new, old in zip(larger, self.weights or larger, strict=True):
            new[:before] = old[:before]
        self.weights = larger
        self._free += reversed(range(before, size))
