"""Attention experts beside an MLP, read with the attention weights of the next layer.

Beside the MLP of layer ``l - 1``, the input norm, the query projection and the output projection of layer ``l`` read
the experts from the residual stream that enters the MLP. The result is added to the residual stream that leaves the
layer.
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
    """Reads a batch's experts with a given attention module."""

    @property
    def off(self) -> bool:
        """Whether the current forward pass has no experts."""

    def reading(self, attention: Callable[[], Tensor]) -> Tensor:
        """The output of ``attention`` over the experts alone; zeros for tokens without experts."""


@contextmanager
def read_beside_mlp(model: PreTrainedModel, layer: int, reader: Reader) -> Iterator[None]:
    """Add the attention of ``layer`` over the experts to the output of the layer below, beside its MLP.

    Args:
        model: the LLM.
        layer: index of the layer whose attention reads the experts, from 1.
        reader: reads the batch's experts.

    Raises:
        InputError: see `find_beside_mlp`.
    """
    modules = find_beside_mlp(model, layer)
    decoder, _ = find_decoder(model)
    rotary = decoder.get_submodule("rotary_emb")
    signature = inspect.signature(rotary.forward)
    # Some families (Gemma 3) use different rotary angles for different types of layers.
    layer_type = model.config.get_text_config().layer_types[layer] if "layer_type" in signature.parameters else None
    angles: Any = None
    entered: Tensor | None = None

    def record_angles(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal angles
        if signature.bind(*args, **kwargs).arguments.get("layer_type") == layer_type:
            angles = output

    def record_entered(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal entered
        entered = args[0]

    def attention() -> Tensor:
        states = modules.before_attention(entered)
        return modules.attention(hidden_states=states, position_embeddings=angles, attention_mask=None)[0]

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        if reader.off:
            return output
        added = reader.reading(attention)
        if modules.behind_attention is not None:
            added = modules.behind_attention(added)
        if isinstance(output, tuple):  # older versions of transformers
            return (output[0] + added.to(output[0].dtype), *output[1:])
        return output + added.to(output.dtype)

    with ExitStack() as hooks:
        hooks.callback(rotary.register_forward_hook(record_angles, with_kwargs=True).remove)
        hooks.callback(modules.before_mlp.register_forward_pre_hook(record_entered).remove)
        hooks.callback(modules.below.register_forward_hook(add).remove)
        yield
