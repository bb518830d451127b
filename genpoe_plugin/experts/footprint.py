"""The sizes of a hypernetwork and its experts, computed from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork


@dataclass(frozen=True)
class Footprint:
    """Sizes of a hypernetwork and its experts.

    Attributes:
        parameters: numbers that are trained.
        base_numbers: numbers that are saved with them but stay as drawn.
        expert_bytes: of one expert's own weights; in the attention, of one of its units, which it has one of for each
            window of tokens. What all experts share is among the parameters.
    """

    parameters: int
    base_numbers: int
    expert_bytes: int


def footprint(config: HypernetworkConfig, dtype: torch.dtype = torch.float32) -> Footprint:
    """The sizes of ``config``, with experts in ``dtype``; nothing of that size is allocated."""
    with torch.device("meta"):
        hypernetwork = Hypernetwork(config)
        expert = hypernetwork(torch.empty(1, 1, *hypernetwork.state_shape), torch.ones(1, 1, dtype=torch.bool))[0]
    return Footprint(
        parameters=sum(parameter.numel() for parameter in hypernetwork.parameters()),
        base_numbers=sum(buffer.numel() for buffer in hypernetwork.buffers()),
        expert_bytes=expert.to(dtype).nbytes,
    )
