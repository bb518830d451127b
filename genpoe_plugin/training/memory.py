"""How much memory a training takes, measured in a trial step on fake tensors.

Fake tensors (torch's `FakeTensorMode`) have a device, a dtype and a shape, but no values. On them, the training's own
code runs in seconds at any size of the LLM, before weights are loaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genpoe_plugin.errors import InputError


class NoEstimate(InputError):
    """The LLM cannot run on fake tensors."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training takes on one device: the bytes of each part at the worst moment, by its name."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """For people: a line per part, and the total."""
        lines = [f"  {name:<46}{_bytes(size):>12}" for name, size in self.parts.items() if size]
        total = f"{'at most, at the same time':<48}{_bytes(self.total):>12}"
        return "\n".join(["memory in a training step", *lines, total])


class Trial(Protocol):
    """A training whose memory can be measured."""

    def measure(self) -> MemoryEstimate:
        """Run a step on fake tensors.

        Raises:
            NoEstimate: the LLM cannot.
        """

    def smaller(self) -> Iterable[Iterable[tuple[str, Trial]]]:
        """Groups of changes that may lower it, described; within a group from the smallest to the largest."""


def check_fits(trial: Trial, estimate: MemoryEstimate, available: int) -> None:
    """Refuse a training that needs more than ``available`` bytes.

    Raises:
        InputError: it does; the message says what takes the most, and what would make it fit.
    """
    if estimate.total <= available:
        return
    largest = sorted(estimate.parts.items(), key=lambda part: -part[1])[:3]
    needs = f"training needs about {_bytes(estimate.total)} of memory, {_bytes(available)} are free (most for "
    needs += ", ".join(f"{name} {_bytes(size)}" for name, size in largest) + ")"
    changes: dict[str, int] = {}
    for group in trial.smaller():
        change = "", estimate.total
        for text, changed in group:
            change = text, changed.measure().total
            if change[1] <= available:
                break
        if change[1] < estimate.total:
            changes[change[0]] = change[1]
    if fitting := [text for text, total in changes.items() if total <= available]:
        raise InputError(f"{needs}; it fits with {', or with '.join(fitting)}")
    if not changes:
        raise InputError(f"{needs}; it needs a larger device")
    advice = ", ".join(f"{text} (then {_bytes(total)})" for text, total in changes.items())
    raise InputError(f"{needs}; no change alone is enough, but these help: {advice}")


@contextmanager
def fake_tensors(*modules: nn.Module, device: torch.device) -> Iterator[None]:
    """Tensors made in the block are fake; those of ``modules``, on the meta device until now, are on ``device``.

    Raises:
        NoEstimate: an operation in the block is not possible on them, such as one that depends on values.
    """
    made: dict[int, Tensor] = {}  # tied weights stay tied
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in (part for whole in modules for part in whole.modules()):
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            tensors[name] = made.setdefault(id(tensor), _fake(tensor, device))  # type: ignore[assignment]
            yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise NoEstimate(f"no memory estimate, because this LLM cannot run on fake tensors ({reason})") from error


def measure_step(
    llm: nn.Module,
    module: nn.Module,
    losses: Callable[[], Tensor],
    device: torch.device,
    *,
    llm_bytes: int,
    precision: str,
    accumulated: bool,
    shards: int = 1,
) -> MemoryEstimate:
    """The memory of an optimizer step inside `fake_tensors`.

    Args:
        llm: the LLM, frozen or not.
        module: the module that learns; it may be the LLM.
        losses: the forward pass.
        device: of the weights that learn.
        llm_bytes: of the LLM's weights that do not learn, which are fewer than those of the fake tensors if they are
            quantised.
        precision: that the forward pass computes in.
        accumulated: whether the forward pass finds the gradients of an earlier one.
        shards: devices that what learns is sharded over.
    """
    learning = [weight for weight in module.parameters() if weight.requires_grad]
    frozen = [weight for weight in llm.parameters() if not weight.requires_grad]
    # The choice that torch makes by itself for tensors that are not fake.
    optimizer = torch.optim.AdamW(learning, foreach=device.type != "cpu")
    for weight in learning:
        weight.grad = torch.empty_like(weight)
    optimizer.step()  # makes the moments
    if not accumulated:
        optimizer.zero_grad(set_to_none=True)
    with Alive() as alive:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        held = {
            "LLM weights": alive.count(frozen),
            "weights that learn": alive.count(learning),
            "AdamW's moments": alive.count(moments),
            "gradients": sum(weight.nbytes for weight in learning),
            "buffers": alive.count([*llm.buffers(), *module.buffers()]),
        }
        alive.count([weight.grad for weight in learning if weight.grad is not None])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = losses().mean()
        loss.backward()
        optimizer.step()
    parts = {**held, "activations and intermediate results": alive.most - sum(held.values()), "LLM weights": llm_bytes}
    if shards > 1:  # a pass has the whole weights and gradients, in its own precision
        whole = 2 * sum(weight.numel() for weight in learning) * (2 if precision == "bfloat16" else 4)
        shared = ("weights that learn", "AdamW's moments", "gradients")
        parts |= {name: -(-parts[name] // shards) for name in shared} | {"unsharded for the pass": whole}
    return MemoryEstimate(parts)


class Alive(TorchDispatchMode):
    """The bytes ``now`` of the tensors counted and of those made inside the block, while alive, and the ``most``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages: dict[int, weakref.ref[Any]] = {}

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors made earlier, and return the bytes that they add."""
        before = self.now
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages[key] = weakref.ref(storage, partial(self._freed, key, size))
                self.now += size
        self.most = max(self.most, self.now)
        return self.now - before

    def _freed(self, key: int, size: int, _: object) -> None:
        self.now -= size
        del self.storages[key]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    fake = torch.empty_like(tensor, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _bytes(size: int) -> str:
    """``size`` in the largest unit that it fills."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
