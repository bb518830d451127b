"""The names of model arguments, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from genpoe_plugin.arguments import ARGUMENTS
from genpoe_plugin.errors import InputError


def check_names(cls: type, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check the names of model arguments before anything is loaded.

    Args:
        cls: what takes them, `ARGUMENTS` included. Names that it does not know go to the loader of the LLM, which knows
            more; so only what is nearly one of its own is refused here.
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
    known, own = accepted_names(*cls.__mro__), accepted_names(cls)
    for name in given:
        if name not in known and (near := get_close_matches(name, own, 1, 0.8)):
            raise InputError(f"{name}: no such model argument; did you mean {near[0]}?")


def nearest_name(cls: type, name: str) -> str | None:
    """The argument of ``cls``, or of a class that it builds on, that is most like ``name``; None if none is."""
    near = get_close_matches(name, accepted_names(*cls.__mro__), 1)
    return near[0] if near else None


def accepted_names(*classes: type) -> set[str]:
    """`ARGUMENTS`, and what the constructors of these classes take by name."""
    makers = [vars(cls)["__init__"] for cls in classes if cls is not object and "__init__" in vars(cls)]
    every = [parameter for make in makers for parameter in inspect.signature(make).parameters.values()]
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {*ARGUMENTS, *(parameter.name for parameter in every if parameter.kind not in unnamed)} - {"self"}
