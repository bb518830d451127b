"""Find the systems that a system is compared with: its controls, and closed-book and RAG systems of the same LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genpoe_plugin.arguments import ARGUMENTS
from genpoe_plugin.comparison.settings import Settings, deciding, key, without_seed


def llm_of(settings: Settings) -> Settings:
    """The settings of the LLM: all settings that are not arguments of the genpoe model."""
    return {name: value for name, value in settings.items() if name not in ARGUMENTS}


def control_of(settings: Settings, control: str, others: Sequence[Settings]) -> int | None:
    """The position of the system that differs from this one only in its passages."""
    if settings.get("mode") in (None, "closed_book"):
        return None
    return _with_changes(settings, {"passages": control}, others)


def closed_book_of(settings: Settings, others: Sequence[Settings]) -> int | None:
    """The position of closed-book answering with the same LLM."""
    return _with_same_llm(settings, {"mode": "closed_book"}, others)


def rag_of(settings: Settings, others: Sequence[Settings]) -> int | None:
    """The position of RAG with the same LLM and passages; with the same number of passages, if there is such a system.

    Args:
        settings: the settings of a system with passages.
        others: the settings of all systems, better ones first.
    """
    same = _with_changes(settings, {"mode": "rag"}, others)
    if same is not None:
        return same
    return _with_same_llm(settings, {"mode": "rag", "passages": settings.get("passages")}, others)


def _with_changes(settings: Settings, changes: dict[str, Any], others: Sequence[Settings]) -> int | None:
    # "kind" and "dtype" are not arguments of the model; `deciding` keeps them unchanged.
    target = _without_needless_gates(without_seed(deciding(settings | changes)))
    return next((place for place, other in enumerate(others) if _without_needless_gates(other) == target), None)


def _without_needless_gates(settings: Settings) -> str:
    """The settings as text, without those of the gates for one passage, whose gate is always 1."""
    needless = ("gates", "gate_temperature") if settings.get("num_passages") == 1 else ()
    return key({name: value for name, value in settings.items() if name not in needless})


def _with_same_llm(settings: Settings, wanted: dict[str, Any], others: Sequence[Settings]) -> int | None:
    llm = key(llm_of(settings))
    return next(
        (
            place
            for place, other in enumerate(others)
            if key(llm_of(other)) == llm and all(other.get(name) == value for name, value in wanted.items())
        ),
        None,
    )
