"""Passes that differ in the upper layers alone: what the lower layers returned is kept, and they do not run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from genpoe_plugin.experts.decoder import find_decoder


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Keep what each decoder layer returns in the one pass that is run meanwhile, the lowest layer's first."""
    _, layers = find_decoder(model)
    outputs: list[Any] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: PreTrainedModel, outputs: Sequence[Any], below: int) -> Iterator[None]:
    """Let the decoder layers under ``below`` return what they did before, without running.

    The pass must be of the same inputs, and nothing in it may differ under that layer.

    Args:
        outputs: of `recording`.
    """
    _, layers = find_decoder(model)
    with ExitStack() as stack:
        for layer, output in zip(layers[:below], outputs[:below], strict=True):
            stack.enter_context(_returning(layer, output))
        yield


@contextmanager
def _returning(layer: nn.Module, output: Any) -> Iterator[None]:
    # Tools such as accelerate set the attribute on the module as well.
    before = layer.__dict__.get("forward")
    layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
