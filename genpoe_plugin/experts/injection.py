"""The branch: a batch's experts inside a frozen LLM, beside the MLP of one layer or in the attention of several.

Hooks put it there and take it away, so the model itself is never changed and any decoder family will do. The mask is
decided by absolute positions alone (not by string lengths, not by the shape of a step), so the same rule holds for
left and right padding, cached decoding, chunked prefill and static caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
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
from genpoe_plugin.experts.attention_interface import Call, Output, listening
from genpoe_plugin.experts.beside_mlp import read_beside_mlp
from genpoe_plugin.experts.decoder import find_decoder, find_mlp, find_query_projection
from genpoe_plugin.experts.expert import Experts, Mixture, MLPExperts

# Else a model that was compiled (which transformers does by itself with a static cache) runs on without a look at the
# hooks: of the batch that it was compiled with, or none.
torch._dynamo.config.skip_nnmodule_hook_guards = False

CACHES = ("past_key_values", "cache")
"""Names of a decoder's cache: transformers has the second from 5.24 on, and takes the first too."""

_router: ContextVar[dict[int, Tensor] | None] = ContextVar("genpoe_router", default=None)
_off: ContextVar[bool] = ContextVar("genpoe_branch_off", default=False)


@dataclass(frozen=True)
class RowExperts:
    """What a batch needs, a row for each of its prompts.

    Attributes:
        experts: weights with leading dimensions ``[served, K]``; where a row has fewer experts, any finite
            ones. With experts in the attention, K counts units: the tokens of all passages of a row, side by side.
        gates: ``[served, K]``, 0 where there is no expert.
        start: ``[rows]``, the first position (of real tokens, padding not counted) that the experts act on.
        served: ``[served]``, the rows that have experts, in ascending order; None where all of them have.
    """

    experts: Experts
    gates: Tensor
    start: Tensor
    served: Tensor | None = None

    def to(self, device: torch.device) -> RowExperts:
        served = None if self.served is None else self.served.to(device)
        return RowExperts(self.experts.to(device), self.gates.to(device), self.start.to(device), served)

    def repeat(self, times: int) -> RowExperts:
        """Every row ``times`` times in a row, as beam search lays out its batch."""
        if times == 1:
            return self
        device = self.start.device
        every = torch.arange(len(self.start), device=device).repeat_interleave(times)
        if self.served is None:
            return RowExperts(self.experts[every], self.gates[every], self.start[every])
        index = torch.arange(len(self.served), device=device).repeat_interleave(times)
        served = (self.served.unsqueeze(1) * times + torch.arange(times, device=device)).flatten()
        return RowExperts(self.experts[index], self.gates[index], self.start[every], served)


def _active_positions(start: Tensor, arguments: dict[str, Any], rows: int, tokens: int) -> Tensor:
    """``[rows, tokens]``: whether each token of a forward pass is real and at or after its row's start."""
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
    """How many tokens the cache holds that is among a decoder's arguments; 0 without one.

    Raises:
        InputError: there is a cache whose tokens cannot be counted, so nothing says where experts begin.
    """
    for name, value in arguments.items():
        counts = hasattr(value, "get_seq_length")
        if name in CACHES and value is not None and not counts:
            raise InputError(f"{name} is a {type(value).__name__}; experts need one of transformers' Cache classes")
        # use_cache, cache_position and their like are flags, numbers and tensors.
        named = ("cache" in name or "past" in name) and not isinstance(value, bool | int | str | Tensor | None)
        if name not in CACHES and (counts or named):
            raise InputError(f"a cache is given as {name}; experts know it as {' or '.join(CACHES)} alone")
    given = [arguments[name] for name in CACHES if arguments.get(name) is not None]
    return given[0].get_seq_length() if given else 0


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
    """What the router does in the first pass inside the block, for experts in the attention.

    Yields:
        For each layer, filled by the pass: ``[served, units]``, the share of the softmax that each unit has for the
        last token, a mean over heads.
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

    Experts beside an MLP add ``mask ⊙ Σ_k g_k · E_k(x)`` to that of the one layer; experts in the attention join the
    softmax of every layer given. A forward batch may be a multiple of the rows (beams); row ``i`` then serves that many
    neighbours. With ``rows`` None the model runs untouched.

    Args:
        layers: one layer, or several (for experts in the attention: some or all of those that they are for).

    Raises:
        InputError: the model has no such layer, or its dimensions are not the experts'.
    """
    if rows is None:
        yield
        return
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    decoder, _ = find_decoder(model)
    signature = inspect.signature(decoder.forward)
    branch = _branch(rows)

    def note_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _off.get():
            return
        arguments = signature.bind_partial(*args, **kwargs).arguments
        # Asked before the layers run, since each of them adds this pass's tokens to the cache.
        branch.begin({**arguments, "past": _tokens_in_cache({**kwargs, **arguments})})

    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(note_positions, with_kwargs=True).remove)
        if isinstance(branch, _MLPBranch):
            (layer,) = layers
            hooks.callback(find_mlp(model, layer).register_forward_hook(branch.beside_mlp).remove)
        else:
            hooks.enter_context(listening(model, layers, branch.attended))
            for layer in layers if branch.adds_to_queries else ():
                projection = find_query_projection(model, layer)
                hooks.callback(projection.register_forward_hook(branch.add_to_queries(layer)).remove)
        if isinstance(branch, _BesideMLPBranch):
            for layer in layers:
                hooks.enter_context(read_beside_mlp(model, layer, branch))
        yield


class _Branch:
    """The rows of one batch, laid out for the passes to come, and the arguments of the pass under way."""

    def __init__(self, rows: RowExperts) -> None:
        self.given = rows
        self._arguments: dict[str, Any] = {}
        self._active: dict[torch.device, Tensor] = {}
        self._batch = 0
        self._rows: dict[torch.device, RowExperts] = {}

    def begin(self, arguments: dict[str, Any]) -> None:
        """A pass begins, with these arguments of the decoder."""
        self._arguments = arguments
        self._active.clear()

    def active(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """``[rows, tokens]``: which tokens of the pass under way the experts act on; the same for all layers."""
        if device not in self._active:
            start = self.rows_for(batch, device).start
            self._active[device] = _active_positions(start, self._arguments, batch, tokens)
        return self._active[device]

    def rows_for(self, batch: int, device: torch.device) -> RowExperts:
        """The rows of a batch of this size there: repeated once a generation, and again where the size changes."""
        if batch != self._batch:
            self._rows.clear()
            self.forget()
            self._batch = batch
        if device not in self._rows:  # the layers of a model may be on several
            count = len(self.given.start)
            if batch % count:
                raise InputError(f"a batch of {batch} cannot be shared by the experts of {count} rows")
            self._rows[device] = self.given.to(device).repeat(batch // count)
        return self._rows[device]

    def forget(self) -> None:
        """Drop what was laid out for batches of another size."""
        raise NotImplementedError


class _MLPBranch(_Branch):
    mixture: Mixture | None = None

    def beside_mlp(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """``output``, and what the experts make of the MLP's input."""
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
        return output.index_add(0, rows.served, mixed.to(output.dtype))  # which autocast may have made another

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
        """A forward hook of what makes the queries of ``layer``."""
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
        """Whether the layer under way attends to experts."""
        return not _off.get()

    def _served(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """``[rows, tokens]``: the active tokens of the rows that have experts."""
        rows, active = self.rows_for(batch, device), self.active(batch, tokens, device)
        if rows.served is None:
            return active
        return active & torch.zeros_like(active).index_fill(0, rows.served, True)

    def attended(self, call: Call) -> Output:
        """What the layer attends to with the experts in its softmax."""
        if _off.get():
            return call.plain()
        rows, active, experts = self._for(call)
        if (router := _router.get()) is not None and call.layer not in router:
            own = call if rows.served is None else call.rows(rows.served)
            router[call.layer] = unit_mass(own, experts, active if rows.served is None else active[rows.served])
        if rows.served is None:
            return attend(call, experts, active), None
        # Rows without experts stay as the model computes them.
        output = call.plain()[0].clone()
        output[rows.served] = attend(call.rows(rows.served), experts, active[rows.served])
        return output, None

    def _for(self, call: Call) -> tuple[RowExperts, Tensor, LayerExperts]:
        """The rows of a call, which of its tokens are active, and the experts of its layer."""
        batch, _, tokens, _ = call.query.shape
        device = call.query.device
        rows, active = self.rows_for(batch, device), self.active(batch, tokens, device)
        if call.layer not in self.layers:
            self.layers[call.layer] = self._of_layer(call, rows)
        return rows, active, self.layers[call.layer]

    def _of_layer(self, call: Call, rows: RowExperts) -> LayerExperts:
        experts = rows.experts
        assert isinstance(experts, AttentionExperts)
        shape = experts.shape
        ours = shape.num_heads, shape.num_kv_heads, shape.head_width
        theirs = call.query.shape[1], call.key.shape[1], call.key.shape[3]
        if call.layer not in shape.layers:
            raise InputError(f"the experts have no keys and values for layer {call.layer}, only for {shape.layers}")
        if ours != theirs:
            raise InputError(
                f"experts for {ours[0]} heads, {ours[1]} of keys and values of width {ours[2]}; "
                f"layer {call.layer} has {theirs[0]}, {theirs[1]} and {theirs[2]}"
            )
        own = experts.layer(call.layer, rows.gates)
        dtype = call.query.dtype  # experts may be kept in fewer bits
        return LayerExperts(own.keys.to(dtype), own.values.to(dtype), own.bias.to(dtype))

    def forget(self) -> None:
        self.layers.clear()


class _BesideMLPBranch(_AttentionBranch):
    """Experts of tokens beside an MLP; the layers' own passes over the context stay as they are."""

    _reads = False

    @property
    def off(self) -> bool:
        return _off.get()

    def reading(self, attention: Callable[[], Tensor]) -> Tensor:
        """What ``attention`` returns where it attends to the experts alone, and zeros for tokens that have none."""
        self._reads = True
        try:
            found = attention()
        finally:
            self._reads = False
        # Where nothing is attended to, an output projection with a bias returns that.
        batch, tokens = found.shape[:2]
        return found * self._served(batch, tokens, found.device).unsqueeze(-1)

    @property
    def reading_now(self) -> bool:
        return self._reads

    def attended(self, call: Call) -> Output:
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
