"""Expert sets: the experts, gates and start of one request, as tensors of a LoRA adapter for vLLM.

A LoRA adapter adds ``B · A · x`` to a layer. Our layers have no weights of their own, so they output only what the
adapter adds:

    factored     up    A = I, B = the cores M_u of all experts, stacked vertically
                 down  A = the cores g · M_d, side by side, B = I
    dense        up0, up1, ...      A = W1, B = W2          one of each per expert
                 down0, down1, ...  A = W3, B = g · W4
    all          start A = 1, B = the digits of the first position that the experts act on

Experts in the attention are no adapters: their units and gates go into the bank of `attention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genpoe_plugin.experts.attention import AttentionExperts
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts

# Integers up to the base are exact in bfloat16, and three digits exceed the length of any context.
BASE, DIGITS = 256, 3
# vLLM takes names such as "up_proj" or "experts" for layers of the LLM itself.
PREFIX = "genpoe_"
START = f"{PREFIX}start"
UNITS, GATES = "units", "gates"
SHARED = 0
"""The number in a message for what all sets share; sets are numbered from 1."""


@dataclass(frozen=True)
class Carrier:
    """The sizes of a layer that holds a part of an expert set.

    Attributes:
        inputs: input width.
        rank: rank of the LoRA adapter.
        outputs: output width.
    """

    inputs: int
    rank: int
    outputs: int


def is_factored(config: HypernetworkConfig) -> bool:
    """Whether experts are two cores between shared matrices."""
    return config.head != "dense"


def carriers(config: HypernetworkConfig, num_passages: int) -> dict[str, Carrier]:
    """The layers that hold sets of up to ``num_passages`` experts, by name."""
    start = {START: Carrier(1, 1, DIGITS)}
    if config.head == "attention":
        return start
    if is_factored(config):
        size = config.core_size
        joined_size = num_passages * size
        return start | {
            f"{PREFIX}up": Carrier(size, size, joined_size),
            f"{PREFIX}down": Carrier(joined_size, size, size),
        }
    width, inner, rank = config.hidden_size, config.expert_width, config.rank
    return start | {
        f"{PREFIX}{name}{number}": carrier
        for number in range(num_passages)
        for name, carrier in (("up", Carrier(width, rank, inner)), ("down", Carrier(inner, rank, width)))
    }


def expert_set(experts: Experts, gates: Sequence[float], start: int) -> dict[str, Tensor]:
    """The tensors of an expert set, without identity matrices, which `adapters` adds.

    Args:
        experts: experts with one leading dimension ``[K]``.
        gates: K gates; for experts in the attention, one per unit.
        start: the first position that the experts act on.

    Returns:
        Contiguous tensors in the experts' dtype on the CPU; a key is the carrier's name with ``.A`` or ``.B``, or for
        the bank `UNITS` or `GATES`.
    """
    digits = torch.tensor([start // BASE**place % BASE for place in range(DIGITS)])[:, None]
    dtype = experts.weights[0].dtype
    if isinstance(experts, AttentionExperts):
        begin = {f"{START}.B": digits.to(torch.float32), GATES: torch.tensor(gates, dtype=torch.float32)}
        return {**begin, UNITS: experts.units.cpu().contiguous()}
    gate = torch.tensor(gates, dtype=torch.float32)[:, None, None].to(experts.weights[0].device)
    parts: dict[str, Tensor] = {}
    if isinstance(experts, FactoredExperts):
        parts["up.B"] = experts.core_up.flatten(0, 1)
        parts["down.A"] = (gate * experts.core_down).transpose(0, 1).flatten(1)
    else:
        assert isinstance(experts, DenseExperts)
        for number, (w1, w2, w3, w4) in enumerate(zip(*experts.weights[:3], gate * experts.w4, strict=True)):
            parts |= {f"up{number}.A": w1, f"up{number}.B": w2, f"down{number}.A": w3, f"down{number}.B": w4}
    parts["start.B"] = digits
    return {PREFIX + name: part.to(dtype).cpu().contiguous() for name, part in parts.items()}


def adapters(parts: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices A and B for every carrier of a set, from the result of `expert_set`."""
    pairs = {}
    for name in dict.fromkeys(name[:-2] for name in parts):
        a, b = parts.get(f"{name}.A"), parts.get(f"{name}.B")
        if a is None:
            assert b is not None
            a = torch.eye(b.shape[1], dtype=b.dtype)
        elif b is None:
            b = torch.eye(a.shape[0], dtype=a.dtype)
        pairs[name] = (a, b)
    return pairs


def shared_parts(experts: AttentionExperts) -> dict[str, Tensor]:
    """What all experts in the attention share: the heads' bias, and the additions to queries."""
    parts = {"bias": experts.bias}
    for number, addition in enumerate(experts.queries):
        parts |= {f"read{number}": addition.read, f"write{number}": addition.write}
    return {name: part.cpu().contiguous() for name, part in parts.items()}
