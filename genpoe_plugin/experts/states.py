"""What a frozen LLM makes of a text on the way up to one of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.experts.injection import branch_off, find_decoder, find_layer


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
