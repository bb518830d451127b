"""The most memory that tensors take at one moment, counted where they are made: on CPU as on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from genpoe_plugin.training.memory import Alive


def peak_bytes(work: Callable[[], None], existing: Iterable[Tensor] = ()) -> int:
    """The most bytes that tensors took at any moment of ``work``, ``existing`` ones, made before, among them."""
    with Alive() as alive:
        alive.count(existing)
        work()
    return alive.most


def tensors_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Parameters and buffers of a module, and what its optimizer keeps; gradients are dropped."""
    module.zero_grad(set_to_none=True)
    kept = list(module.state_dict().values())
    states = optimizer.state.values() if optimizer else ()
    return kept + [value for state in states for value in state.values() if isinstance(value, Tensor)]
