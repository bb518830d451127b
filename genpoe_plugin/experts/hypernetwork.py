"""The hypernetwork: token states of a passage -> a code, or what queries find -> the weights of an expert.

With the head ``attention`` the states are keys and values of the LLM's own attention, and they are the expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape, QueryAddition
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts, Factors, Weights
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS

PART = 32_768  # entries of a generated expert at a time


class MeanEncoder(nn.Module):
    """The paper's encoder: the mean over a passage's tokens, then ``Linear -> ReLU``.

    Blind to word order, unless the token states know of it.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.project = nn.Linear(config.hidden_size, config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(states.dtype)
        # As a product, which makes no second copy of the states.
        mean = (weights.unsqueeze(1) @ states).squeeze(1) / weights.sum(1, keepdim=True)
        if self.normalise:
            mean = functional.rms_norm(mean, mean.shape[-1:])
        return torch.relu(self.project(mean))


class Attention(nn.Module):
    """Learned queries that each look for their own kind of token.

    Each query is compared with the token states themselves: a projection of the keys could be folded into the query.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.hidden_size) / math.sqrt(config.hidden_size))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """What each query finds, ``[n, queries, d]``: a mean of token states."""
        if self.normalise:
            states = functional.rms_norm(states, states.shape[-1:])
        scores = states @ self.queries.mT  # [n, tokens, queries]
        weights = scores.masked_fill(~mask.bool().unsqueeze(-1), -math.inf).softmax(1)
        return weights.mT @ states


class AttentionEncoder(Attention):
    """What the queries find is joined and projected.

    A projection of the values could be folded into the layer that follows, which without it has one of full width a
    query.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__(config)
        size = config.value_size
        self.values = nn.Identity() if size is None else nn.Linear(config.hidden_size, size, bias=False)
        self.project = nn.Linear(config.num_queries * (size or config.hidden_size), config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return torch.relu(self.project(self.values(super().forward(states, mask)).flatten(1)))


class Generator(nn.Linear):
    """The layer whose outputs are the entries of matrices: so large that a pass over them costs as the product does."""

    def forward(
        self,
        code: Tensor,
        gain: float = 1.0,
        bases: Sequence[Tensor] | None = None,
        weights: Weights = (),
        rows: Tensor | None = None,
    ) -> Tensor:
        """``[n, code]`` to ``[n, entries]``; with ``bases``, without gradients, ``gain · layer + base`` into memory.

        What the layer is asked for is done here, and not by its owner, for sharded weights are whole only meanwhile.

        Args:
            code: ``[n, code]``.
            gain: with ``bases``.
            bases: matrices whose entries are, one after the other, those of the layer.
            weights: for each of them ``[any number, *its shape]``, where the results go.
            rows: ``[n]``, to which rows.
        """
        if bases is None or rows is None:
            return super().forward(code)
        code, begin = (gain * code).to(self.weight.dtype), 0
        most = max(base.numel() for base in bases)
        if code.device.type == "cpu":  # it lays out the matrix anew for its product: by parts, which stay in its cache
            most = min(PART, most)
        result = code.new_empty(len(code) * most)
        for base, kept in zip(bases, weights, strict=True):
            base, kept = base.to(self.weight.dtype).flatten(), kept.view(len(kept), base.numel())
            for place in range(0, len(base), most):
                some = base[place : place + most]
                own = slice(begin + place, begin + place + len(some))
                part = result[: len(code) * len(some)].view(len(code), len(some))
                torch.addmm(torch.add(some, self.bias[own], alpha=gain), code, self.weight[own].mT, out=part)
                kept[:, place : place + most].index_copy_(0, rows, part.to(kept.dtype))
            begin += len(base)
        return code.new_empty(0)


class DenseHead(nn.Module):
    """The paper's generator: one linear layer whose output is every entry of the four matrices."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        d, r, h = config.hidden_size, config.rank, config.expert_width
        self.shapes = ((r, d), (h, r), (r, h), (d, r))
        self.generate = Generator(config.code_size, 2 * r * (d + h))
        self.gain = config.generator_gain
        for number, shape in enumerate(self.shapes, start=1):
            base = torch.empty(shape)
            nn.init.kaiming_uniform_(base, a=math.sqrt(5))
            if config.base == "silent" and number == len(self.shapes):
                base.zero_()
            # A buffer, not a seed: another torch or device would draw another base, and so another model.
            self.register_buffer(f"base{number}", base)

    def forward(self, code: Tensor) -> DenseExperts:
        if not torch.is_grad_enabled():
            weights = tuple(code.new_empty(len(code), *shape) for shape in self.shapes)
            self.write(code, weights, torch.arange(len(code), device=code.device))
            return DenseExperts(*weights)
        sizes = [rows * columns for rows, columns in self.shapes]
        parts = (self.gain * self.generate(code)).split(sizes, dim=-1)
        return DenseExperts(
            *(part.unflatten(-1, base.shape) + base for part, base in zip(parts, self._bases(), strict=True))
        )

    def write(self, code: Tensor, weights: Weights, rows: Tensor) -> None:
        """As `Hypernetwork.write`, from codes."""
        self.generate(code, self.gain, self._bases(), weights, rows)

    def _bases(self) -> list[Tensor]:
        return [self.get_buffer(f"base{number}") for number in (1, 2, 3, 4)]


class FactoredHead(nn.Module):
    """Generates two cores of an expert, each the identity at first, between learned matrices that all experts share."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        d, h, self.size = config.hidden_size, config.expert_width, config.core_size
        self.generate = nn.Linear(config.code_size, 2 * self.size**2)
        self.gain = config.generator_gain
        # Of a scale that keeps that of what they read.
        self.read_up = nn.Parameter(torch.randn(self.size, d) / math.sqrt(d))
        self.write_up = nn.Parameter(torch.randn(h, self.size) / math.sqrt(self.size))
        self.read_down = nn.Parameter(torch.randn(self.size, h) / math.sqrt(h))
        silent = config.base == "silent"
        self.write_down = nn.Parameter(
            torch.zeros(d, self.size) if silent else torch.randn(d, self.size) / math.sqrt(self.size)
        )

    def forward(self, code: Tensor) -> FactoredExperts:
        generated = (self.gain * self.generate(code)).unflatten(-1, (2, self.size, self.size))
        cores = generated + torch.eye(self.size, dtype=code.dtype, device=code.device)
        factors = Factors(self.read_up, self.write_up, self.read_down, self.write_down)
        return FactoredExperts(factors, *cores.unbind(-3))


class MemoryHead(nn.Module):
    """Writes what each query found into an expert as a memory: a key to be asked with, and a value to be answered.

    With ``f_q`` what query ``q`` found, and the addresses ``a_q`` and ``b_q`` its own, the same for all passages, the
    cores are sums of outer products, as in fast weights (Schmidhuber, 1992; Schlag et al., 2021)::

        M_u = I + g · Σ_q a_q ⊗ (K f_q)        what the LLM asks about is compared with what was found
        M_d =     g · Σ_q (V f_q) ⊗ b_q        what was found is said where the address is called

    ``K`` and the matrix that reads the LLM's states start as the same orthonormal rows, and so do ``V`` and the one
    that writes: so a memory says from the start what was found, and only when to say it is left to learn. No code in
    between has to hold the passage, and no layer has to learn to spell it out again, which takes the other heads most
    of their training; this one also has no layer of ``p^2`` outputs.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        d, h, self.size, slots = config.hidden_size, config.expert_width, config.core_size, config.num_queries
        self.gain = config.generator_gain
        self.keys = nn.Parameter(nn.init.orthogonal_(torch.empty(self.size, d)))
        self.values = nn.Parameter(nn.init.orthogonal_(torch.empty(self.size, d)))
        silent, scale = config.base == "silent", 1 / math.sqrt(self.size)
        self.address_up = nn.Parameter(torch.randn(slots, self.size) * scale)
        self.address_down = nn.Parameter(
            torch.zeros(slots, self.size) if silent else torch.randn(slots, self.size) * scale
        )
        self.read_up = nn.Parameter(self.keys.detach().clone())
        self.write_up = nn.Parameter(torch.randn(h, self.size) * scale)
        self.read_down = nn.Parameter(torch.randn(self.size, h) / math.sqrt(h))
        self.write_down = nn.Parameter(self.values.detach().mT.clone(memory_format=torch.contiguous_format))

    def forward(self, found: Tensor) -> FactoredExperts:
        up = torch.eye(self.size, dtype=found.dtype, device=found.device)
        up = up + self.gain * self.address_up.mT @ (found @ self.keys.mT)
        down = self.gain * (found @ self.values.mT).mT @ self.address_down
        return FactoredExperts(Factors(self.read_up, self.write_up, self.read_down, self.write_down), up, down)


class AttentionHead(nn.Module):
    """What the LLM's attention keeps of a passage's tokens is the expert; untrained, there is nothing to generate.

    What is learned starts as nothing: a bias for each query head on the logits of all units, additions to the keys,
    values and queries of each layer, and scores by which the tokens of a window are pooled into one unit. Additions and
    scores come from the states that enter the layer, brought to unit root mean square, for the scales of LLMs differ
    widely. Keys are rotated already; what is added to them stands for no position. Queries are those of the tokens that
    the experts act on, before they are rotated.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.shape = AttentionShape.of(config)
        self.window, self.width, self.reads_states = config.window, config.hidden_size, config.reads_states
        # A unit stands for the tokens of a window, and begins with as much of the softmax as so many alike have. Beside
        # an MLP, a whole passage begins with as much of it as the null, whose logit is 0.
        bias = math.log(self.window) - (math.log(MAX_PASSAGE_TOKENS) if config.place == "mlp" else 0)
        self.bias = nn.Parameter(torch.full((len(self.shape.layers), self.shape.num_heads), bias))
        self.adders = nn.ModuleList(LayerAddition(config, len(heads)) for heads in self.shape.kv_heads)
        self.query_read = self.query_write = None
        if (rank := config.query_rank) is not None:
            layers, d = len(self.shape.layers), config.hidden_size
            width = self.shape.num_heads * self.shape.head_width
            self.query_read = nn.Parameter(torch.randn(layers, rank, d) / math.sqrt(d))
            self.query_write = nn.Parameter(torch.zeros(layers, rank, width))

    @property
    def queries(self) -> tuple[QueryAddition, ...]:
        """What is added to the queries of each layer; empty for nothing."""
        if self.query_read is None or self.query_write is None:
            return ()
        return tuple(map(QueryAddition, self.query_read, self.query_write))

    def forward(self, states: Tensor, mask: Tensor) -> AttentionExperts:
        """Units ``[n, windows]`` of states ``[n, tokens, ...]`` (see `Hypernetwork.state_shape`)."""
        if not self.reads_states:
            return replace(AttentionExperts.of(self.shape, self.bias, states), queries=self.queries)
        kept = self.shape.vectors * self.shape.head_width
        units, *hidden = states.split([kept, *[self.width] * len(self.adders)], -1)
        parts = units.unflatten(-1, (self.shape.vectors, self.shape.head_width)).split(self.shape.heads, -2)
        windows, inside = into_windows(mask, self.window)
        found: list[Tensor] = []
        for number, (adder, state) in enumerate(zip(self.adders, hidden, strict=True)):
            keys, values = parts[2 * number : 2 * number + 2]
            found += adder(keys, values, functional.rms_norm(state, state.shape[-1:]), windows, inside)
        return AttentionExperts(self.shape, self.bias, tuple(found), self.queries)


class LayerAddition(nn.Module):
    """Pools the tokens of each window, and adds to the keys and values of one layer.

    Args:
        heads: key-value heads that experts have in the layer.
    """

    def __init__(self, config: HypernetworkConfig, heads: int) -> None:
        super().__init__()
        d, rank, width = config.hidden_size, config.addition_rank, config.head_width
        assert width is not None
        self.scores = nn.Parameter(torch.zeros(heads, d)) if config.window > 1 else None
        self.read = self.write = None
        if rank is not None:
            self.read = nn.Parameter(torch.randn(rank, d) / math.sqrt(d))
            self.write = nn.Parameter(torch.zeros(2, heads, rank, width))  # to keys, and to values

    def forward(
        self, keys: Tensor, values: Tensor, state: Tensor, windows: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of units, ``[n, windows, heads, width]``.

        Args:
            keys, values: ``[n, tokens, heads, width]``.
            state: ``[n, tokens, d]``.
            windows, inside: of `into_windows`.
        """
        added = None if self.read is None else state @ self.read.mT
        if self.scores is None:
            low = None if added is None else added.unsqueeze(2)
        else:
            scores = gather_windows(state @ self.scores.mT, windows)
            weights = scores.masked_fill(~inside.unsqueeze(-1), -math.inf)
            # A window without tokens is padding; it has to stay finite.
            weights = weights.masked_fill(~inside.any(-1)[..., None, None], 0).softmax(2)
            keys = torch.einsum("nwth,nwthd->nwhd", weights, gather_windows(keys, windows))
            values = torch.einsum("nwth,nwthd->nwhd", weights, gather_windows(values, windows))
            low = None if added is None else torch.einsum("nwth,nwtr->nwhr", weights, gather_windows(added, windows))
        if low is None or self.write is None:
            return keys, values
        to_keys, to_values = torch.einsum("nwhr,khrd->knwhd", low.expand(*low.shape[:2], keys.shape[2], -1), self.write)
        return keys + to_keys, values + to_values


def into_windows(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which tokens stand in which window.

    Args:
        mask: ``[n, tokens]``, true on real tokens.
        size: tokens of a window; the last of a passage may have fewer.

    Returns:
        Places of tokens, ``[n, windows, size]``, and whether they are real.
    """
    counts = mask.sum(1)
    known = counts.numel() and counts.device.type != "meta"
    most = max(1, -(-int(counts.max()) // size)) if known else 1
    order = (~mask.bool()).long().argsort(dim=1, stable=True)  # real ones first, as they stand
    order = functional.pad(order, (0, max(0, most * size - mask.shape[1])))[:, : most * size]
    inside = torch.arange(most * size, device=mask.device) < counts.unsqueeze(1)
    return order.unflatten(1, (most, size)), inside.unflatten(1, (most, size))


def unit_mask(mask: Tensor, window: int) -> Tensor:
    """Which of the units that a `Hypernetwork` with the head ``attention`` makes are of a passage, ``[n, windows]``."""
    return mask if window == 1 else into_windows(mask, window)[1].any(-1)


def gather_windows(tokens: Tensor, windows: Tensor) -> Tensor:
    """``[n, tokens, ...]`` as ``[n, windows, size, ...]``."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    return tokens[rows, windows]


class AsItIs(nn.Module):
    """No encoder: states stay as they are, those of padding as well."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return states


HEADS = {"dense": DenseHead, "factored": FactoredHead, "memory": MemoryHead, "attention": AttentionHead}


def _encoder(config: HypernetworkConfig) -> nn.Module:
    if config.head == "attention":
        return AsItIs()
    if config.head == "memory":
        return Attention(config)
    return MeanEncoder(config) if config.encoder == "mean" else AttentionEncoder(config)


class Hypernetwork(nn.Module):
    """Generates one expert a passage."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.head = HEADS[config.head](config)

    def forward(self, states: Tensor, mask: Tensor) -> Experts:
        """Generate experts.

        Args:
            states: ``[n, tokens, *state_shape]``, what the LLM has for each token of ``n`` passages.
            mask: ``[n, tokens]``, true on real tokens; at least one a passage.

        Returns:
            ``[n]`` experts; with the head ``attention``, units ``[n, windows]``, arbitrary where there is padding.
        """
        code = self.encoder(states, mask).to(self.head_dtype)
        return self.head(code, mask) if isinstance(self.head, AttentionHead) else self.head(code)

    @torch.no_grad()
    def write(self, states: Tensor, mask: Tensor, weights: Weights, rows: Tensor) -> None:
        """Generate experts, without gradients, straight into memory that has room for many.

        New memory of an expert's size takes a CPU as long to get as the expert takes to generate.

        Args:
            states, mask: as of `forward`.
            weights: tensors as those of the experts, ``[any number, ...]``, of any dtype.
            rows: which rows of them the experts become, ``[n]``, or ``[all units]`` with the head ``attention``; no
                two are the same.
        """
        if self.config.head == "attention":
            units = unit_mask(mask, self.config.window)
            for kept, part in zip(weights, self(states, mask).weights, strict=True):
                kept.index_copy_(0, rows, part[units].to(kept.dtype))
            return
        code = self.encoder(states, mask).to(self.head_dtype)
        if isinstance(self.head, DenseHead):
            self.head.write(code, weights, rows)
        else:
            for kept, weight in zip(weights, self.head(code).weights, strict=True):
                kept.index_copy_(0, rows, weight.to(kept.dtype))

    @torch.no_grad()
    def none(self) -> Experts:
        """No experts, and what all of them share."""
        some = next(self.parameters())
        states = some.new_zeros(0, 1, *self.state_shape)
        experts = self(states, torch.ones(0, 1, dtype=torch.bool, device=some.device))
        return experts[:, 0] if self.config.head == "attention" else experts

    @property
    def state_shape(self) -> tuple[int, ...]:
        """What it reads of each token: a hidden state ``[d]``, or the keys and values of all layers with experts.

        Where such experts are trained, keys and values side by side, and after them the states that enter the layers.
        """
        if isinstance(self.head, AttentionHead):
            shape = self.head.shape
            if self.config.reads_states:
                return (shape.vectors * shape.head_width + len(shape.layers) * self.config.hidden_size,)
            return shape.vectors, shape.head_width
        return (self.config.hidden_size,)

    @property
    def head_dtype(self) -> torch.dtype:
        return next(self.head.parameters()).dtype

    def lower_head(self, dtype: torch.dtype) -> None:
        """Have a dense head, whose product is bound by reading its weights, compute in the dtype of its experts."""
        if self.config.head == "dense":
            self.head.to(dtype)
