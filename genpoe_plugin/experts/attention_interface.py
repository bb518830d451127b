"""Access to the LLM's attention layers through transformers' extension point, the AttentionInterface.

Any decoder whose attention goes through that interface is supported. Inside `intercept_attention`, a handler of ours
replaces the layer's attention; it receives the rotated queries and keys, the values and the mask. The model's weights
and code do not change, and its attention implementation is restored at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genpoe_plugin.experts.decoder import find_attention, find_decoder

Output = tuple[Tensor, Tensor | None]
Attention = Callable[..., Output]


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of a layer's attention function by transformers.

    Attributes:
        base: name of the model's attention implementation, ``eager`` or ``sdpa``.
        module: the layer's attention module.
        query: rotated queries, ``[rows, heads, tokens, width]``.
        key, value: rotated keys and values, including those of the cache, ``[rows, KV heads, context, width]``.
        mask: the mask that the model made for ``base``, for all rows, or None.
        options: the other keyword arguments.
    """

    base: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def layer(self) -> int:
        """Index of the layer, from 0."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def scaling(self) -> float:
        """The factor on all logits."""
        scaling = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def softcap(self) -> float | None:
        """The cap on the logits, or None; transformers' sdpa does not cap them."""
        return None if self.base == "sdpa" else self.options.get("softcap")

    def plain(self) -> Output:
        """The output of the model's own attention, without experts."""
        if self.base == "eager":
            attention = sys.modules[type(self.module).__module__].eager_attention_forward
        else:
            attention = ALL_ATTENTION_FUNCTIONS[self.base]
        return attention(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def rows(self, rows: Tensor) -> AttentionCall:
        """The call restricted to some of its rows."""
        mask = self.mask
        if isinstance(mask, Tensor) and len(mask) > 1:
            mask = mask[rows]
        return replace(self, query=self.query[rows], key=self.key[rows], value=self.value[rows], mask=mask)


Handler = Callable[[AttentionCall], Output]
"""Computes a layer's attention in place of the model."""

_handler: ContextVar[tuple[Handler, tuple[int, ...]] | None] = ContextVar("genpoe_attention_handler", default=None)

PREFIX = "genpoe_"
BASES = ("eager", "sdpa")


def _implementation(base: str) -> Attention:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Output:
        call = AttentionCall(base, module, query, key, value, attention_mask, options)
        current = _handler.get()
        if current is None or call.layer not in current[1]:
            return call.plain()
        return current[0](call)

    return attention


for _base in BASES:
    AttentionInterface.register(PREFIX + _base, _implementation(_base))
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


@contextmanager
def intercept_attention(model: PreTrainedModel, layers: Sequence[int], handler: Handler) -> Iterator[None]:
    """Call ``handler`` in place of the attention of ``layers`` in every forward pass inside the block.

    A model with another kernel (flash or flex attention) uses ``sdpa`` inside the block, or ``eager`` if its logits
    are capped, which ``sdpa`` does not support. Those kernels do not return what experts need: flash attention returns
    only its result, and flex attention the log-sum-exp of its logits only in half precision.

    Raises:
        InputError: the model has no such layer, or experts do not support its kind of attention.
    """
    modules = [find_attention(model, layer) for layer in layers]
    decoder, _ = find_decoder(model)
    token = _handler.set((handler, tuple(layers)))
    try:
        with ExitStack() as changes:
            configs: dict[int, Any] = {id(module.config): module.config for module in (decoder, *modules)}
            for config in configs.values():
                before = config._attn_implementation
                if before.startswith(PREFIX):
                    continue
                sdpa = model._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None
                base = before if before in BASES else "sdpa" if sdpa else "eager"
                changes.callback(setattr, config, "_attn_implementation", before)
                config._attn_implementation = PREFIX + base
            yield
    finally:
        _handler.reset(token)
