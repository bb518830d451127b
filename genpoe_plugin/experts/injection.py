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
from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert import Experts

_off: ContextVar[bool] = ContextVar("genpoe_branch_off", default=False)


@dataclass(frozen=True)
class RowExperts:
    """What a batch needs, a row for each of its prompts.

    Attributes:
        experts: weights with leading dimensions ``[rows, K]``; where a row has fewer experts, zeros.
        gates: ``[rows, K]``, 0 where there is no expert.
        start: ``[rows]``, the first position (of real tokens, padding not counted) that the experts act on.
    """

    experts: Experts
    gates: Tensor
    start: Tensor

    def to(self, device: torch.device) -> RowExperts:
        return RowExperts(self.experts.to(device), self.gates.to(device), self.start.to(device))

    def repeat(self, times: int) -> RowExperts:
        """Every row ``times`` times in a row, as beam search lays out its batch."""
        index = torch.arange(len(self.gates), device=self.gates.device).repeat_interleave(times)
        return RowExperts(self.experts[index], self.gates[index], self.start[index])


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
        return output if _off.get() else output + branch(args[0])

    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(note_positions, with_kwargs=True).remove)
        hooks.callback(mlp.register_forward_hook(add_experts).remove)
        yield


class _Branch:
    """The rows of one batch on the device where they are needed, and the arguments of the pass under way."""

    def __init__(self, rows: RowExperts) -> None:
        self.rows = rows
        self.arguments: dict[str, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.rows.experts.width:
            raise InputError(f"experts of width {self.rows.experts.width} beside an MLP of width {x.shape[-1]}")
        if self.rows.gates.device != x.device:
            self.rows = self.rows.to(x.device)
        batch, tokens = x.shape[:2]
        rows = self.rows
        if batch != len(rows.gates):
            if batch % len(rows.gates):
                raise InputError(f"a batch of {batch} cannot be shared by the experts of {len(rows.gates)} rows")
            rows = rows.repeat(batch // len(rows.gates))
        active = _active_positions(rows.start, self.arguments, batch, tokens)
        mixed = rows.experts.mix(x, rows.gates)
        return mixed.to(x.dtype) * active.unsqueeze(-1).to(x.dtype)
