"""Experts side by side: one tensor for each of their weights, a slot for each expert."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from genpoe_plugin.experts.expert import Weights


class Slab:
    """At most ``capacity`` experts on one device; those that were used longest ago make room for others.

    It takes the memory of the experts that it has been given room for (`reserve`), not of its capacity.

    Args:
        capacity: experts.
        form: the weights of any number of such experts, none included; for their shapes and dtype.
        device: where they are kept.
    """

    def __init__(self, capacity: int, form: Weights, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.weights: Weights = tuple(weight.new_empty((0, *weight.shape[1:]), device=device) for weight in form)
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
        with self.filling(passages) as index:
            for kept, weight in zip(self.weights, weights, strict=True):
                kept.index_copy_(0, index, weight[-len(passages) :].to(self.device))

    @contextmanager
    def filling(self, passages: Sequence[str]) -> Iterator[Tensor]:
        """Where in ``weights`` experts go that are not there yet; they are there once the block ends without an error.

        Args:
            passages: theirs, at most as many as the capacity; they count as just used.
        """
        for passage in self.oldest(len(passages)):
            self._free.append(self._slots.pop(passage))
        if (most := len(self) + len(passages)) > (before := len(self.weights[0])):
            # Half as many again as there were, so that room is seldom made.
            self.reserve(max(most, before * 3 // 2))
        taken = [self._free.pop() for _ in passages]
        try:
            yield torch.tensor(taken, device=self.device)
        except BaseException:
            self._free += reversed(taken)
            raise
        self._slots.update(zip(passages, taken, strict=True))

    def reserve(self, count: int) -> None:
        """Make room for ``count`` experts in all, or for the capacity."""
        before, size = len(self.weights[0]), min(self.capacity, count)
        if size <= before:
            return
        larger = tuple(weight.new_empty((size, *weight.shape[1:])) for weight in self.weights)
        for new, old in zip(larger, self.weights, strict=True):
            new[:before] = old
        self.weights = larger
        self._free += reversed(range(before, size))
