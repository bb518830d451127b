"""The bank and its readers without vLLM: chunks of prompts, against one softmax over context and experts in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from genpoe_plugin.experts.attention import AttentionShape
from genpoe_plugin.vllm_engine.attention import Batch, ExpertBank, ExpertReader

KV_HEADS, GROUPS, WIDTH, BLOCK, TOKENS = 2, 2, 8, 4, 11
HEADS = KV_HEADS * GROUPS
TABLE = [3, 1, 4]
"""The blocks of the request, in an order of their own."""


def whole(query, keys, values, experts, start: int, at: int, window: int | None):
    """Output of the token ``at``, ``[heads, width]``; experts are (keys, values, bias), or None."""
    first = 0 if window is None else max(0, at - window + 1)
    rows = []
    for head in range(HEADS):
        kv = head // GROUPS
        k, v = keys[first : at + 1, kv], values[first : at + 1, kv]
        logits = k @ query[at, head] * WIDTH**-0.5
        if experts is not None and at >= start:
            own_keys, own_values, bias = experts
            logits = torch.cat([logits, own_keys[kv] @ query[at, head] * WIDTH**-0.5 + bias[head]])
            v = torch.cat([v, own_values[kv]])
        rows.append(logits.softmax(0) @ v)
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("chunks", "start"),
    [([11], 0), ([4, 7], 6), ([9, 1, 1], 10), ([1] * 11, 0), ([1] * 11, 7), ([8, 1, 1, 1], 10)],
)
def test_chunks_are_one_softmax(chunks, start, window):
    """Also chunks of a single token before the start: later tokens read its key."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    query, keys, values = draw(TOKENS, HEADS, WIDTH), draw(TOKENS, KV_HEADS, WIDTH), draw(TOKENS, KV_HEADS, WIDTH)
    shape = AttentionShape((0,), ((0, 1),), num_heads=HEADS, num_kv_heads=KV_HEADS, head_width=WIDTH)
    bank = ExpertBank(shape, (0,), 0, 1)
    bias, units, gates = draw(1, HEADS), draw(3, 2 * KV_HEADS, WIDTH), torch.tensor([0.2, 0.5, 0.3])
    bank.share(bias, ())
    bank.add(7, units, gates, torch.float64)
    bank.set_of_slot = lambda: [7]
    parts = units.view(3, 2, KV_HEADS, WIDTH).permute(1, 2, 0, 3)  # keys and values, by head
    experts = (*parts, bias[0, :, None] + (gates / gates.max()).log())
    reader = ExpertReader(0, bank)
    attention = SimpleNamespace(
        num_kv_heads=KV_HEADS,
        head_size=WIDTH,
        layer_name="layer",
        sliding_window=window,
        impl=SimpleNamespace(scale=WIDTH**-0.5, logits_soft_cap=0),
    )
    changed, first = 0, 0
    for count in chunks:
        end = first + count
        places = torch.arange(first, end)
        batch = Batch(
            starts=[0, count],
            lengths=[end],
            slots={"layer": torch.tensor(TABLE)[places // BLOCK] * BLOCK + places % BLOCK},
            tables={"layer": torch.tensor([TABLE])},
            block_sizes={"layer": BLOCK},
        )
        bank.batch = lambda batch=batch: batch
        context = torch.stack([whole(query, keys, values, None, 0, at, window) for at in range(first, end)])
        output = context.flatten(1).clone()
        bank.begin(places >= start, torch.zeros(count, dtype=torch.long))
        reader.join(attention, query[first:end].flatten(1), keys[first:end].flatten(1), output)
        wanted = torch.stack([whole(query, keys, values, experts, start, at, window) for at in range(first, end)])
        torch.testing.assert_close(output, wanted.flatten(1), atol=1e-6, rtol=1e-5)
        changed += int((wanted - context).abs().amax((1, 2)).gt(1e-2).sum())
        first = end
    assert changed == TOKENS - start, "experts have to matter"
