"""States that a frozen LLM computes for a text: hidden states, and the keys and values of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.experts.attention_interface import AttentionCall, Output, intercept_attention
from genpoe_plugin.experts.decoder import find_decoder, find_layer
from genpoe_plugin.experts.injection import branch_off


class _LayerReached(Exception):
    """Stops the forward pass at a layer; ``states`` are the hidden states that enter it."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _LayerReached(args[0] if args else kwargs["hidden_states"])


@torch.no_grad()
def hidden_states(model: PreTrainedModel, layer: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden states that enter decoder layer ``layer``.

    Only the layers below it run. The pass ignores an enclosing `inject`.

    Args:
        model: the LLM, in evaluation mode.
        layer: index of the layer, from 0. The states of layer 0 are the embeddings, as the first layer reads them.
        input_ids: ``[n, tokens]``, padded on the right.
        attention_mask: ``[n, tokens]``, true on real tokens.

    Returns:
        Hidden states ``[n, tokens, d]``, in the LLM's dtype and without gradients; arbitrary at padding.

    Raises:
        InputError: the model has no such layer.
    """
    decoder, _ = find_decoder(model)
    hook = find_layer(model, layer).register_forward_pre_hook(_stop, with_kwargs=True)
    try:
        with branch_off():
            decoder(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
    except _LayerReached as reached:
        return reached.states
    finally:
        hook.remove()
    raise AssertionError(f"{type(decoder).__name__} does not run its layer {layer}")


class LayerStates(NamedTuple):
    """What a layer computes for each token of a text, in the LLM's dtype and without gradients; arbitrary at padding.

    Attributes:
        keys, values: the layer's keys and values, ``[n, KV heads, tokens, head width]``.
        hidden: the hidden states that enter the layer, ``[n, tokens, d]``; None if they were not requested.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None


class _HighestLayerReached(Exception):
    """Stops the forward pass once the keys and values of the highest layer are collected."""


@torch.no_grad()
def keys_and_values(
    model: PreTrainedModel,
    layers: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    hidden: bool = False,
) -> dict[int, LayerStates]:
    """The keys and values that the attention of some layers computes for a text that ends right before position 0.

    Keys are rotated to the positions ``-T ... -1``. Rotary positions are relative, so for a prompt that begins at
    position 0 the text stands right before it. No layer above the highest of ``layers`` runs. The pass ignores an
    enclosing `inject`.

    Args:
        model: the LLM, in evaluation mode.
        layers: indices of the layers, from 0, in ascending order.
        input_ids: ``[n, tokens]``, padded on the right.
        attention_mask: ``[n, tokens]``, true on real tokens.
        hidden: whether to return the hidden states that enter the layers as well.

    Returns:
        The states of each layer, by its index.

    Raises:
        InputError: the model has no such layer, or experts do not support its kind of attention.
    """
    decoder, _ = find_decoder(model)
    layer_states: dict[int, LayerStates] = {}
    entering: dict[int, Tensor] = {}

    def record_entering(layer: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[layer] = args[0] if args else kwargs["hidden_states"]

        return find_layer(model, layer).register_forward_pre_hook(record, with_kwargs=True)

    def record_keys_and_values(call: AttentionCall) -> Output:
        layer_states[call.layer] = LayerStates(call.key, call.value, entering.get(call.layer))
        if call.layer == layers[-1]:
            raise _HighestLayerReached
        return call.plain()

    lengths = attention_mask.long().sum(1, keepdim=True)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) - lengths
    with ExitStack() as hooks:
        hooks.enter_context(branch_off())
        hooks.enter_context(intercept_attention(model, layers, record_keys_and_values))
        for layer in layers if hidden else ():
            hooks.callback(record_entering(layer).remove)
        try:
            decoder(input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=positions, use_cache=False)
        except _HighestLayerReached:
            return layer_states
    raise AssertionError(f"{type(decoder).__name__} does not run the attention of its layer {layers[-1]}")
