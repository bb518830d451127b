"""The branch: the computation that adds a batch's experts to a frozen LLM.

It runs beside the MLP of one layer or in the attention of several. Hooks attach it and remove it again, so the model
itself does not change and any decoder family is supported. The mask depends only on absolute positions (not on string
lengths, not on the shape of a step), so the same rule holds for left and right padding, cached decoding, chunked
prefill and static caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts, LayerExperts, attend, attend_with_null, unit_mass
from genpoe_plugin.experts.attention_interface import AttentionCall, Output, intercept_attention
from genpoe_plugin.experts.beside_mlp import read_beside_mlp
from genpoe_plugin.experts.decoder import find_decoder, find_mlp, find_query_projection
from genpoe_plugin.experts.expert import Experts, Mixture, MLPExperts

# Otherwise a compiled model (transformers compiles by itself with a static cache) ignores the current hooks: it keeps
# running those it was compiled with, or none.
torch._dynamo.config.skip_nnmodule_hook_guards = False

CACHES = ("past_key_values", "cache")
"""Names of a decoder's cache argument. transformers 5.24 introduced the second and still accepts the first."""

_router: ContextVar[dict[int, Tensor] | None] = ContextVar("genpoe_router", default=None)
_off: ContextVar[bool] = ContextVar("genpoe_branch_off", default=False)


@dataclass(frozen=True)
class RowExperts:
    """The experts of a batch, one row per prompt.

    Attributes:
        experts: experts with leading dimensions ``[served, K]``. Rows with fewer than K experts are padded with any
            finite weights. For experts in the attention, K counts units: the units of all passages of a row, joined.
        gates: the experts' gates, ``[served, K]``; 0 at padding.
        start: the first position (padding not counted) that the experts act on, ``[rows]``.
        served: indices of the rows that have experts, ``[served]``, in ascending order; None if all rows have experts.
    """

    experts: Experts
    gates: Tensor
    start: Tensor
    served: Tensor | None = None

    def to(self, device: torch.device) -> RowExperts:
        served = None if self.served is None else self.served.to(device)
        return RowExperts(self.experts.to(device), self.gates.to(device), self.start.to(device), served)

    def repeat(self, times: int) -> RowExperts:
        """Repeat each row ``times`` times, next to each other, as beam search lays out its batch."""
        if times == 1:
            return self
        device = self.start.device
        every = torch.arange(len(self.start), device=device).repeat_interleave(times)
        if self.served is None:
            return RowExperts(self.experts[every], self.gates[every], self.start[every])
        index = torch.arange(len(self.served), device=device).repeat_interleave(times)
        served = (self.served.unsqueeze(1) * times + torch.arange(times, device=device)).flatten()
        return RowExperts(self.experts[index], self.gates[index], self.start[every], served)


def unit_rows(
    passages: Sequence[Sequence[str]], gates: Sequence[Sequence[float]], units_of: Mapping[str, Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The units of each row's passages in one table.

    Args:
        passages: the passages of each row, at least one per row.
        gates: one gate per passage of each row.
        units_of: for each passage, the indices of its units.

    Returns:
        Unit indices, gates, and where the table is padded (with a unit of the row, at gate 0), each ``[rows, K]``.
    """
    rows = [
        [(unit, gate) for passage, gate in zip(*row, strict=True) for unit in units_of[passage]]
        for row in zip(passages, gates, strict=True)
    ]
    width = max(map(len, rows))
    padded = [row + [(row[0][0], 0.0)] * (width - len(row)) for row in rows]
    index = torch.tensor([[unit for unit, _ in row] for row in padded])
    gate = torch.tensor([[gate for _, gate in row] for row in padded])
    padding = torch.arange(width) >= torch.tensor([[len(row)] for row in rows])
    return index, gate, padding


def _active_positions(start: Tensor, arguments: dict[str, Any], rows: int, tokens: int) -> Tensor:
    """``[rows, tokens]``: whether each token of a forward pass is real and stands at or after its row's start."""
    device = start.device
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        mask = None
    if position_ids is not None:
        positions = position_ids.to(device).expand(rows, tokens)
    elif mask is not None:
        positions = (mask.to(device).long().cumsum(1) - 1)[:, -tokens:]
    else:
        positions = (torch.arange(tokens, device=device) + arguments["past"]).expand(rows, tokens)
    active = positions >= start.unsqueeze(1)
    if mask is not None and mask.shape[1] == tokens:
        active = active & mask.to(device).bool()
    return active


def _tokens_in_cache(arguments: dict[str, Any]) -> int:
    """The number of tokens in the cache among a decoder's arguments; 0 without a cache.

    Raises:
        InputError: the cache's tokens cannot be counted, so the positions of this pass are unknown.
    """
    for name, value in arguments.items():
        counts = hasattr(value, "get_seq_length")
        if name in CACHES and value is not None and not counts:
            raise InputError(f"{name} is a {type(value).__name__}; experts need one of transformers' Cache classes")
        # Arguments such as use_cache and cache_position are flags, numbers and tensors, not caches.
        named = ("cache" in name or "past" in name) and not isinstance(value, bool | int | str | Tensor | None)
        if name not in CACHES and (counts or named):
            raise InputError(f"unknown cache argument {name}; with experts, pass the cache as {' or '.join(CACHES)}")
    caches = [arguments[name] for name in CACHES if arguments.get(name) is not None]
    return caches[0].get_seq_length() if caches else 0


@contextmanager
def branch_off() -> Iterator[None]:
    """Forward passes in this context ignore an enclosing `inject`."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


@contextmanager
def observe_router() -> Iterator[dict[int, Tensor]]:
    """Record the router's mass in the first forward pass inside the block, for experts in the attention.

    Yields:
        A dict that the pass fills: for each layer, the share of the softmax that each unit gets from the last token,
        as a mean over heads, ``[served, units]``.
    """
    masses: dict[int, Tensor] = {}
    token = _router.set(masses)
    try:
        yield masses
    finally:
        _router.reset(token)


@contextmanager
def inject(model: PreTrainedModel, layers: int | Sequence[int], rows: RowExperts | None) -> Iterator[None]:
    """Add a batch's experts to every forward pass inside the block.

    Experts beside an MLP add ``mask ⊙ Σ_k g_k · E_k(x)`` to the MLP's output in one layer. Experts in the attention
    join the softmax in each of ``layers``. The batch of a forward pass may be a multiple of the rows (beam search);
    each row's experts then serve that many neighbouring sequences.

    Args:
        model: the LLM.
        layers: one layer, or several for experts in the attention: some or all of the layers that the experts are for.
        rows: the batch's experts; None runs the model without experts.

    Raises:
        InputError: the model has no such layer, or its dimensions do not match the experts'.
    """
    if rows is None:
        yield
        return
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    decoder, _ = find_decoder(model)
    signature = inspect.signature(decoder.forward)
    branch = _branch(rows)

    def start_pass(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _off.get():
            return
        arguments = signature.bind_partial(*args, **kwargs).arguments
        # Count the cache before the layers run: each of them adds this pass's tokens to it.
        branch.begin({**arguments, "past": _tokens_in_cache({**kwargs, **arguments})})

    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(start_pass, with_kwargs=True).remove)
        if isinstance(branch, _MLPBranch):
            (layer,) = layers
            hooks.callback(find_mlp(model, layer).register_forward_hook(branch.beside_mlp).remove)
        else:
            hooks.enter_context(intercept_attention(model, layers, branch.attended))
            for layer in layers if branch.adds_to_queries else ():
                projection = find_query_projection(model, layer)
                hooks.callback(projection.register_forward_hook(branch.add_to_queries(layer)).remove)
        if isinstance(branch, _BesideMLPBranch):
            for layer in layers:
                hooks.enter_context(read_beside_mlp(model, layer, branch))
        yield


class _Branch:
    """The rows of one batch, prepared for many forward passes, and the arguments of the current pass."""

    def __init__(self, rows: RowExperts) -> None:
        self.batch_rows = rows
        self._arguments: dict[str, Any] = {}
        self._active: dict[torch.device, Tensor] = {}
        self._batch = 0
        self._rows: dict[torch.device, RowExperts] = {}

    def begin(self, arguments: dict[str, Any]) -> None:
        """Start a forward pass with these arguments of the decoder."""
        self._arguments = arguments
        self._active.clear()

    def active(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """``[rows, tokens]``: which tokens of the current pass the experts act on; the same for all layers."""
        if device not in self._active:
            start = self.rows_for(batch, device).start
            self._active[device] = _active_positions(start, self._arguments, batch, tokens)
        return self._active[device]

    def rows_for(self, batch: int, device: torch.device) -> RowExperts:
        """The rows of a batch of this size on this device; they are repeated anew only when the batch size changes."""
        if batch != self._batch:
            self._rows.clear()
            self.forget()
            self._batch = batch
        if device not in self._rows:  # a model's layers may be on several devices
            count = len(self.batch_rows.start)
            if batch % count:
                raise InputError(f"a batch of {batch} is not a multiple of the {count} rows of experts")
            self._rows[device] = self.batch_rows.to(device).repeat(batch // count)
        return self._rows[device]

    def forget(self) -> None:
        """Drop what was prepared for another batch size."""
        raise NotImplementedError


class _MLPBranch(_Branch):
    mixture: Mixture | None = None

    def beside_mlp(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook of the MLP: ``output`` plus the experts' output for the MLP's input."""
        if _off.get():
            return output
        x = args[0]
        batch, tokens = x.shape[:2]
        rows = self.rows_for(batch, x.device)
        if self.mixture is None:
            assert isinstance(rows.experts, MLPExperts)
            if x.shape[-1] != (width := rows.experts.width):
                raise InputError(f"experts of width {width} beside an MLP of width {x.shape[-1]}")
            self.mixture = rows.experts.mixture(rows.gates)
        active = self.active(batch, tokens, x.device)
        if rows.served is None:
            return output + self.mixture(x).to(x.dtype) * active.unsqueeze(-1).to(x.dtype)
        mixed = self.mixture(x[rows.served]).to(x.dtype) * active[rows.served].unsqueeze(-1).to(x.dtype)
        return output.index_add(0, rows.served, mixed.to(output.dtype))  # autocast may change the dtype

    def forget(self) -> None:
        self.mixture = None


class _AttentionBranch(_Branch):
    def __init__(self, rows: RowExperts) -> None:
        super().__init__(rows)
        self.layers: dict[int, LayerExperts] = {}
        assert isinstance(rows.experts, AttentionExperts)
        self._shared = rows.experts

    @property
    def adds_to_queries(self) -> bool:
        return bool(self._shared.queries)

    def add_to_queries(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """A forward hook for the query projection of ``layer``."""
        shared = self._shared
        addition = shared.queries[shared.shape.layers.index(layer)]

        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.reading_now:
                return output
            (x,) = args
            batch, tokens = x.shape[:2]
            added = addition.to(x.device).to(x.dtype).of(x) * self._served(batch, tokens, x.device).unsqueeze(-1)
            return output + added.to(output.dtype)

        return add

    @property
    def reading_now(self) -> bool:
        """Whether the current layer attends to experts."""
        return not _off.get()

    def _served(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """``[rows, tokens]``: the active tokens of the rows that have experts."""
        rows, active = self.rows_for(batch, device), self.active(batch, tokens, device)
        if rows.served is None:
            return active
        return active & torch.zeros_like(active).index_fill(0, rows.served, True)

    def attended(self, call: AttentionCall) -> Output:
        """The layer's attention with the experts in its softmax."""
        if _off.get():
            return call.plain()
        rows, active, experts = self._for(call)
        if (router := _router.get()) is not None and call.layer not in router:
            served = call if rows.served is None else call.rows(rows.served)
            router[call.layer] = unit_mass(served, experts, active if rows.served is None else active[rows.served])
        if rows.served is None:
            return attend(call, experts, active), None
        # Rows without experts keep the model's own output.
        output = call.plain()[0].clone()
        output[rows.served] = attend(call.rows(rows.served), experts, active[rows.served])
        return output, None

    def _for(self, call: AttentionCall) -> tuple[RowExperts, Tensor, LayerExperts]:
        """The rows of a call, its active tokens, and the experts of its layer."""
        batch, _, tokens, _ = call.query.shape
        device = call.query.device
        rows, active = self.rows_for(batch, device), self.active(batch, tokens, device)
        if call.layer not in self.layers:
            self.layers[call.layer] = self._of_layer(call, rows)
        return rows, active, self.layers[call.layer]

    def _of_layer(self, call: AttentionCall, rows: RowExperts) -> LayerExperts:
        experts = rows.experts
        assert isinstance(experts, AttentionExperts)
        shape = experts.shape
        expert_sizes = shape.num_heads, shape.num_kv_heads, shape.head_width
        layer_sizes = call.query.shape[1], call.key.shape[1], call.key.shape[3]
        if call.layer not in shape.layers:
            raise InputError(f"the experts have no keys and values for layer {call.layer}, only for {shape.layers}")
        if expert_sizes != layer_sizes:
            described = "{} heads, {} key-value heads and head width {}"
            raise InputError(
                f"the experts have {described.format(*expert_sizes)}; "
                f"layer {call.layer} has {described.format(*layer_sizes)}"
            )
        layer = experts.layer(call.layer, rows.gates)
        dtype = call.query.dtype  # experts may be stored in a lower precision
        return LayerExperts(layer.keys.to(dtype), layer.values.to(dtype), layer.bias.to(dtype))

    def forget(self) -> None:
        self.layers.clear()


class _BesideMLPBranch(_AttentionBranch):
    """Attention experts that are read beside an MLP; the layers' own attention to the context does not change."""

    _reads = False

    @property
    def off(self) -> bool:
        return _off.get()

    def reading(self, attention: Callable[[], Tensor]) -> Tensor:
        """The output of ``attention`` over the experts alone; zeros for tokens without experts."""
        self._reads = True
        try:
            output = attention()
        finally:
            self._reads = False
        # An output projection with a bias would return the bias for tokens without experts.
        batch, tokens = output.shape[:2]
        return output * self._served(batch, tokens, output.device).unsqueeze(-1)

    @property
    def reading_now(self) -> bool:
        return self._reads

    def attended(self, call: AttentionCall) -> Output:
        if not self._reads:
            return call.plain()
        rows, active, experts = self._for(call)
        if rows.served is None:
            return attend_with_null(call, experts, active), None
        batch, heads, tokens, width = call.query.shape
        output = call.query.new_zeros(batch, tokens, heads, width)
        output[rows.served] = attend_with_null(call.rows(rows.served), experts, active[rows.served])
        return output, None


def _branch(rows: RowExperts) -> _MLPBranch | _AttentionBranch:
    if not isinstance(rows.experts, AttentionExperts):
        return _MLPBranch(rows)
    return _BesideMLPBranch(rows) if rows.experts.shape.place == "mlp" else _AttentionBranch(rows)
