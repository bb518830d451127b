"""What an evaluation is asked for: mode, parts, and passages."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.store import DTYPES, ON_DEVICE
from genpoe_plugin.prompts import EXPERT_MODES, MODES
from genpoe_plugin.selection.controls import CONTROLS
from genpoe_plugin.selection.pipeline import GATES


@dataclass(frozen=True)
class GenPoEArguments:
    """What ``--model_args`` may say besides the arguments of lm-eval's own class; checked when made.

    Attributes:
        mode: ``closed_book``, ``rag``, ``genpoe`` or ``genpoe_rag``.
        hypernetwork: checkpoint directory, or hub id as ``user/name`` or ``user/name@revision``; the genpoe
            modes need one.
        index: index directory on this machine, for docs that bring no ``ctxs``.
        reranker: directory or hub id, as of the hypernetwork; without one, passages keep their order and gates are
            uniform.
        num_retrieved, num_passages: at most how many passages before and after reranking.
        gates: ``softmax`` of the rerank scores, or ``uniform``.
        passages: ``retrieved``, or one of the controls (`genpoe_plugin.selection.controls`).
        expert_layers: of the checkpoint's layers those that are used, as ``5+11+12``; all of them without it. For
            experts in the attention.
        question_field: where a doc holds its question; the prompt's last question where a doc does not.
        expert_dtype: of the experts that are kept: ``float32``, ``float16``, ``bfloat16``, or, for experts in the
            attention, ``int8``; the LLM's without it.
        expert_store: folder that keeps experts for later runs.
        expert_gb: budget for the experts kept beside what makes them.
        trace: JSON Lines file to write, one line a sample; without it, it is beside the results that lm-eval saves.
        seed: of the controls.

    Raises:
        InputError: a value that cannot be, or a combination that cannot run.
    """

    mode: str = "genpoe"
    hypernetwork: str | None = None
    index: str | None = None
    reranker: str | None = None
    num_retrieved: int = 20
    num_passages: int = 4
    gates: str = "softmax"
    passages: str = "retrieved"
    expert_layers: str | int | None = None
    question_field: str = "question"
    expert_dtype: str | None = None
    expert_store: str | None = None
    expert_gb: float = ON_DEVICE / 10**9
    trace: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str]] = {"mode": MODES, "gates": GATES, "passages": CONTROLS}
        if self.expert_dtype is not None:
            choices["expert_dtype"] = DTYPES
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)}: not one of {', '.join(allowed)}")
        for name, least in (("num_retrieved", 1), ("num_passages", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name}={value}: give a whole number of at least {least}")
        if not isinstance(self.expert_gb, int | float) or not 0 < self.expert_gb < math.inf:
            raise InputError(f"expert_gb={self.expert_gb}: give a number of gigabytes above 0")
        if self.num_passages > self.num_retrieved:
            raise InputError(
                f"num_passages={self.num_passages} is more than num_retrieved={self.num_retrieved}; raise num_retrieved"
            )
        if self.expert_layers is not None and not re.fullmatch(r"\d+(\+\d+)*", str(self.expert_layers)):
            raise InputError(
                f"expert_layers={self.expert_layers}: give layer numbers with + between them, such as 5+11+12"
            )
        if self.uses_experts and not self.hypernetwork:
            raise InputError(
                f"mode={self.mode} needs hypernetwork=DIRECTORY; `genpoe train hypernetwork` makes one, and "
                "`genpoe experts create` one that needs no training (or choose mode=rag or mode=closed_book)"
            )
        if self.needs_index and not Path(str(self.index)).is_dir():
            raise InputError(f"index={self.index}: no such directory; `genpoe index build` makes one")

    @property
    def wanted_layers(self) -> tuple[int, ...]:
        """The layers that ``expert_layers`` names, in ascending order."""
        return tuple(sorted({int(number) for number in str(self.expert_layers).split("+")}))

    def layers_of(self, config: HypernetworkConfig) -> tuple[int, ...]:
        """The layers of a checkpoint that are used, in ascending order.

        Raises:
            InputError: ``expert_layers`` has others than the checkpoint, or the experts stand beside an MLP.
        """
        if self.expert_layers is None:
            return config.layers
        wanted = self.wanted_layers
        if config.head != "attention":
            raise InputError("expert_layers is for experts in the attention; those of this checkpoint are in one layer")
        if missing := sorted(set(wanted) - set(config.layers)):
            raise InputError(
                f"expert_layers={self.expert_layers}: the checkpoint has no experts in layer {missing[0]}, "
                f"only in {'+'.join(map(str, config.layers))}"
            )
        return wanted

    @property
    def uses_experts(self) -> bool:
        return self.mode in EXPERT_MODES

    @property
    def control(self) -> str:
        """The passage control as the mode leaves it: closed-book has no passages whatever is asked for."""
        return "none" if self.mode == "closed_book" else self.passages

    @property
    def needs_index(self) -> bool:
        return self.control != "none" and self.index is not None

    @property
    def needs_reranker(self) -> bool:
        return self.control not in ("none", "random", "constant") and self.reranker is not None

    @property
    def mixes_rows(self) -> bool:
        """Whether a question's passages depend on which other questions are in the run."""
        return self.control == "shuffled" or (self.control in ("random", "constant") and self.index is None)


def check_names(cls: type, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check the names of model arguments before anything is loaded.

    Args:
        cls: what takes them. Names that it does not know go to the loader of the LLM, which knows more; so only
            what is nearly one of its own is refused here.
        given: the arguments.
        options: what lm_eval's own options say.

    Raises:
        InputError: the LLM is not named, a name is said twice, or is nearly one of those that ``cls`` itself names.
    """
    if "pretrained" not in given:
        raise InputError("the model arguments name no LLM; add pretrained=, its folder or its name on the hub")
    for name, value in given.items():
        if options.get(name) is not None:
            raise InputError(
                f"{name}={value} among the model arguments: lm_eval has the option --{name} for it; give that alone"
            )
    known, own = _parameters(*cls.__mro__), _parameters(cls)
    for name in given:
        if name not in known and (near := get_close_matches(name, own, 1, 0.8)):
            raise InputError(f"{name}: no such model argument; did you mean {near[0]}?")


def nearest_name(cls: type, name: str) -> str | None:
    """The argument of ``cls``, or of a class that it builds on, that is most like ``name``; None if none is."""
    near = get_close_matches(name, _parameters(*cls.__mro__), 1)
    return near[0] if near else None


def _parameters(*classes: type) -> set[str]:
    """What the constructors of these classes take by name."""
    makers = [vars(cls)["__init__"] for cls in classes if cls is not object and "__init__" in vars(cls)]
    every = [parameter for make in makers for parameter in inspect.signature(make).parameters.values()]
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {parameter.name for parameter in every if parameter.kind not in unnamed} - {"self"}
