"""Experts in the LLM's attention on vLLM: a bank of expert sets, joined with the engine's attention by log-sum-exp.

The engine computes attention over the context as always. For tokens with experts, the result is scaled by the context's
share of the softmax over context and experts, and the experts' part is added. That share needs the log-sum-exp of the
context's logits, which vLLM's attention does not return on every device. So the layers with experts keep a second copy
of the keys, by the engine's own slots, and compute it again. This works with any attention backend, with prefix
caching, chunks and sliding windows.

A LoRA adapter of each request says which set it uses; it has no other effect on these layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape, QueryAddition

MAX_LOGITS = 2**22
"""Largest number of logits of a prompt's tokens that are computed together."""


@dataclass(frozen=True)
class SetInLayer:
    """An expert set in one layer, for the heads of this process.

    Attributes:
        keys, values: ``[KV heads, units, width]``.
        bias: added to the units' logits, ``[KV heads, query heads per KV head, units]``.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Batch:
    """The requests of a forward pass of the engine, and where it caches their keys.

    Attributes:
        starts: the first token of each request, and the end of the last one.
        lengths: number of tokens of each request so far, with those of this pass.
        slots: for each layer's name, the cache slot of every token.
        tables: for each layer's name, the numbers of the cache blocks of every request, ``[requests, blocks]``.
        block_sizes: for each layer's name, tokens in a cache block.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    slots: Mapping[str, Tensor]
    tables: Mapping[str, Tensor]
    block_sizes: Mapping[str, int]


@dataclass(frozen=True)
class Rows:
    """The requests of a forward pass that have experts.

    Attributes:
        served: which tokens the experts act on, ``[tokens]``.
        single: requests with one token in this pass, which reads experts, as (request, token, set).
        several: requests with several tokens, as (request, first token, end, set).
        batch: all requests of the pass.
    """

    served: Tensor
    single: list[tuple[int, int, int]]
    several: list[tuple[int, int, int, int]]
    batch: Batch


class ExpertBank:
    """The expert sets of a process, and the requests of the current forward pass.

    Args:
        shape: layers and heads of the experts.
        layers: the layers that read them.
        rank, ranks: number of this process and number of processes with tensor parallelism.

    Attributes:
        set_of_slot: returns the number of the set in each adapter slot.
        batch: returns the batch of the current forward pass; None in a trial pass.
    """

    def __init__(self, shape: AttentionShape, layers: Sequence[int], rank: int, ranks: int) -> None:
        self.shape, self.layers = shape, tuple(layers)
        # With fewer KV heads than processes, several processes hold the same head.
        kv_heads = max(1, shape.num_kv_heads // ranks)
        first = rank * shape.num_kv_heads // ranks
        self._kv_heads = slice(first, first + kv_heads)
        heads = shape.num_heads // ranks
        self.heads = slice(rank * heads, (rank + 1) * heads)
        self._bias: Tensor | None = None
        self.queries: dict[int, QueryAddition] = {}
        self.sets: dict[int, dict[int, SetInLayer]] = {}
        self.set_of_slot: Callable[[], Sequence[int | None]] = list
        self.batch: Callable[[], Batch | None] = lambda: None
        self.rows: Rows | None = None
        self._stacked: dict[int, tuple[tuple[int, ...], SetInLayer]] = {}

    def share(self, bias: Tensor, queries: Sequence[QueryAddition]) -> None:
        """Take what all experts share.

        Args:
            bias: added to the logits of all units, ``[layers, heads]``.
            queries: for each layer of the shape, the addition to its queries; may be empty.
        """
        self._bias = bias
        width = self.shape.head_width
        columns = slice(self.heads.start * width, self.heads.stop * width)
        for layer, addition in zip(self.shape.layers, queries, strict=bool(queries)):
            self.queries[layer] = QueryAddition(addition.read, addition.write[:, columns].contiguous())

    def add(self, number: int, units: Tensor, gates: Tensor, dtype: torch.dtype) -> None:
        """Add a set.

        Args:
            number: its number.
            units: its units, ``[units, vectors, width]``.
            gates: for each unit, the gate of its expert.
            dtype: dtype of the LLM.
        """
        assert self._bias is not None
        experts = AttentionExperts.of(self.shape, self._bias, units[None])
        self.sets[number] = {layer: self._in_layer(experts, layer, gates[None], dtype) for layer in self.layers}

    def _in_layer(self, experts: AttentionExperts, layer: int, gates: Tensor, dtype: torch.dtype) -> SetInLayer:
        found = experts.layer(layer, gates)
        groups = self.shape.num_heads // self.shape.num_kv_heads
        bias = found.bias[0, :, :, 0].expand(self.shape.num_kv_heads, groups, -1)
        # With several processes for one KV head, each has some of its query heads.
        local = bias.flatten(0, 1)[self.heads].unflatten(0, (self._kv_heads.stop - self._kv_heads.start, -1))
        return SetInLayer(
            found.keys[self._kv_heads, 0].to(dtype), found.values[self._kv_heads, 0].to(dtype), local.float().clone()
        )

    def keep(self, numbers: Sequence[int]) -> None:
        """Drop all other sets."""
        for number in self.sets.keys() - set(numbers):
            del self.sets[number]
        self._stacked.clear()

    def begin(self, active: Tensor, slots: Tensor) -> None:
        """Start a forward pass.

        Args:
            active: whether each token is at or after the start of its request, ``[tokens]``.
            slots: the adapter slot of each token, -1 for none.
        """
        self.rows = None
        if not self.sets or (batch := self.batch()) is None:
            return
        of_slot = self.set_of_slot()
        single, several = [], []
        slot_of, acts = slots.tolist(), active.tolist()
        served = torch.zeros(len(active), dtype=torch.bool)
        for request, (first, end) in enumerate(pairwise(batch.starts)):
            if first == end or slot_of[first] < 0 or (number := of_slot[slot_of[first]]) not in self.sets:
                continue
            assert number is not None
            served[first:end] = True
            if end - first > 1:
                several.append((request, first, end, number))
            elif acts[first]:
                single.append((request, first, number))
        if served.any():  # also if none of them reads now: later tokens need the keys of this pass
            self.rows = Rows(served.to(active.device) & active, single, several, batch)

    def stacked(self, layer: int, numbers: tuple[int, ...]) -> SetInLayer:
        """Several sets in a layer, padded to the same number of units, with a leading dimension."""
        known = self._stacked.get(layer)
        if known is None or known[0] != numbers:
            sets = [self.sets[number][layer] for number in numbers]
            most = max(one.keys.shape[1] for one in sets)
            keys, values = (
                torch.stack([nn.functional.pad(part, (0, 0, 0, most - part.shape[1])) for part in parts])
                for parts in ([one.keys for one in sets], [one.values for one in sets])
            )
            pad = float("-inf")
            bias = [nn.functional.pad(one.bias, (0, most - one.bias.shape[2]), value=pad) for one in sets]
            known = self._stacked[layer] = (numbers, SetInLayer(keys, values, torch.stack(bias)))
        return known[1]


class ExpertReader:
    """Joins the experts of a layer with the engine's attention.

    Args:
        layer: index of the layer.
        bank: the process's expert sets.
    """

    def __init__(self, layer: int, bank: ExpertBank) -> None:
        self.layer, self.bank = layer, bank
        self._keys: Tensor | None = None

    def join(self, attention: Any, query: Tensor, key: Tensor, output: Tensor) -> None:
        """Change the output of attention over the context to that over context and experts, in place.

        Args:
            attention: the engine's attention layer.
            query: rotated queries, ``[tokens, heads x width]``.
            key: rotated keys, ``[tokens, KV heads x width]``.
            output: output of the layer, ``[tokens, heads x width]``.
        """
        rows = self.bank.rows
        if rows is None:
            return
        kv_heads, width = attention.num_kv_heads, attention.head_size
        query = query.view(len(query), kv_heads, -1, width)
        output = output.view(query.shape)
        name = attention.layer_name
        self._store(key.view(-1, kv_heads, width), rows.batch.slots[name])
        table, block = rows.batch.tables[name], rows.batch.block_sizes[name]
        scale, softcap = attention.impl.scale, attention.impl.logits_soft_cap or 0.0
        rule = _Rule(scale, softcap, attention.sliding_window)
        if rows.single:
            self._single(rows, rule, query, output, table, block)
        for request, first, end, number in rows.several:
            context = _slots(table[request], rows.batch.lengths[request], block)
            self._several(rows, rule, query, output, context, first, end, number)

    def _store(self, key: Tensor, slots: Tensor) -> None:
        slots = slots[: len(key)].long()
        needed = int(slots.max()) + 1
        if self._keys is None or len(self._keys) < needed:
            # The engine does not say the size of its cache here, so this grows to what is used.
            grown = key.new_zeros(max(needed, 2 * (0 if self._keys is None else len(self._keys))), *key.shape[1:])
            if self._keys is not None:
                grown[: len(self._keys)] = self._keys
            self._keys = grown
        real = slots >= 0
        self._keys[slots[real]] = key[: len(slots)][real]

    def _single(self, rows: Rows, rule: _Rule, query: Tensor, output: Tensor, tables: Tensor, block: int) -> None:
        requests, tokens, numbers = (list(column) for column in zip(*rows.single, strict=True))
        device = query.device
        found = [rows.batch.lengths[request] for request in requests]
        lengths, longest = torch.tensor(found, device=device), max(found)
        places = torch.arange(longest, device=device)
        seen = rule.sees(lengths[:, None] - 1, places)
        at = torch.tensor(tokens, device=device)
        assert self._keys is not None
        own_tables = tables[torch.tensor(requests, device=tables.device)]
        keys = self._keys[_slots(own_tables, longest, block) * seen]
        _read(rule, query, output, at, seen, keys, self.bank.stacked(self.layer, tuple(numbers)), own="t")

    def _several(
        self,
        rows: Rows,
        rule: _Rule,
        query: Tensor,
        output: Tensor,
        context: Tensor,
        first: int,
        end: int,
        number: int,
    ) -> None:
        length, experts = len(context), self.bank.sets[number][self.layer]
        tokens = first + rows.served[first:end].nonzero().flatten()
        if not len(tokens):
            return
        assert self._keys is not None
        keys = self._keys[context]
        places = torch.arange(length, device=query.device)
        heads = query.shape[1] * query.shape[2]
        for some in tokens.split(max(1, MAX_LOGITS // (heads * (length + experts.keys.shape[1])))):
            seen = rule.sees((some - end + length)[:, None], places)
            _read(rule, query, output, some, seen, keys, experts, own="")


def _slots(table: Tensor, length: int, block: int) -> Tensor:
    """The cache slots of a request's tokens: ``[..., length]`` for block tables ``[..., blocks]``."""
    places = torch.arange(length, device=table.device)
    return table.long()[..., places // block] * block + places % block


@dataclass(frozen=True)
class _Rule:
    """How a layer makes logits of products of queries and keys, and which keys it sees."""

    scale: float
    softcap: float
    window: int | None

    def sees(self, position: Tensor, places: Tensor) -> Tensor:
        """Whether tokens at these positions see the keys at these places."""
        seen = places <= position
        return seen if self.window is None else seen & (position - places < self.window)

    def logits(self, products: Tensor) -> Tensor:
        logits = products.float() * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def _read(
    rule: _Rule,
    query: Tensor,
    output: Tensor,
    tokens: Tensor,
    seen: Tensor,
    keys: Tensor,
    experts: SetInLayer,
    *,
    own: str,
) -> None:
    """Join the experts of some tokens with their attention over the context, in place.

    Args:
        rule: how logits are made.
        query, output: of all tokens, ``[all tokens, KV heads, query heads per KV head, width]``.
        tokens: the tokens, ``[tokens]``.
        seen: which of the context's tokens each of them sees, ``[tokens, context]``.
        keys: the context's keys, ``[context, KV heads, width]``.
        experts: the experts.
        own: ``t`` if every token has its own keys and experts, with a leading dimension ``[tokens]``; else empty.
    """
    q = query[tokens]
    context = rule.logits(torch.einsum(f"tkgd,{own}lkd->tkgl", q, keys)).masked_fill(~seen[:, None, None], -torch.inf)
    units = rule.logits(torch.einsum(f"tkgd,{own}kud->tkgu", q, experts.keys)) + experts.bias
    of_context = context.logsumexp(-1, keepdim=True)
    whole = torch.logaddexp(of_context, units.logsumexp(-1, keepdim=True))
    added = torch.einsum(f"tkgu,{own}kud->tkgd", (units - whole).exp().to(q.dtype), experts.values)
    output[tokens] = output[tokens] * (of_context - whole).exp().to(q.dtype) + added


def join_experts(layer: Any, number: int, bank: ExpertBank) -> None:
    """Make a decoder layer of vLLM read the bank's experts.

    Args:
        layer: the decoder layer, with ``self_attn.attn`` and ``self_attn.qkv_proj``.
        number: its index.
        bank: the process's expert sets.
    """
    attention = layer.self_attn.attn
    attention.genpoe_reader = ExpertReader(number, bank)
    # Changing the class instead of wrapping keeps the name by which the engine knows the layer.
    attention.__class__ = _joined(type(attention))

    def add_to_queries(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        addition = bank.queries.get(number)
        if bank.rows is None or addition is None:
            return output
        (x, *_rest), (joined, *rest) = args, output
        added = addition.of(x) * bank.rows.served[:, None].to(x.dtype)
        joined[:, : added.shape[1]] += added.to(joined.dtype)
        return (joined, *rest)

    layer.self_attn.qkv_proj.register_forward_hook(add_to_queries)


def _joined(attention: Any) -> Any:
    """A subclass of the engine's attention that joins the experts of its ``genpoe_reader``."""

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = attention.forward(self, query, key, value, *args, **kwargs)
        self.genpoe_reader.join(self, query, key, output)
        return output

    return type(f"{attention.__name__}WithExperts", (attention,), {"forward": forward})
