"""A memory pool for experts: one tensor per weight, with equal slots that each hold one unit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from genpoe_plugin.experts.expert import Weights


class UnitPool:
    """At most ``capacity`` units of experts on one device; the least recently used experts are evicted first.

    An expert beside an MLP has one unit, an expert in the attention several. The pool allocates memory for the units
    that are reserved (`reserve`), not for its capacity.

    Args:
        capacity: the largest number of units.
        form: weights of any number of units (zero included), for their shapes and dtype.
        device: device of the pool.
    """

    def __init__(self, capacity: int, form: Weights, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.weights: Weights = tuple(weight.new_empty((0, *weight.shape[1:]), device=device) for weight in form)
        self._slots: OrderedDict[str, list[int]] = OrderedDict()
        self._free: list[int] = []

    def __contains__(self, passage: str) -> bool:
        return passage in self._slots

    def __len__(self) -> int:
        """The number of experts in the pool."""
        return len(self._slots)

    @property
    def used(self) -> int:
        """The number of units in the pool."""
        return len(self.weights[0]) - len(self._free)

    def use(self, passages: Sequence[str]) -> None:
        """Mark those of ``passages`` that are in the pool as just used, in this order."""
        for passage in passages:
            if passage in self._slots:
                self._slots.move_to_end(passage)

    def slots(self, passages: Sequence[str]) -> list[list[int]]:
        """The slots in ``weights`` of each passage's units; all passages must be in the pool."""
        return [self._slots[passage] for passage in passages]

    def select(self, passages: Sequence[str]) -> Weights:
        """Copies of the units of ``passages``, expert by expert; all passages must be in the pool."""
        index = torch.tensor([slot for slots in self.slots(passages) for slot in slots], device=self.device)
        return tuple(weight[index] for weight in self.weights)

    def oldest(self, count: int) -> list[str]:
        """The passages whose experts must be evicted to make room for ``count`` new units."""
        evicted: list[str] = []
        over = self.used + count - self.capacity
        for passage, slots in self._slots.items():
            if over <= 0:
                break
            evicted.append(passage)
            over -= len(slots)
        return evicted

    def put(self, passages: Sequence[str], weights: Weights, units: Sequence[int] | None = None) -> None:
        """Add experts that are not in the pool, as just used. If they exceed the capacity, add the last ones.

        Args:
            passages: the experts' passages.
            weights: the experts' units, expert by expert.
            units: the number of units of each expert; one by default.
        """
        units = units or [1] * len(passages)
        first, count = len(passages), 0
        while first and count + units[first - 1] <= self.capacity:
            first -= 1
            count += units[first]
        if not count:
            return
        with self.filling(passages[first:], units[first:]) as index:
            for target, weight in zip(self.weights, weights, strict=True):
                target.index_copy_(0, index, weight[-count:].to(self.device))

    @contextmanager
    def filling(self, passages: Sequence[str], units: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield the slots in ``weights`` for new experts; they are added when the block ends without an error.

        Args:
            passages: the experts' passages, none of them in the pool; they count as just used.
            units: the number of units of each expert, in total at most the capacity; one by default.
        """
        units = units or [1] * len(passages)
        count = sum(units)
        for passage in self.oldest(count):
            self._free += reversed(self._slots.pop(passage))
        if (most := self.used + count) > (before := len(self.weights[0])):
            # Grow by at least half, so that memory is seldom reallocated.
            self.reserve(max(most, before * 3 // 2))
        taken = [self._free.pop() for _ in range(count)]
        try:
            yield torch.tensor(taken, device=self.device)
        except BaseException:
            self._free += reversed(taken)
            raise
        slots = iter(taken)
        self._slots.update(
            (passage, [next(slots) for _ in range(number)]) for passage, number in zip(passages, units, strict=True)
        )

    def reserve(self, count: int) -> None:
        """Allocate memory for ``count`` units in total, at most for the capacity."""
        before, size = len(self.weights[0]), min(self.capacity, count)
        if size <= before:
            return
        larger = tuple(weight.new_empty((size, *weight.shape[1:])) for weight in self.weights)
        for new, old in zip(larger, self.weights, strict=True):
            new[:before] = old
        self.weights = larger
        self._free += reversed(range(before, size))
