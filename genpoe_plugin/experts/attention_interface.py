"""The LLM's attention layers, reached through transformers' own extension point, the AttentionInterface.

Any decoder whose attention goes through that interface can be listened to: inside `listening`, a function of ours is
called in place of the layer's attention, with the rotated queries and keys, the values and the mask. The model itself
is never changed; what it computes with is put back at the end.
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
class Call:
    """A call of a layer's attention, as transformers makes it.

    Attributes:
        base: the name of what the model computes attention with: ``eager`` or ``sdpa``.
        module: the layer's attention.
        query: ``[rows, heads, tokens, width]``, rotated.
        key, value: ``[rows, KV heads, context, width]``, those of the cache included; keys are rotated.
        mask: what the model made for ``base``, of all rows, or None.
        options: keyword arguments.
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
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def scaling(self) -> float:
        """The factor on all logits."""
        given = self.options.get("scaling")
        return self.query.shape[-1] ** -0.5 if given is None else given

    @property
    def softcap(self) -> float | None:
        """What the logits are capped at; transformers' sdpa does not cap them."""
        return None if self.base == "sdpa" else self.options.get("softcap")

    def plain(self) -> Output:
        """What the model computes by itself."""
        if self.base == "eager":
            attention = sys.modules[type(self.module).__module__].eager_attention_forward
        else:
            attention = ALL_ATTENTION_FUNCTIONS[self.base]
        return attention(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def rows(self, rows: Tensor) -> Call:
        """The call for some of its rows."""
        mask = self.mask
        if isinstance(mask, Tensor) and len(mask) > 1:
            mask = mask[rows]
        return replace(self, query=self.query[rows], key=self.key[rows], value=self.value[rows], mask=mask)


Listener = Callable[[Call], Output]

_listener: ContextVar[tuple[Listener, tuple[int, ...]] | None] = ContextVar("genpoe_listener", default=None)

PREFIX = "genpoe_"
BASES = ("eager", "sdpa")


def _implementation(base: str) -> Attention:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Output:
        call, listener = Call(base, module, query, key, value, attention_mask, options), _listener.get()
        if listener is None or call.layer not in listener[1]:
            return call.plain()
        return listener[0](call)

    return attention


for _base in BASES:
    AttentionInterface.register(PREFIX + _base, _implementation(_base))
    AttentionMaskInterface.register(PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


@contextmanager
def listening(model: PreTrainedModel, layers: Sequence[int], listener: Listener) -> Iterator[None]:
    """Have ``listener`` called in place of the attention of ``layers`` in every forward pass inside the block.

    A model that computes attention with another kernel (flash or flex attention) computes it with ``sdpa`` meanwhile,
    or with ``eager`` where its logits are capped, which ``sdpa`` does not do. Flash attention tells nothing but its
    result, flex attention the mass of its logits only in half precision.

    Raises:
        InputError: a layer is not there, or has no attention that can be listened to.
    """
    modules = [find_attention(model, layer) for layer in layers]
    decoder, _ = find_decoder(model)
    token = _listener.set((listener, tuple(layers)))
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
        _listener.reset(token)
