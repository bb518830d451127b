"""Record what the lower decoder layers return, and reuse it in passes that differ only in the upper layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from genpoe_plugin.experts.decoder import find_decoder


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Record what each decoder layer returns in the one forward pass inside the block.

    Yields:
        The outputs, the lowest layer's first; the pass fills the list.
    """
    _, layers = find_decoder(model)
    outputs: list[Any] = []

    def record(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: PreTrainedModel, outputs: Sequence[Any], below: int) -> Iterator[None]:
    """Make the decoder layers below layer ``below`` return recorded outputs instead of running.

    The pass must have the same inputs as the recorded one, and must not differ from it below that layer.

    Args:
        outputs: the outputs of all layers, from `recording`.
        below: index of the first layer that runs, from 0.
    """
    _, layers = find_decoder(model)
    with ExitStack() as stack:
        for layer, output in zip(layers[:below], outputs[:below], strict=True):
            stack.enter_context(_returning(layer, output))
        yield


@contextmanager
def _returning(layer: nn.Module, output: Any) -> Iterator[None]:
    # Tools such as accelerate also set ``forward`` on the module itself.
    before = layer.__dict__.get("forward")
    layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
