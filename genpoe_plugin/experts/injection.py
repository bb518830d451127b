"""The branch: a batch's experts beside the MLP of one decoder layer of a frozen LLM.

Hooks put it there and take it away, so the model itself is never changed and any decoder family will do. The mask is
decided by absolute positions alone (not by string lengths, not by the shape of a step), so the same rule holds for
left and right padding, cached decoding, chunked prefill and static caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert import Experts, Mixture

# Else a model that was compiled (which transformers does by itself with a static cache) runs on without a look at the
# hooks: of the batch that it was compiled with, or none.
torch._dynamo.config.skip_nnmodule_hook_guards = False

_off: ContextVar[bool] = ContextVar("genpoe_branch_off", default=False)


@dataclass(frozen=True)
class RowExperts:
    """What a batch needs, a row for each of its prompts.

    Attributes:
        experts: weights with leading dimensions ``[served, K]``; where a row has fewer experts, zeros.
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


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a language model and the list of its layers, by structure.

    Raises:
        InputError: nothing in the model looks like a stack of decoder layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, child
    raise InputError(f"{type(model).__name__}: no list of {depth} decoder layers found, so experts have no place in it")


def find_layer(model: PreTrainedModel, layer: int) -> nn.Module:
    """Decoder layer ``layer``, counted from 0.

    Raises:
        InputError: the model has no such layer.
    """
    _, layers = find_decoder(model)
    if not 0 <= layer < len(layers):
        raise InputError(f"layer {layer} is not in {type(model).__name__}, which has layers 0 to {len(layers) - 1}")
    return layers[layer]


def find_mlp(model: PreTrainedModel, layer: int) -> nn.Module:
    """The MLP of decoder layer ``layer``: the one child made of other modules that is not the attention.

    Modules and not weights are what tells: those of a quantised LLM may be packed, or no parameters at all.

    Raises:
        InputError: the model has no such layer, or the layer has no MLP of its own.
    """
    candidates = [
        child
        for name, child in find_layer(model, layer).named_children()
        if "attn" not in name.lower() and "attention" not in name.lower() and any(True for _ in child.children())
    ]
    if len(candidates) != 1:
        raise InputError(
            f"layer {layer} of {type(model).__name__} has {len(candidates)} modules that could be its MLP, not one"
        )
    return candidates[0]


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


@contextmanager
def branch_off() -> Iterator[None]:
    """Passes inside the block neither hear nor move the branch of an `inject` around it."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


@contextmanager
def inject(model: PreTrainedModel, layer: int, rows: RowExperts | None) -> Iterator[None]:
    """Add ``mask ⊙ Σ_k g_k · E_k(x)`` to the MLP of ``layer`` in every forward pass inside the block.

    A forward batch may be a multiple of the rows (beams); row ``i`` then serves that many neighbours. With ``rows``
    None the model runs untouched.

    Raises:
        InputError: the model has no such layer, or its width is not the experts'.
    """
    if rows is None:
        yield
        return
    decoder, _ = find_decoder(model)
    mlp = find_mlp(model, layer)
    signature = inspect.signature(decoder.forward)
    branch = _Branch(rows)

    def note_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _off.get():
            return
        arguments = signature.bind_partial(*args, **kwargs).arguments
        cache = arguments.get("past_key_values")
        # Asked before the layers run, since each of them adds this pass's tokens to the cache.
        branch.arguments = {**arguments, "past": 0 if cache is None else cache.get_seq_length()}

    def add_experts(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if _off.get() else branch.added(args[0], output)

    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(note_positions, with_kwargs=True).remove)
        hooks.callback(mlp.register_forward_hook(add_experts).remove)
        yield


class _Branch:
    """The rows of one batch, laid out for the passes to come, and the arguments of the pass under way."""

    def __init__(self, rows: RowExperts) -> None:
        self.given = rows
        self.arguments: dict[str, Any] = {}
        self.rows: RowExperts | None = None
        self.mixture: Mixture | None = None

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """``output``, and what the experts make of ``x``."""
        batch, tokens = x.shape[:2]
        if self.rows is None or len(self.rows.start) != batch or self.rows.start.device != x.device:
            self._lay_out(x)
        rows = self.rows
        assert rows is not None and self.mixture is not None
        active = _active_positions(rows.start, self.arguments, batch, tokens)
        if rows.served is None:
            return output + self.mixture(x).to(x.dtype) * active.unsqueeze(-1).to(x.dtype)
        mixed = self.mixture(x[rows.served]).to(x.dtype) * active[rows.served].unsqueeze(-1).to(x.dtype)
        return output.index_add(0, rows.served, mixed.to(output.dtype))  # which autocast may have made another

    def _lay_out(self, x: Tensor) -> None:
        """Once a generation, and again where the batch changes its size: this copies the experts' weights."""
        width, count = self.given.experts.width, len(self.given.start)
        if x.shape[-1] != width:
            raise InputError(f"experts of width {width} beside an MLP of width {x.shape[-1]}")
        if len(x) % count:
            raise InputError(f"a batch of {len(x)} cannot be shared by the experts of {count} rows")
        self.rows = self.given.to(x.device).repeat(len(x) // count)
        self.mixture = self.rows.experts.mixture(self.rows.gates)
