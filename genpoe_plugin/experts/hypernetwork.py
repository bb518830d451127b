"""The hypernetwork: token states of a passage -> encoder (a code, or the outputs of queries) -> head -> an expert.

With the head ``attention``, the token states are the keys and values of the LLM's own attention, and they are the
expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from genpoe_plugin.experts.attention import AttentionExperts, AttentionShape, QueryAddition
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts, Factors, Weights
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS

CPU_BLOCK = 32_768  # entries of an expert that a CPU generates at a time


class MeanEncoder(nn.Module):
    """The paper's encoder: the mean over a passage's token states, then ``Linear -> ReLU``.

    It ignores word order, unless the token states encode it.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.project = nn.Linear(config.hidden_size, config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Map ``[n, tokens, d]`` and the mask ``[n, tokens]`` to codes ``[n, code]``."""
        weights = mask.to(states.dtype)
        # A matrix product avoids a second copy of the states.
        mean = (weights.unsqueeze(1) @ states).squeeze(1) / weights.sum(1, keepdim=True)
        if self.normalise:
            mean = functional.rms_norm(mean, mean.shape[-1:])
        return torch.relu(self.project(mean))


class AttentionPooling(nn.Module):
    """Attention pooling of token states with learned queries.

    There is no key projection, because it could be folded into the queries.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.hidden_size) / math.sqrt(config.hidden_size))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool states ``[n, tokens, d]`` with mask ``[n, tokens]`` to one mean per query, ``[n, queries, d]``."""
        if self.normalise:
            states = functional.rms_norm(states, states.shape[-1:])
        scores = states @ self.queries.mT  # [n, tokens, queries]
        weights = scores.masked_fill(~mask.bool().unsqueeze(-1), -math.inf).softmax(1)
        return weights.mT @ states


class AttentionEncoder(AttentionPooling):
    """Attention pooling whose outputs are joined and projected to a code.

    The value projection could be folded into the next layer, but it reduces the width of each query's output there.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__(config)
        size = config.value_size
        self.values = nn.Identity() if size is None else nn.Linear(config.hidden_size, size, bias=False)
        self.project = nn.Linear(config.num_queries * (size or config.hidden_size), config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Map ``[n, tokens, d]`` and the mask ``[n, tokens]`` to codes ``[n, code]``."""
        return torch.relu(self.project(self.values(super().forward(states, mask)).flatten(1)))


class Generator(nn.Linear):
    """The linear layer that outputs the entries of an expert's matrices.

    It is so large that another pass over its outputs would cost as much as the product itself.
    """

    def forward(
        self,
        code: Tensor,
        gain: float = 1.0,
        bases: Sequence[Tensor] | None = None,
        weights: Weights = (),
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map ``[n, code]`` to ``[n, entries]``; with ``bases``, write ``gain · layer(code) + base`` to ``weights``.

        Writing is part of ``forward`` because sharded weights are complete only during this call. It supports no
        gradients and returns an empty tensor.

        Args:
            code: codes, ``[n, code]``.
            gain: factor on the layer's output; used only with ``bases``.
            bases: base matrices, in the order of the layer's outputs.
            weights: target tensors, for each base ``[any number, *its shape]``.
            rows: rows of ``weights`` to write to, ``[n]``.
        """
        if bases is None or rows is None:
            return super().forward(code)
        code, begin = (gain * code).to(self.weight.dtype), 0
        most = max(base.numel() for base in bases)
        if code.device.type == "cpu":  # a CPU copies the matrix to another layout first: blocks stay in its cache
            most = min(CPU_BLOCK, most)
        result = code.new_empty(len(code) * most)
        for base, target in zip(bases, weights, strict=True):
            base, target = base.to(self.weight.dtype).flatten(), target.view(len(target), base.numel())
            for offset in range(0, len(base), most):
                block = base[offset : offset + most]
                entries = slice(begin + offset, begin + offset + len(block))
                part = result[: len(code) * len(block)].view(len(code), len(block))
                torch.addmm(torch.add(block, self.bias[entries], alpha=gain), code, self.weight[entries].mT, out=part)
                target[:, offset : offset + most].index_copy_(0, rows, part.to(target.dtype))
            begin += len(base)
        return code.new_empty(0)


class DenseHead(nn.Module):
    """The paper's head: one linear layer that outputs every entry of the four matrices."""

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
            # Saved as a buffer: from a seed, another torch version or device would draw another base.
            self.register_buffer(f"base{number}", base)

    def forward(self, code: Tensor) -> DenseExperts:
        """Generate ``[n]`` experts from codes ``[n, code]``."""
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
        """Generate experts from codes ``[n, code]``, like `Hypernetwork.write`."""
        self.generate(code, self.gain, self._bases(), weights, rows)

    def _bases(self) -> list[Tensor]:
        return [self.get_buffer(f"base{number}") for number in (1, 2, 3, 4)]


class FactoredHead(nn.Module):
    """Generates the two cores of an expert between learned matrices that all experts share.

    The cores start close to the identity.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        d, h, self.size = config.hidden_size, config.expert_width, config.core_size
        self.generate = nn.Linear(config.code_size, 2 * self.size**2)
        self.gain = config.generator_gain
        # These scales preserve the scale of the input.
        self.read_up = nn.Parameter(torch.randn(self.size, d) / math.sqrt(d))
        self.write_up = nn.Parameter(torch.randn(h, self.size) / math.sqrt(self.size))
        self.read_down = nn.Parameter(torch.randn(self.size, h) / math.sqrt(h))
        silent = config.base == "silent"
        self.write_down = nn.Parameter(
            torch.zeros(d, self.size) if silent else torch.randn(d, self.size) / math.sqrt(self.size)
        )

    def forward(self, code: Tensor) -> FactoredExperts:
        """Generate ``[n]`` experts from codes ``[n, code]``."""
        generated = (self.gain * self.generate(code)).unflatten(-1, (2, self.size, self.size))
        cores = generated + torch.eye(self.size, dtype=code.dtype, device=code.device)
        factors = Factors(self.read_up, self.write_up, self.read_down, self.write_down)
        return FactoredExperts(factors, *cores.unbind(-3))


class MemoryHead(nn.Module):
    """Stores each query's output in an expert as a memory: a key and a value.

    ``f_q`` is the output of query ``q``; its addresses ``a_q`` and ``b_q`` are learned and the same for all passages.
    The cores are sums of outer products, as in fast weights (Schmidhuber, 1992; Schlag et al., 2021)::

        M_u = I + g · Σ_q a_q ⊗ (K f_q)        keys: compared with the LLM's state
        M_d =     g · Σ_q (V f_q) ⊗ b_q        values: added to the output if the address is active

    ``K`` and the matrix that reads the LLM's states start with the same orthonormal rows, and so do ``V`` and the
    matrix that writes. So a memory reproduces the query's output from the start, and only when to do so must be
    learned. There is no code that must hold the whole passage, no layer that must learn to decode it (which takes most
    of the other heads' training), and no layer with ``p^2`` outputs.
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

    def forward(self, pooled: Tensor) -> FactoredExperts:
        """Generate ``[n]`` experts from the queries' outputs ``[n, queries, d]``."""
        up = torch.eye(self.size, dtype=pooled.dtype, device=pooled.device)
        up = up + self.gain * self.address_up.mT @ (pooled @ self.keys.mT)
        down = self.gain * (pooled @ self.values.mT).mT @ self.address_down
        return FactoredExperts(Factors(self.read_up, self.write_up, self.read_down, self.write_down), up, down)


class AttentionHead(nn.Module):
    """Turns the LLM's keys and values of a passage's tokens into an expert; untrained, it returns them unchanged.

    Its trained parts have no effect at first: additions to the keys, values and queries of each layer, and scores that
    pool the tokens of a window into one unit (equal at first). Each query head also has a bias on the logits of all
    units. Additions and scores are computed from the hidden states that enter the layer, scaled to unit root mean
    square, because the scales of LLMs differ widely. Additions to keys come after the rotation, so they encode no
    position. Additions to queries come before the rotation, and apply to the tokens that the experts act on.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.shape = AttentionShape.of(config)
        self.window, self.width, self.reads_states = config.window, config.hidden_size, config.reads_states
        # A unit stands for a window of tokens, so it starts with the mass of so many equal tokens. Beside an MLP, a
        # whole passage starts with the same mass as the null, whose logit is 0.
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
        """The additions to the queries of each layer; empty if there are none."""
        if self.query_read is None or self.query_write is None:
            return ()
        return tuple(map(QueryAddition, self.query_read, self.query_write))

    def forward(self, states: Tensor, mask: Tensor) -> AttentionExperts:
        """Map states ``[n, tokens, *state_shape]`` and the mask ``[n, tokens]`` to units ``[n, windows]``.

        See `Hypernetwork.state_shape`.
        """
        if not self.reads_states:
            return replace(AttentionExperts.of(self.shape, self.bias, states), queries=self.queries)
        numbers = self.shape.vectors * self.shape.head_width
        units, *hidden = states.split([numbers, *[self.width] * len(self.adders)], -1)
        parts = units.unflatten(-1, (self.shape.vectors, self.shape.head_width)).split(self.shape.heads, -2)
        windows, inside = into_windows(mask, self.window)
        pooled: list[Tensor] = []
        for number, (adder, state) in enumerate(zip(self.adders, hidden, strict=True)):
            keys, values = parts[2 * number : 2 * number + 2]
            pooled += adder(keys, values, functional.rms_norm(state, state.shape[-1:]), windows, inside)
        return AttentionExperts(self.shape, self.bias, tuple(pooled), self.queries)


class LayerAddition(nn.Module):
    """Pools the tokens of each window and adds learned low-rank terms to the keys and values of one layer.

    Args:
        config: the hypernetwork's configuration.
        heads: number of key-value heads with experts in the layer.
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
        """Keys and values of units, each ``[n, windows, heads, width]``.

        Args:
            keys, values: keys and values of tokens, ``[n, tokens, heads, width]``.
            state: normalised hidden states that enter the layer, ``[n, tokens, d]``.
            windows, inside: the result of `into_windows`.
        """
        added = None if self.read is None else state @ self.read.mT
        if self.scores is None:
            low = None if added is None else added.unsqueeze(2)
        else:
            scores = gather_windows(state @ self.scores.mT, windows)
            weights = scores.masked_fill(~inside.unsqueeze(-1), -math.inf)
            # A window without tokens is padding; its weights must stay finite.
            weights = weights.masked_fill(~inside.any(-1)[..., None, None], 0).softmax(2)
            keys = torch.einsum("nwth,nwthd->nwhd", weights, gather_windows(keys, windows))
            values = torch.einsum("nwth,nwthd->nwhd", weights, gather_windows(values, windows))
            low = None if added is None else torch.einsum("nwth,nwtr->nwhr", weights, gather_windows(added, windows))
        if low is None or self.write is None:
            return keys, values
        to_keys, to_values = torch.einsum("nwhr,khrd->knwhd", low.expand(*low.shape[:2], keys.shape[2], -1), self.write)
        return keys + to_keys, values + to_values


def into_windows(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Assign the real tokens of each passage to windows.

    Args:
        mask: ``[n, tokens]``, true on real tokens.
        size: tokens per window; the last window of a passage may have fewer.

    Returns:
        Token indices ``[n, windows, size]``, and the mask of real tokens among them, of the same shape.
    """
    counts = mask.sum(1)
    known = counts.numel() and not counts.is_meta and not isinstance(counts, FakeTensor)
    most = max(1, -(-(int(counts.max()) if known else mask.shape[1]) // size))
    order = (~mask.bool()).long().argsort(dim=1, stable=True)  # real tokens first, in their order
    order = functional.pad(order, (0, max(0, most * size - mask.shape[1])))[:, : most * size]
    inside = torch.arange(most * size, device=mask.device) < counts.unsqueeze(1)
    return order.unflatten(1, (most, size)), inside.unflatten(1, (most, size))


def unit_mask(mask: Tensor, window: int) -> Tensor:
    """The mask of real units that a `Hypernetwork` with the head ``attention`` returns, ``[n, windows]``."""
    return mask if window == 1 else into_windows(mask, window)[1].any(-1)


def gather_windows(tokens: Tensor, windows: Tensor) -> Tensor:
    """Gather ``[n, tokens, ...]`` into ``[n, windows, size, ...]``; ``windows`` is the result of `into_windows`."""
    rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    return tokens[rows, windows]


class NoEncoder(nn.Module):
    """Returns the token states unchanged, including those of padding."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return states


HEADS = {"dense": DenseHead, "factored": FactoredHead, "memory": MemoryHead, "attention": AttentionHead}


def _encoder(config: HypernetworkConfig) -> nn.Module:
    if config.head == "attention":
        return NoEncoder()
    if config.head == "memory":
        return AttentionPooling(config)
    return MeanEncoder(config) if config.encoder == "mean" else AttentionEncoder(config)


class Hypernetwork(nn.Module):
    """Generates one expert per passage.

    Args:
        config: dimensions, encoder and head.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.head = HEADS[config.head](config)

    def forward(self, states: Tensor, mask: Tensor) -> Experts:
        """Generate experts.

        Args:
            states: the LLM's token states of ``n`` passages, ``[n, tokens, *state_shape]``.
            mask: ``[n, tokens]``, true on real tokens; at least one per passage.

        Returns:
            ``[n]`` experts; with the head ``attention``, units ``[n, windows]``, arbitrary at padding.
        """
        code = self.encoder(states, mask).to(self.head_dtype)
        return self.head(code, mask) if isinstance(self.head, AttentionHead) else self.head(code)

    @torch.no_grad()
    def write(self, states: Tensor, mask: Tensor, weights: Weights, rows: Tensor) -> None:
        """Generate experts without gradients, directly into existing memory.

        On a CPU, allocating memory for an expert takes as long as generating it.

        Args:
            states, mask: as in `forward`.
            weights: target tensors, shaped like the experts' weights, ``[any number, ...]``, of any dtype.
            rows: distinct rows of ``weights`` to write to, ``[n]``, or ``[all units]`` with the head ``attention``.
        """
        if self.config.head == "attention":
            units = unit_mask(mask, self.config.window)
            for target, part in zip(weights, self(states, mask).weights, strict=True):
                target.index_copy_(0, rows, part[units].to(target.dtype))
            return
        code = self.encoder(states, mask).to(self.head_dtype)
        if isinstance(self.head, DenseHead):
            self.head.write(code, weights, rows)
        else:
            for target, weight in zip(weights, self.head(code).weights, strict=True):
                target.index_copy_(0, rows, weight.to(target.dtype))

    @torch.no_grad()
    def none(self) -> Experts:
        """Zero experts (``[0]``), with the tensors that all experts share."""
        parameter = next(self.parameters())
        states = parameter.new_zeros(0, 1, *self.state_shape)
        experts = self(states, torch.ones(0, 1, dtype=torch.bool, device=parameter.device))
        return experts[:, 0] if self.config.head == "attention" else experts

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one token's states.

        It is ``(d,)`` for experts beside an MLP. With the head ``attention`` it is ``(vectors, head width)``, the keys
        and values of all layers with experts. If the head also reads hidden states, it is one dimension: the keys and
        values, followed by the hidden states that enter the layers.
        """
        if isinstance(self.head, AttentionHead):
            shape = self.head.shape
            if self.config.reads_states:
                return (shape.vectors * shape.head_width + len(shape.layers) * self.config.hidden_size,)
            return shape.vectors, shape.head_width
        return (self.config.hidden_size,)

    @property
    def head_dtype(self) -> torch.dtype:
        """The dtype that the head computes in."""
        return next(self.head.parameters()).dtype

    def lower_head(self, dtype: torch.dtype) -> None:
        """Convert a dense head to the dtype of its experts, because reading its weights bounds its speed."""
        if self.config.head == "dense":
            self.head.to(dtype)
