"""Experts of passages' tokens beside an MLP, read as the next layer would read them.

Beside the MLP of layer ``l - 1`` that is by the input norm, the queries and the output projection of layer ``l``, from
the residual stream that enters the MLP; what is read is added to the one that leaves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from genpoe_plugin.experts.decoder import find_beside_mlp, find_decoder


class Reader(Protocol):
    """The experts of a batch, and the passes that read them."""

    @property
    def off(self) -> bool:
        """Whether the pass under way has no experts."""

    def reading(self, attention: Callable[[], Tensor]) -> Tensor:
        """What ``attention`` returns where it attends to the experts alone, and zeros for tokens that have none."""


@contextmanager
def read_beside_mlp(model: PreTrainedModel, layer: int, reader: Reader) -> Iterator[None]:
    """Add to the layer below ``layer``, beside its MLP, what the attention of ``layer`` makes of the experts.

    Args:
        layer: from 1 on.

    Raises:
        InputError: as of `find_beside_mlp`.
    """
    place = find_beside_mlp(model, layer)
    decoder, _ = find_decoder(model)
    rotary = decoder.get_submodule("rotary_emb")
    signature = inspect.signature(rotary.forward)
    # Some families (Gemma 3) rotate by other angles in other types of layers.
    own_type = model.config.get_text_config().layer_types[layer] if "layer_type" in signature.parameters else None
    angles: Any = None
    entered: Tensor | None = None

    def note_angles(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal angles
        if signature.bind(*args, **kwargs).arguments.get("layer_type") == own_type:
            angles = output

    def note_entered(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal entered
        entered = args[0]

    def attention() -> Tensor:
        states = place.before_attention(entered)
        return place.attention(hidden_states=states, position_embeddings=angles, attention_mask=None)[0]

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        if reader.off:
            return output
        found = reader.reading(attention)
        if place.behind_attention is not None:
            found = place.behind_attention(found)
        if isinstance(output, tuple):  # of older versions of transformers
            return (output[0] + found.to(output[0].dtype), *output[1:])
        return output + found.to(output.dtype)

    with ExitStack() as hooks:
        hooks.callback(rotary.register_forward_hook(note_angles, with_kwargs=True).remove)
        hooks.callback(place.before_mlp.register_forward_pre_hook(note_entered).remove)
        hooks.callback(place.below.register_forward_hook(add).remove)
        yield
