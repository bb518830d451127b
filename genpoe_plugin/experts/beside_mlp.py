"""Where experts of passages' tokens stand beside an MLP: what reads them, and how it is found in a layer.

Beside the MLP of layer ``l - 1``, they are read as layer ``l`` would read them: by its input norm, its queries and its
output projection, from the residual stream that enters the MLP; and what is read is added to the one that leaves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention_interface import Call, Output, listening
from genpoe_plugin.experts.decoder import find_attention, find_layer, find_mlp

SANDWICH = "pre_feedforward_layernorm"
"""A layer with this norm has another one behind its attention (Gemma 2 and 3)."""


class Reader(Protocol):
    """What reads the experts of a batch."""

    @property
    def off(self) -> bool:
        """Whether the pass under way has no experts."""

    def read(self, call: Call) -> Output:
        """Called in place of the attention of a layer."""

    def active(self, states: Tensor) -> Tensor:
        """``[rows, tokens, 1]`` in the dtype of ``states``: 1 for tokens that have experts, else 0."""


class RotaryPositions:
    """The rotary embeddings of the pass under way, for each type of layer.

    Args:
        decoder: computes them before its layers run.

    Raises:
        InputError: it does not.
    """

    def __init__(self, decoder: nn.Module) -> None:
        rotary = getattr(decoder, "rotary_emb", None)
        if not isinstance(rotary, nn.Module):
            raise InputError(f"{type(decoder).__name__} computes no rotary positions for experts beside an MLP")
        self.signature = inspect.signature(rotary.forward)
        self.types = getattr(decoder.config, "layer_types", None)
        self.by_type: dict[str | None, Any] = {}
        self.remove = rotary.register_forward_hook(self._note, with_kwargs=True).remove

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.by_type[self.signature.bind(*args, **kwargs).arguments.get("layer_type")] = output

    def of(self, layer: int) -> Any:
        """What the attention of a layer is given."""
        return self.by_type[self.types[layer] if self.types and None not in self.by_type else None]


@contextmanager
def read_beside_mlp(model: PreTrainedModel, layer: int, positions: RotaryPositions, reader: Reader) -> Iterator[None]:
    """Add to the layer below ``layer``, beside its MLP, what the attention of ``layer`` makes of the experts.

    Args:
        layer: from 1 on.
        positions: of the passes inside the block.
        reader: called in place of the attention, with the queries of the residual stream that enters the MLP.

    Raises:
        InputError: one of the two layers is built otherwise than a norm and an attention, then a norm and an MLP.
    """
    below, own = find_layer(model, layer - 1), find_layer(model, layer)
    attention = find_attention(model, layer)
    find_mlp(model, layer - 1)
    sandwich = hasattr(below, SANDWICH)
    before_mlp = getattr(below, SANDWICH if sandwich else "post_attention_layernorm", None)
    names = {name for name, _ in own.named_children()}
    if before_mlp is None or "input_layernorm" not in names or hasattr(own, "residual_multiplier"):
        raise InputError(
            f"layer {layer} of {type(model).__name__} is not a norm and an attention, then a norm and an MLP, "
            "so experts of tokens have no place beside an MLP"
        )
    entered: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered[:] = args[:1]

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        if reader.off:
            return output
        (residual,) = entered
        with listening(model, (layer,), reader.read):
            found = attention(
                hidden_states=own.input_layernorm(residual),  # type: ignore[operator]
                position_embeddings=positions.of(layer),
                attention_mask=None,
            )[0]
        if sandwich:
            found = own.post_attention_layernorm(found)  # type: ignore[operator]
        whole = isinstance(output, tuple)
        states = output[0] if whole else output
        states = states + reader.active(states) * found.to(states.dtype)
        return (states, *output[1:]) if whole else states

    with ExitStack() as hooks:
        hooks.callback(before_mlp.register_forward_pre_hook(note).remove)
        hooks.callback(below.register_forward_hook(add).remove)
        yield
