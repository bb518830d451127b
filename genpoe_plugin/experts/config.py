"""The configuration of a hypernetwork: every value that is needed to rebuild it from its checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from genpoe_plugin.errors import InputError

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "encoder": "mean",
        "code_size": 128,
        "normalise": False,
        "states": "embeddings",
        "head": "dense",
        "rank": 512,
        "base": "random",
        "generator_gain": 1.0,
    },
    "recommended": {
        "head": "attention",
        "addition_rank": 64,
        "query_rank": 64,
        "window": 4,
        "layout": "paragraph",
    },
    "memory": {
        "encoder": "attention",
        "num_queries": 64,
        "normalise": True,
        "states": "contextual",
        "head": "memory",
        "core_size": 64,
        "base": "silent",
        "generator_gain": 1.0,
    },
    "attention": {"head": "attention"},
}


LARGEST = 2**31 - 1  # of a size; larger ones overflow
ATTENTION_ONLY = ("addition_rank", "query_rank", "window", "place", "layout")
"""Fields that only the head ``attention`` uses."""


@dataclass(frozen=True)
class HypernetworkConfig:
    """Configuration of a hypernetwork and its experts.

    Attributes:
        hidden_size: hidden width ``d`` of the LLM.
        layers: indices of the decoder layers with experts, from 0, in ascending order. Experts beside an MLP (every
            head but ``attention``) are in one layer.
        expert_width: ``h``, the width of an expert's hidden layer.
        rank: ``r``, the inner width of a dense expert's two low-rank products.
        core_size: ``p``, the width of a factored expert's two cores.
        encoder: how a passage becomes a code: ``mean`` of its token states (the paper's form) or ``attention``
            pooling with learned queries.
        num_queries: number of learned queries of the attention encoder; with the ``memory`` head also the number of
            memories in an expert.
        value_size: width to which a learned projection, shared by all queries, reduces each query's output. None keeps
            ``hidden_size``; the layer that joins the outputs then holds most parameters of a small hypernetwork.
        code_size: width of the code; the ``memory`` head has no code.
        normalise: scale token states (attention) or their mean (mean) to unit root mean square first.
        states: what the encoder reads for each token: the LLM's ``embeddings`` (the paper's form), or ``contextual``
            hidden states, which enter the experts' layer while the LLM reads the passage.
        head: how a code becomes an expert. ``dense`` generates every entry of four matrices (the paper's form).
            ``factored`` generates two small cores between learned matrices that all experts share. ``memory`` fills
            such cores with the queries' outputs, as keys of one core and values of the other. ``attention`` needs no
            code: the expert is the keys and values that the LLM's own attention computes for the passage's tokens; the
            fields from ``expert_width`` to ``states`` are not used.
        base: initial values of an expert. ``random`` draws all of them (the paper's form). ``silent`` sets the last
            factor to zero, so that an untrained expert outputs zero (a dense one almost zero). A dense head adds what
            it generates to shared matrices that stay as drawn; the other heads learn their shared matrices.
        generator_gain: factor on all generated values. Below 1 it slows the generating layer, whose many inputs would
            otherwise change an expert by more than its base in a few steps (1 in the paper's form).
        num_heads, num_kv_heads, head_width: number of query heads, number of key-value heads, and head width of the
            LLM; required by the ``attention`` head.
        kv_heads: the key-value heads with experts in each of ``layers``, in ascending order; None for all heads.
        addition_rank: rank of the terms that a trained ``attention`` head adds to keys and values, computed from the
            hidden states that enter each layer; None adds nothing.
        query_rank: rank of the terms that a trained ``attention`` head adds to the queries of the tokens that its
            experts act on; None adds nothing.
        window: number of consecutive passage tokens in one unit of an expert in the attention. Learned scores of the
            hidden states that enter the layer pool them.
        layout: the text around a passage when the LLM reads it for the ``attention`` head. ``knowledge``: as in the
            RAG prompt, after the line ``Knowledge:``. ``paragraph``: the passage alone, followed by an empty line.
        place: where experts of the ``attention`` head are read. ``attention``: in the softmax of each of ``layers``,
            together with the context. ``mlp``: beside the MLP of the layer below each of ``layers``, with the
            attention weights of that layer, in a softmax with a null in place of the context.
    """

    hidden_size: int
    layers: tuple[int, ...]
    expert_width: int
    rank: int = 512
    core_size: int = 64
    encoder: Literal["mean", "attention"] = "attention"
    num_queries: int = 8
    value_size: int | None = None
    code_size: int = 128
    normalise: bool = True
    states: Literal["embeddings", "contextual"] = "embeddings"
    head: Literal["dense", "factored", "memory", "attention"] = "dense"
    base: Literal["random", "silent"] = "silent"
    generator_gain: float = 0.1
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_width: int | None = None
    kv_heads: tuple[tuple[int, ...], ...] | None = None
    addition_rank: int | None = None
    query_rank: int | None = None
    window: int = 1
    place: Literal["attention", "mlp"] = "attention"
    layout: Literal["knowledge", "paragraph"] = "knowledge"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise InputError(f"hypernetwork {name} is {value!r}; it must be one of {', '.join(choices)}")
            if NoneType in choices and value is None:
                continue
            if hint is bool and not isinstance(value, bool):
                raise InputError(f"hypernetwork {name} is {value!r}; it must be true or false")
            if hint is float and not (isinstance(value, int | float) and abs(value) <= sys.float_info.max):
                raise InputError(f"hypernetwork {name} is {value!r}; it must be a finite number")
            whole = hint is int or (int in choices and get_origin(hint) is not tuple)
            if whole and not (isinstance(value, int) and 1 <= value <= LARGEST):
                raise InputError(f"hypernetwork {name} is {value!r}; it must be a positive whole number")
        if not _ascending(self.layers):
            raise InputError(f"hypernetwork layers is {self.layers!r}; it must be different layers, in ascending order")
        if self.head == "memory" and self.encoder != "attention":
            raise InputError("hypernetwork head 'memory' needs encoder 'attention', whose outputs it stores")
        if self.head == "attention":
            self._check_heads()
        elif wrong := [name for name in ATTENTION_ONLY if getattr(self, name) != _default(name)]:
            raise InputError(
                f"hypernetwork {wrong[0]} is for head 'attention' only; head {self.head!r} does not use it"
            )
        elif len(self.layers) > 1:
            raise InputError(f"hypernetwork layers is {self.layers!r}; head {self.head!r} has experts in one layer")

    def _check_heads(self) -> None:
        if not (self.num_heads and self.num_kv_heads and self.head_width):
            raise InputError("hypernetwork head 'attention' needs num_heads, num_kv_heads and head_width of the LLM")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"hypernetwork num_heads {self.num_heads} is not a multiple of {self.num_kv_heads}")
        if self.place == "mlp" and self.layer == 0:
            raise InputError("hypernetwork place 'mlp' needs layers from 1 on: no MLP is below layer 0")
        if self.kv_heads is None:
            return
        if not isinstance(self.kv_heads, tuple) or len(self.kv_heads) != len(self.layers):
            raise InputError(
                f"hypernetwork kv_heads is {self.kv_heads!r}; it must be a list of heads for each of "
                f"{len(self.layers)} layers"
            )
        for heads in self.kv_heads:
            if not _ascending(heads) or heads[-1] >= self.num_kv_heads:
                raise InputError(
                    f"hypernetwork kv_heads has {heads!r}; it must be some of the heads 0 to {self.num_kv_heads - 1}, "
                    "in ascending order"
                )

    @property
    def layer(self) -> int:
        """The layer with experts, or the lowest of several."""
        return self.layers[0]

    @property
    def is_trained(self) -> bool:
        """Whether experts in the attention have trainable parameters besides their biases."""
        return self.addition_rank is not None or self.query_rank is not None or self.window > 1

    @property
    def reads_states(self) -> bool:
        """Whether experts in the attention need the hidden states that enter their layers, besides keys and values."""
        return self.addition_rank is not None or self.window > 1

    @classmethod
    def preset(cls, name: str, *, hidden_size: int, **changes: Any) -> HypernetworkConfig:
        """A configuration of `PRESETS` for an LLM of width ``hidden_size``, with some fields changed.

        ``paper`` is the paper's form; it is trained on passages without titles. ``recommended`` is trained experts in
        the LLM's attention, with one unit per four tokens of a passage. ``attention`` is untrained experts in the
        attention, with one unit per token. ``memory`` is a small form beside the MLP of one layer, where the paper's
        form is.

        Args:
            name: name of the preset.
            hidden_size: hidden width of the LLM.
            changes: fields that differ from the preset. ``layers`` is required; ``layer=5`` means ``layers=(5,)``.

        Raises:
            InputError: there is no such preset, or a field is unknown or out of range.
        """
        if name not in PRESETS:
            raise InputError(f"hypernetwork preset {name!r} is unknown; it must be one of {', '.join(PRESETS)}")
        values = {"hidden_size": hidden_size, "expert_width": hidden_size, **PRESETS[name], **changes}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HypernetworkConfig:
        """The inverse of :meth:`to_dict`.

        A missing field gets its default, which is how versions without the field behaved. Checkpoints of earlier
        versions have a single ``layer`` instead of ``layers``.

        Raises:
            InputError: a field without default is missing, or one is unknown or out of range.
        """
        values = dict(values)
        if "layer" in values and "layers" not in values:
            values["layers"] = [values.pop("layer")]
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if wrong := sorted((set(values) - known) | (needed - set(values))):
            raise InputError(f"hypernetwork configuration: missing or unknown field {', '.join(wrong)}")
        if isinstance(values["layers"], list):
            values["layers"] = tuple(values["layers"])
        if isinstance(values.get("kv_heads"), list):
            values["kv_heads"] = tuple(
                tuple(heads) if isinstance(heads, list) else heads for heads in values["kv_heads"]
            )
        return cls(**values)


def _default(name: str) -> Any:
    return next(field.default for field in fields(HypernetworkConfig) if field.name == name)


def _ascending(numbers: Any) -> bool:
    """Whether ``numbers`` is a tuple of at least one whole number from 0 on, strictly ascending."""
    return (
        isinstance(numbers, tuple)
        and bool(numbers)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and all(one < other for one, other in pairwise(numbers))
    )
