"""Peak memory of tensors on any device, counted at their allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from genpoe_plugin.training.memory import Alive


def peak_bytes(work: Callable[[], None], existing: Iterable[Tensor] = ()) -> int:
    """Peak bytes of tensors during ``work``, including the ``existing`` ones."""
    with Alive() as alive:
        alive.count(existing)
        work()
    return alive.most


def tensors_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Parameters and buffers of a module and the state of its optimizer; gradients are dropped."""
    module.zero_grad(set_to_none=True)
    tensors = list(module.state_dict().values())
    states = optimizer.state.values() if optimizer else ()
    return tensors + [value for state in states for value in state.values() if isinstance(value, Tensor)]
