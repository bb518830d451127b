"""Timing of a call, and reference operations that measure the machine: FLOPs and bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object]) -> float:
    """Time of one call; on a GPU, until its kernels have finished."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product(size: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """A square matrix product of ``product_flops(size)``."""
    left, right = torch.rand(2, size, size, device=device).to(dtype)
    return lambda: left @ right


def product_flops(size: int) -> int:
    return 2 * size**3


def reading(device: str = "cpu") -> tuple[Callable[[], torch.Tensor], int]:
    """A matrix-vector product that reads weights as decoding does, larger than any cache; and its bytes."""
    matrix = torch.zeros(32_768, 4096, device=device)
    vector = torch.zeros(4096, device=device)
    return lambda: matrix @ vector, matrix.nbytes
