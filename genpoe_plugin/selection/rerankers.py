"""Rerankers of every kind, by name."""

from __future__ import annotations

from genpoe_plugin.selection.cross_encoder import CrossEncoderReranker
from genpoe_plugin.selection.late_interaction import LateInteractionReranker
from genpoe_plugin.selection.recognition import recognise
from genpoe_plugin.selection.reranking import Reranker, Scorer


def load_reranker(name: str, *, format: str | None = None, device: str = "cpu") -> Scorer:
    """Load a reranker as what it is; see `genpoe_plugin.selection.recognition.recognise`.

    Args:
        name: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
        format: a built-in format or a template file, for a decoder LLM.
        device: device of the model.

    Raises:
        InputError: there is no such model or device, the model is damaged, or its format is not known.
    """
    recognised = recognise(name, format)
    if recognised.late_interaction:
        return LateInteractionReranker.load(name, device=device)
    if recognised.format is None:
        return CrossEncoderReranker.load(name, device=device)
    return Reranker.load(name, format=format, device=device)
