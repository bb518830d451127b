"""Which examples each optimizer step sees: a function of the seed and the step alone, so a run can go on anywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of one example: its number, and how often all examples have been used before."""

    epoch: int
    example: int

    def rng(self, seed: int, purpose: str) -> random.Random:
        """What is random about this use, such as its negatives, whoever asks and whenever."""
        return random.Random(f"{seed}-{purpose}-{self.epoch}-{self.example}")


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps that use every example once; the last may be smaller."""
    return -(-examples // batch_size)


def batch_at(step: int, examples: int, batch_size: int, seed: int) -> list[Draw]:
    """The draws of optimizer step ``step``, counted from 0; every epoch goes through the examples in another order."""
    epoch, number = divmod(step, steps_per_epoch(examples, batch_size))
    order = _order(examples, seed, epoch)
    return [Draw(epoch, example) for example in order[number * batch_size : (number + 1) * batch_size]]


@lru_cache(maxsize=1)
def _order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"{seed}-order-{epoch}").sample(range(examples), examples))
