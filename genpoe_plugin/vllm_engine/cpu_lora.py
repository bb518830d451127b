"""Fix vLLM's LoRA layers on a CPU for requests without an adapter, and make them fast for many adapters in a batch.

vLLM 0.32's CPU code selects a token's adapter by slot number. For tokens without an adapter, the number is -1, so it
applies the last slot; the GPU kernels return early instead. It also copies the adapter's weights once per token.
tests/lm/vllm/test_cpu_lora.py fails once vLLM no longer applies the last slot to these tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_MIN_RUN = 8
"""Smallest run of tokens with one adapter for which a separate product is faster than copying weights."""


class SegmentedPunica(PunicaWrapperCPU):
    """Computes one product for neighbouring tokens with the same adapter, and none for tokens without an adapter."""

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """Compute ``y += x · Aᵀ · Bᵀ`` in place, with each token's own A and B."""
        (a,), (b,) = lora_a_stacked, lora_b_stacked
        for rows, slots in self._groups():
            if isinstance(slots, int):
                y[rows] += scale * (x[rows] @ a[slots, 0].mT) @ b[slots, 0].mT
            else:
                inner = torch.bmm(x[rows].unsqueeze(1), a[slots, 0].mT)
                y[rows] += scale * torch.bmm(inner, b[slots, 0].mT).squeeze(1)

    def _groups(self) -> list[tuple[slice | Tensor, int | Tensor]]:
        """Groups of rows to compute together, with their slot or slots; they are the same in all layers of a pass."""
        indices = self.token_lora_indices
        slots, counts = torch.unique_consecutive(indices, return_counts=True)
        long = (counts >= _MIN_RUN) & (slots >= 0)
        groups: list[tuple[slice | Tensor, int | Tensor]] = []
        ends = counts.cumsum(0)
        for slot, count, end in zip(slots[long].tolist(), counts[long].tolist(), ends[long].tolist(), strict=True):
            groups.append((slice(end - count, end), slot))
        short = ((~long & (slots >= 0)).repeat_interleave(counts)).nonzero().squeeze(1)
        if len(short):
            groups.append((short, indices[short]))
        return groups


def fix_cpu_lora(model: nn.Module) -> None:
    """Make the LoRA layers of ``model`` compute with `SegmentedPunica`."""
    for module in model.modules():
        punica = getattr(module, "punica_wrapper", None)
        if type(punica) is PunicaWrapperCPU:
            # Changes the class of the object itself, because vLLM keeps updating this object with each token's adapter.
            punica.__class__ = SegmentedPunica
