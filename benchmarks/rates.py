"""What this machine does in the same run: seconds of a work, bytes read and FLOPs a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    """The time of one call, on a GPU until what it started has ended."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def least_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The shortest of a few calls after a first one: a rate is what a machine can do when nothing disturbs it."""
    work()
    return min(seconds(work) for _ in range(rounds))


def product(size: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """A square product, of ``product_flops(size)``."""
    left, right = torch.rand(2, size, size, device=device).to(dtype)
    return lambda: left @ right


def product_flops(size: int) -> int:
    return 2 * size**3


def product_rate(size: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOPs a second of a square product."""
    return product_flops(size) / least_seconds(product(size, dtype, device))


def read_rate(device: str = "cpu", megabytes: int = 512) -> float:
    """Bytes a second at which weights are read: those of a matrix too large for any cache, times a vector."""
    matrix = torch.zeros(megabytes * 2**20 // 4 // 4096, 4096, device=device)
    vector = torch.zeros(4096, device=device)
    return matrix.nbytes / least_seconds(lambda: matrix @ vector)
