"""Sizes of a hypernetwork and its experts, computed from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork


@dataclass(frozen=True)
class Footprint:
    """Sizes of a hypernetwork and its experts.

    Attributes:
        parameters: number of trained values, including those that all experts share.
        base_numbers: number of values that are saved with the parameters but stay as drawn.
        expert_bytes: bytes of one expert without shared tensors; for experts in the attention, bytes of one unit.
    """

    parameters: int
    base_numbers: int
    expert_bytes: int


def footprint(config: HypernetworkConfig, dtype: torch.dtype = torch.float32) -> Footprint:
    """The sizes for ``config``, with experts in ``dtype``, computed without allocating the tensors."""
    with torch.device("meta"):
        hypernetwork = Hypernetwork(config)
        expert = hypernetwork(torch.empty(1, 1, *hypernetwork.state_shape), torch.ones(1, 1, dtype=torch.bool))[0]
    return Footprint(
        parameters=sum(parameter.numel() for parameter in hypernetwork.parameters()),
        base_numbers=sum(buffer.numel() for buffer in hypernetwork.buffers()),
        expert_bytes=expert.to(dtype).nbytes,
    )
