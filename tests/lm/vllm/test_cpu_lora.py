"""Our LoRA products on a CPU, against a loop over tokens; and whether vLLM's own have been mended."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from genpoe_plugin.vllm_engine.cpu_lora import SegmentedPunica

SLOTS = [7, 3, None, 5]
"""The adapter in each slot."""
A, B = torch.randn(4, 1, 6, 10), torch.randn(4, 1, 12, 6)


def product(kind: type[PunicaWrapperCPU], adapters: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added for tokens with these adapters (0: none), and what should be."""
    wrapper = kind(max_num_batched_tokens=256, max_batches=256, device="cpu")
    wrapper.update_metadata(LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=True), SLOTS, 5, 100)
    generator = torch.Generator().manual_seed(len(adapters))
    x, y = torch.randn(len(adapters), 10, generator=generator), torch.randn(len(adapters), 12, generator=generator)
    expected = y.clone()
    for row, adapter in enumerate(adapters):
        if adapter:
            slot = SLOTS.index(adapter)
            expected[row] += B[slot, 0] @ (A[slot, 0] @ x[row])
    wrapper.add_lora_linear(y, x, (A,), (B,), 1.0, (12,))
    return y, expected


@pytest.mark.parametrize(
    "adapters",
    [
        [7, 3, 5, 0, 7],
        [0, 0, 0],
        [3] * 20 + [0] * 20 + [5] * 3 + [7] + [5] * 30 + [0],
        [0] + [7, 0] * 9 + [3] * 8,
        [5],
    ],
)
def test_every_token_has_the_product_of_its_adapter(adapters):
    found, expected = product(SegmentedPunica, adapters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_vllm_still_gives_the_last_adapter_to_tokens_without_one():
    """If this fails, vLLM is mended: then `SegmentedPunica` is there for its speed only, and its text should say so."""
    found, expected = product(PunicaWrapperCPU, [7, 0, 3])
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], expected[1])
