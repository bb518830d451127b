"""The examples of each optimizer step: a function of seed and step alone, so that a run can resume at any step."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of one example in training.

    Attributes:
        epoch: number of earlier epochs.
        example: index of the example.
    """

    epoch: int
    example: int

    def rng(self, seed: int, purpose: str) -> random.Random:
        """A random generator for one purpose of this draw, such as its negatives; always in the same state."""
        return random.Random(f"{seed}-{purpose}-{self.epoch}-{self.example}")


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Number of steps that use every example once; the last batch may be smaller."""
    return -(-examples // batch_size)


def batch_at(step: int, examples: int, batch_size: int, seed: int) -> list[Draw]:
    """The draws of optimizer step ``step``, counted from 0; every epoch has its own random order of examples."""
    epoch, number = divmod(step, steps_per_epoch(examples, batch_size))
    order = _order(examples, seed, epoch)
    return [Draw(epoch, example) for example in order[number * batch_size : (number + 1) * batch_size]]


@lru_cache(maxsize=1)
def _order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"{seed}-order-{epoch}").sample(range(examples), examples))
