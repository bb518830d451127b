"""vLLM's LoRA layers on a CPU: made right for requests without an adapter, and fast for many adapters in a batch.

vLLM 0.32's CPU code looks up every token's adapter by a slot number that is -1 for a token without one, and so applies
the last slot to it; its GPU kernels return early instead. It also copies the adapter's weights once for every token of
a prompt. tests/vllm/test_cpu_lora.py fails as soon as vLLM has mended the former.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_LONG = 8
"""From so many tokens in a row with one adapter on, a product of their own costs less than to copy weights."""


class SegmentedPunica(PunicaWrapperCPU):
    """Neighbouring tokens with the same adapter share one product, and those without one have none."""

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
        """As vLLM's: ``y += x · Aᵀ · Bᵀ`` with each token's own A and B, in place."""
        (a,), (b,) = lora_a_stacked, lora_b_stacked
        for rows, slots in self._groups():
            if isinstance(slots, int):
                y[rows] += scale * (x[rows] @ a[slots, 0].mT) @ b[slots, 0].mT
            else:
                inner = torch.bmm(x[rows].unsqueeze(1), a[slots, 0].mT)
                y[rows] += scale * torch.bmm(inner, b[slots, 0].mT).squeeze(1)

    def _groups(self) -> list[tuple[slice | Tensor, int | Tensor]]:
        """Rows that are computed together and their slot, or slots; the same for all layers of a pass."""
        indices = self.token_lora_indices
        slots, counts = torch.unique_consecutive(indices, return_counts=True)
        long = (counts >= _LONG) & (slots >= 0)
        groups: list[tuple[slice | Tensor, int | Tensor]] = []
        ends = counts.cumsum(0)
        for slot, count, end in zip(slots[long].tolist(), counts[long].tolist(), ends[long].tolist(), strict=True):
            groups.append((slice(end - count, end), slot))
        short = ((~long & (slots >= 0)).repeat_interleave(counts)).nonzero().squeeze(1)
        if len(short):
            groups.append((short, indices[short]))
        return groups


def mend(model: nn.Module) -> None:
    """Have the LoRA layers of ``model`` compute as `SegmentedPunica` does."""
    for module in model.modules():
        punica = getattr(module, "punica_wrapper", None)
        if type(punica) is PunicaWrapperCPU:
            # Of the object itself, which vLLM goes on telling which token has which adapter.
            punica.__class__ = SegmentedPunica
