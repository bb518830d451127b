"""What a hypernetwork is made of: every number and name that its checkpoint needs to be built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
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
        "encoder": "attention",
        "num_queries": 64,
        "normalise": True,
        "states": "contextual",
        "head": "memory",
        "core_size": 64,
        "base": "silent",
        "generator_gain": 1.0,
    },
}


@dataclass(frozen=True)
class HypernetworkConfig:
    """Dimensions and forms of a hypernetwork and its experts.

    Attributes:
        hidden_size: width ``d`` of the LLM that the experts stand in.
        layer: the decoder layer, counted from 0, whose MLP they stand beside.
        expert_width: ``h``, the width of an expert's hidden layer.
        rank: ``r``, the inner width of a dense expert's two low-rank products.
        core_size: ``p``, the width of a factored expert's two cores.
        encoder: how a passage becomes a code: ``mean`` of its token states (the paper's form) or ``attention``
            pooling with learned queries.
        num_queries: learned queries of the attention encoder; with the ``memory`` head also what an expert can hold.
        value_size: width that a learned projection, the same for all queries, brings what they find to; None leaves it
            at ``hidden_size``, and most of a small hypernetwork's parameters in the layer that joins it.
        code_size: width of the code, which the ``memory`` head does without.
        normalise: bring token states (attention) or their mean (mean) to unit root mean square first.
        states: what the encoder reads of each token: the LLM's ``embeddings`` (the paper's form), or ``contextual``
            hidden states that enter ``layer`` while the LLM reads the passage.
        head: how a code becomes an expert: ``dense`` generates all four matrices entry by entry (the paper's form),
            ``factored`` two small cores between learned matrices that all experts share, ``memory`` such cores too,
            but straight from what the queries found: as the keys of one core and the values of the other.
        base: ``random`` draws all that an expert starts from (the paper's form), ``silent`` makes the last part zero,
            so that an untrained expert says nothing (a dense one next to nothing). What a dense head generates is added
            to shared matrices that stay as drawn; the others learn theirs.
        generator_gain: factor on all that is generated; below 1 it slows the generating layer, whose many inputs would
            otherwise move an expert by more than its base in a few steps (the paper's form has 1).
    """

    hidden_size: int
    layer: int
    expert_width: int
    rank: int = 512
    core_size: int = 64
    encoder: Literal["mean", "attention"] = "attention"
    num_queries: int = 8
    value_size: int | None = None
    code_size: int = 128
    normalise: bool = True
    states: Literal["embeddings", "contextual"] = "embeddings"
    head: Literal["dense", "factored", "memory"] = "dense"
    base: Literal["random", "silent"] = "silent"
    generator_gain: float = 0.1

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise InputError(f"hypernetwork {name} is {value!r}; it must be one of {', '.join(choices)}")
            if NoneType in choices and value is None:
                continue
            whole = hint is int or int in choices
            if whole and (not isinstance(value, int) or value < (0 if name == "layer" else 1)):
                raise InputError(f"hypernetwork {name} is {value!r}; it must be a positive whole number")
        if self.head == "memory" and self.encoder != "attention":
            raise InputError("hypernetwork head 'memory' needs encoder 'attention', whose queries find what it keeps")

    @classmethod
    def preset(cls, name: str, *, hidden_size: int, layer: int, **changes: Any) -> HypernetworkConfig:
        """A configuration of `PRESETS` for an LLM of width ``hidden_size``, but for ``changes`` to its fields.

        ``paper`` is the paper's form; its training also has passages as text alone, without titles. ``recommended``
        is small enough to train beside a large LLM.

        Raises:
            InputError: there is no such preset, or a field is unknown or out of range.
        """
        if name not in PRESETS:
            raise InputError(f"hypernetwork preset {name!r} is unknown; it must be one of {', '.join(PRESETS)}")
        values = {"hidden_size": hidden_size, "layer": layer, "expert_width": hidden_size, **PRESETS[name], **changes}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HypernetworkConfig:
        """The inverse of :meth:`to_dict`.

        A field that is missing has its default, which is what there was before there was the field.

        Raises:
            InputError: a field without default is missing, or one is unknown or out of range.
        """
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if wrong := sorted((set(values) - known) | (needed - set(values))):
            raise InputError(f"hypernetwork configuration: missing or unknown field {', '.join(wrong)}")
        return cls(**values)
