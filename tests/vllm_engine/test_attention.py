"""The bank of experts in the attention, in every process of a tensor-parallel engine, against one softmax by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from genpoe_plugin.experts.attention import AttentionShape
from genpoe_plugin.vllm_engine.attention import Batch, ExpertBank, ExpertReader

HEADS, KV_HEADS, WIDTH, BLOCK, SCALE = 4, 2, 8, 4, 0.5
LAYER = 2  # the second of two layers with experts
SHAPE = AttentionShape((0, LAYER), (tuple(range(KV_HEADS)),) * 2, HEADS, KV_HEADS, WIDTH)
UNITS = {11: 5, 12: 3}
# Of each request: the number of its set in each slot, the first token that reads, the tokens of two passes, its blocks.
SETS, STARTS, PASSES = [11, None, 12], [2, 0, 1], [(6, 4, 5), (1, 1, 3)]
TABLES = torch.tensor([[5, 2], [1, 7], [3, 0]])
LENGTHS = [sum(parts) for parts in zip(*PASSES, strict=True)]


def logits(q: torch.Tensor, keys: torch.Tensor, softcap: float) -> torch.Tensor:
    found = keys @ q * SCALE
    return softcap * torch.tanh(found / softcap) if softcap else found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (3, 0.0), (None, 2.0)])
def test_context_and_experts_share_a_softmax(ranks, window, softcap):
    generator = torch.Generator().manual_seed(ranks)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    bias = random(2, HEADS)
    units = {number: random(count, SHAPE.vectors, WIDTH) for number, count in UNITS.items()}
    gates = {number: random(count).exp() for number, count in UNITS.items()}
    queries = [random(length, HEADS, WIDTH) for length in LENGTHS]
    keys, values = ([random(length, KV_HEADS, WIDTH) for length in LENGTHS] for _ in range(2))

    def expected(request: int, place: int, head: int, with_experts: bool) -> torch.Tensor:
        kv_head, q = head * KV_HEADS // HEADS, queries[request][place, head]
        first = 0 if window is None else max(0, place + 1 - window)
        scores = logits(q, keys[request][first : place + 1, kv_head], softcap)
        mixed = values[request][first : place + 1, kv_head]
        number = SETS[request]
        if with_experts and number is not None and place >= STARTS[request]:
            own = units[number].unflatten(1, (2, 2, KV_HEADS))[:, 1, :, kv_head]  # layer, then keys or values
            added = logits(q, own[:, 0], softcap) + (gates[number] / gates[number].max()).log() + bias[1, head]
            scores, mixed = torch.cat([scores, added]), torch.cat([mixed, own[:, 1]])
        return scores.softmax(0) @ mixed

    changed = 0
    for rank in range(ranks):
        local = range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
        kv_heads = sorted({head * KV_HEADS // HEADS for head in local})
        bank = ExpertBank(SHAPE, [LAYER], rank, ranks)
        bank.share(bias, [])
        for number in UNITS:
            bank.add(number, units[number], gates[number], torch.float32)
        bank.set_of_slot = lambda: [12, None, 11]
        reader = ExpertReader(LAYER, bank)
        attention = SimpleNamespace(
            num_kv_heads=len(kv_heads),
            head_size=WIDTH,
            layer_name="attention",
            sliding_window=window,
            impl=SimpleNamespace(scale=SCALE, logits_soft_cap=softcap),
        )
        done = [0] * len(SETS)
        for counts in PASSES:
            places = [(r, done[r] + n) for r, count in enumerate(counts) for n in range(count)]
            done = [before + count for before, count in zip(done, counts, strict=True)]
            batch = Batch(
                starts=[sum(counts[:n]) for n in range(len(counts) + 1)],
                lengths=done,
                slots={"attention": torch.tensor([TABLES[r, n // BLOCK] * BLOCK + n % BLOCK for r, n in places])},
                tables={"attention": TABLES},
                block_sizes={"attention": BLOCK},
            )
            bank.batch = lambda batch=batch: batch
            slot = {11: 2, 12: 0, None: -1}
            bank.begin(
                torch.tensor([n >= STARTS[r] for r, n in places]),
                torch.tensor([slot[SETS[r]] for r, _ in places]),
            )
            query = torch.stack([queries[r][n, list(local)] for r, n in places]).flatten(1)
            key = torch.stack([keys[r][n, kv_heads] for r, n in places]).flatten(1)
            output, wanted = (
                torch.stack([torch.cat([expected(r, n, head, experts) for head in local]) for r, n in places])
                for experts in (False, True)
            )
            changed += int((output - wanted).abs().amax(1).gt(1e-2).sum())
            reader.join(attention, query, key, output)
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    reading = sum(length - start for length, start, number in zip(LENGTHS, STARTS, SETS, strict=True) if number)
    assert changed > reading * ranks * 0.9
