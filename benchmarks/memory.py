"""Peak memory of tensors on any device, counted at their allocation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class _Alive(TorchDispatchMode):
    """Counts every storage from the operation that allocates it until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary()
        self.now = 0
        self.peak = 0

    def known(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_bytes(work: Callable[[], None], existing: Iterable[Tensor] = ()) -> int:
    """Peak bytes of tensors during ``work``, including the ``existing`` ones."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in existing}
    alive = _Alive()
    alive.known(storages.values())
    with alive:
        work()
    return alive.peak + sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def tensors_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Parameters and buffers of a module and the state of its optimizer; gradients are dropped."""
    module.zero_grad(set_to_none=True)
    tensors = list(module.state_dict().values())
    states = optimizer.state.values() if optimizer else ()
    return tensors + [value for state in states for value in state.values() if isinstance(value, Tensor)]
