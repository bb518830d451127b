"""The names of model arguments, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from genpoe_plugin.arguments import ARGUMENTS
from genpoe_plugin.errors import InputError


def check_names(cls: type, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check the names of model arguments before anything is loaded.

    Args:
        cls: the model class. It passes unknown names on to the loader of the LLM, so only names similar to its own are
            refused here.
        arguments: the model arguments.
        options: the values of lm_eval's own options.

    Raises:
        InputError: there is no LLM, an argument is also an option of lm_eval, or a name is a misspelt argument.
    """
    if "pretrained" not in arguments:
        raise InputError("the model arguments name no LLM; add pretrained=, with its directory or hub name")
    for name, value in arguments.items():
        if options.get(name) is not None:
            raise InputError(
                f"{name}={value} among the model arguments: lm_eval has the option --{name} for this; use only that"
            )
    all_names, own_names = accepted_names(*cls.__mro__), accepted_names(cls)
    for name in arguments:
        if name not in all_names and (similar := get_close_matches(name, own_names, 1, 0.8)):
            raise InputError(f"{name}: no such model argument; did you mean {similar[0]}?")


def nearest_name(cls: type, name: str) -> str | None:
    """The argument of ``cls`` or its base classes that is most similar to ``name``; None if none is similar."""
    similar = get_close_matches(name, accepted_names(*cls.__mro__), 1)
    return similar[0] if similar else None


def accepted_names(*classes: type) -> set[str]:
    """The names in `ARGUMENTS`, and the named parameters of these classes' constructors."""
    constructors = [vars(cls)["__init__"] for cls in classes if cls is not object and "__init__" in vars(cls)]
    parameters = [parameter for init in constructors for parameter in inspect.signature(init).parameters.values()]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {*ARGUMENTS, *(parameter.name for parameter in parameters if parameter.kind not in variadic)} - {"self"}
