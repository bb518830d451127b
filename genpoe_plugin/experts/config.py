"""What a hypernetwork is made of: every number and name that its checkpoint needs to be built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from genpoe_plugin.errors import InputError


@dataclass(frozen=True)
class HypernetworkConfig:
    """Dimensions and forms of a hypernetwork and its experts.

    Attributes:
        hidden_size: width ``d`` of the LLM that the experts stand in.
        layer: the decoder layer, counted from 0, whose MLP they stand beside.
        rank: ``r``, the inner width of an expert's two low-rank products.
        expert_width: ``h``, the width of its hidden layer.
        encoder: how a passage becomes a code: ``mean`` of its token embeddings (the paper's form) or ``attention``
            pooling with learned queries.
        num_queries: learned queries of the attention encoder.
        code_size: width of the code.
        normalise: bring token embeddings (attention) or their mean (mean) to unit root mean square first.
        head: how a code becomes an expert; ``dense`` generates all four matrices entry by entry.
        base: the shared matrices that generated ones are added to: ``random`` draws all four (the paper's form),
            ``silent`` draws three and makes the last zero, so that an untrained expert says nothing.
        generator_gain: factor on all that is generated; below 1 it slows the generating layer, whose many inputs would
            otherwise move an expert by more than its base in a few steps (the paper's form has 1).
    """

    hidden_size: int
    layer: int
    rank: int
    expert_width: int
    encoder: Literal["mean", "attention"] = "attention"
    num_queries: int = 8
    code_size: int = 128
    normalise: bool = True
    head: Literal["dense"] = "dense"
    base: Literal["random", "silent"] = "silent"
    generator_gain: float = 0.1

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise InputError(f"hypernetwork {name} is {value!r}; it must be one of {', '.join(choices)}")
            if hint is int and (not isinstance(value, int) or value < (0 if name == "layer" else 1)):
                raise InputError(f"hypernetwork {name} is {value!r}; it must be a positive whole number")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HypernetworkConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: a field is missing, unknown or out of range.
        """
        known = {field.name for field in fields(cls)}
        if wrong := sorted(set(values) ^ known):
            raise InputError(f"hypernetwork configuration: missing or unknown field {', '.join(wrong)}")
        return cls(**values)
