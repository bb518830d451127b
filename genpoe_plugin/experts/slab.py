"""Experts side by side: one tensor for each of their weights, a slot for each of an expert's units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from genpoe_plugin.experts.expert import Weights


class Slab:
    """At most ``capacity`` units of experts on one device; those that were used longest ago make room for others.

    An expert beside an MLP is one unit; one in the attention has several. It takes the memory of the
    units that it has been given room for (`reserve`), not of its capacity.

    Args:
        capacity: units.
        form: the weights of any number of units, none included; for their shapes and dtype.
        device: where they are kept.
    """

    def __init__(self, capacity: int, form: Weights, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.weights: Weights = tuple(weight.new_empty((0, *weight.shape[1:]), device=device) for weight in form)
        self._slots: OrderedDict[str, list[int]] = OrderedDict()
        self._free: list[int] = []

    def __contains__(self, passage: str) -> bool:
        return passage in self._slots

    def __len__(self) -> int:
        """The experts that are there."""
        return len(self._slots)

    @property
    def used(self) -> int:
        """The units that are there."""
        return len(self.weights[0]) - len(self._free)

    def use(self, passages: Sequence[str]) -> None:
        """The passages that are there count as just used, the last of them last."""
        for passage in passages:
            if passage in self._slots:
                self._slots.move_to_end(passage)

    def slots(self, passages: Sequence[str]) -> list[list[int]]:
        """Where in ``weights`` the units of passages are that are all there."""
        return [self._slots[passage] for passage in passages]

    def select(self, passages: Sequence[str]) -> Weights:
        """Copies of the units of passages that are all there, one expert's after the other's."""
        index = torch.tensor([slot for slots in self.slots(passages) for slot in slots], device=self.device)
        return tuple(weight[index] for weight in self.weights)

    def oldest(self, count: int) -> list[str]:
        """The passages whose experts make room if so many other units come."""
        leaving: list[str] = []
        over = self.used + count - self.capacity
        for passage, slots in self._slots.items():
            if over <= 0:
                break
            leaving.append(passage)
            over -= len(slots)
        return leaving

    def put(self, passages: Sequence[str], weights: Weights, units: Sequence[int] | None = None) -> None:
        """Keep experts that are not there yet, as just used; of more than the capacity the last ones.

        Args:
            weights: their units, one expert's after the other's.
            units: how many each of them has; without it, one.
        """
        units = units or [1] * len(passages)
        first, count = len(passages), 0
        while first and count + units[first - 1] <= self.capacity:
            first -= 1
            count += units[first]
        if not count:
            return
        with self.filling(passages[first:], units[first:]) as index:
            for kept, weight in zip(self.weights, weights, strict=True):
                kept.index_copy_(0, index, weight[-count:].to(self.device))

    @contextmanager
    def filling(self, passages: Sequence[str], units: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Where in ``weights`` units go that are not there yet; they are there once the block ends without an error.

        Args:
            passages: theirs; they count as just used.
            units: how many each of them has, together at most the capacity; without it, one.
        """
        units = units or [1] * len(passages)
        count = sum(units)
        for passage in self.oldest(count):
            self._free += reversed(self._slots.pop(passage))
        if (most := self.used + count) > (before := len(self.weights[0])):
            # Half as many again as there were, so that room is seldom made.
            self.reserve(max(most, before * 3 // 2))
        taken = [self._free.pop() for _ in range(count)]
        try:
            yield torch.tensor(taken, device=self.device)
        except BaseException:
            self._free += reversed(taken)
            raise
        places = iter(taken)
        self._slots.update(
            (passage, [next(places) for _ in range(own)]) for passage, own in zip(passages, units, strict=True)
        )

    def reserve(self, count: int) -> None:
        """Make room for ``count`` units in all, or for the capacity."""
        before, size = len(self.weights[0]), min(self.capacity, count)
        if size <= before:
            return
        larger = tuple(weight.new_empty((size, *weight.shape[1:])) for weight in self.weights)
        for new, old in zip(larger, self.weights, strict=True):
            new[:before] = old
        self.weights = larger
        self._free += reversed(range(before, size))
