"""Measure the time to the first new token of batches that transformers generates from."""

from __future__ import annotations

import time

import torch
from transformers import LogitsProcessor


class FirstTokenClock(LogitsProcessor):
    """A logits processor that changes no logits and measures when those of the first new token are known."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds = 0.0
        self._rows = 0

    def start(self) -> None:
        """Start the time of the next batch."""
        self._started = time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._started is not None:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)  # the GPU may not have computed them yet
            self._seconds += len(scores) * (time.perf_counter() - self._started)
            self._rows += len(scores)
            self._started = None
        return scores

    @property
    def mean(self) -> float | None:
        """Mean seconds to the first token over all rows, which wait for their batch; None before the first batch."""
        return self._seconds / self._rows if self._rows else None
