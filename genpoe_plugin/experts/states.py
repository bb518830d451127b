"""What a frozen LLM makes of a text: the states that enter a layer, and the keys and values of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.experts.attention_interface import Call, Output, listening
from genpoe_plugin.experts.decoder import find_decoder, find_layer
from genpoe_plugin.experts.injection import branch_off


class _Reached(Exception):
    """The layer was reached; the rest of the pass is not wanted."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


@torch.no_grad()
def hidden_states(model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden states that enter decoder layer ``layer``: only the layers below it run, and no branch is heard.

    Args:
        model: the LLM, in evaluation mode.
        layer: counted from 0; its states are the embeddings as the first layer sees them.
        input_ids: ``[n, tokens]``, padded on the right.
        attention_mask: ``[n, tokens]``, true on real tokens.

    Returns:
        ``[n, tokens, d]``, in the LLM's dtype and without gradients; arbitrary where there is padding.

    Raises:
        InputError: the model has no such layer.
    """
    decoder, _ = find_decoder(model)
    hook = find_layer(model, layer).register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        with branch_off():
            decoder(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
    except _Reached as reached:
        return reached.states
    finally:
        hook.remove()
    raise AssertionError(f"{type(decoder).__name__} does not run its layer {layer}")


class LayerStates(NamedTuple):
    """What a layer has of each token of a text, in the LLM's dtype and without gradients; arbitrary at padding.

    Attributes:
        keys, values: ``[n, KV heads, tokens, head width]``.
        hidden: what enters the layer, ``[n, tokens, d]``, if it was asked for.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None


class _AllRead(Exception):
    """The highest layer's keys and values are there; the rest of the pass is not wanted."""


@torch.no_grad()
def keys_and_values(
    model: PreTrainedModel,
    layers: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    hidden: bool = False,
) -> dict[int, LayerStates]:
    """What the attention of some layers computes for a text, which ends right before position 0.

    Keys are rotated to the positions ``-T ... -1``: rotary positions are relative, so to a prompt, which begins at 0,
    the text stands right before it. Nothing above the highest of the layers runs, and no branch is heard.

    Args:
        model: the LLM, in evaluation mode.
        layers: counted from 0, in ascending order.
        input_ids: ``[n, tokens]``, padded on the right.
        attention_mask: ``[n, tokens]``, true on real tokens.
        hidden: whether the hidden states that enter the layers are wanted too.

    Raises:
        InputError: the model has no such layer, or one of another attention.
    """
    decoder, _ = find_decoder(model)
    found: dict[int, LayerStates] = {}
    entering: dict[int, Tensor] = {}

    def note_states(layer: int) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[layer] = args[0] if args else kwargs["hidden_states"]

        return find_layer(model, layer).register_forward_pre_hook(note, with_kwargs=True)

    def note(call: Call) -> Output:
        found[call.layer] = LayerStates(call.key, call.value, entering.get(call.layer))
        if call.layer == layers[-1]:
            raise _AllRead
        return call.plain()

    lengths = attention_mask.long().sum(1, keepdim=True)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) - lengths
    with ExitStack() as hooks:
        hooks.enter_context(branch_off())
        hooks.enter_context(listening(model, layers, note))
        for layer in layers if hidden else ():
            hooks.callback(note_states(layer).remove)
        try:
            decoder(input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False)
        except _AllRead:
            return found
    raise AssertionError(f"{type(decoder).__name__} does not run the attention of its layer {layers[-1]}")
