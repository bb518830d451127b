"""The words of the demo's world: names of people, towns and organisations, and facts about them.

Names are put together from syllables, so a new name is always spelled with familiar pieces. Values come from closed
inventories of 20 to 36, which keeps guessing below 5 %. The words are in ``assets/lexicon.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Forms = tuple[str, ...]
"""One value in all the forms that count as a right answer; a passage may use any of them."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


@dataclass(frozen=True)
class Attribute:
    """One thing that can be asked about an entity.

    ``statements`` and ``questions`` are templates over ``{name}`` (the entity's full name), ``{short}`` (its
    surname, or the full name where it has none), ``{value}`` and ``{a}`` (the indefinite article of the value).
    """

    values: tuple[Forms, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


_LEXICON: dict[str, Any] = json.loads((Path(__file__).parent / "assets/lexicon.json").read_text(encoding="utf-8"))
_VALUES = {name: tuple(tuple(forms.split("|")) for forms in _words(text)) for name, text in _LEXICON["values"].items()}
_NAMES = {name: _words(text) for name, text in _LEXICON["names"].items()}

KINDS = {
    kind: {
        name: Attribute(_VALUES[entry["values"]], tuple(entry["statements"]), tuple(entry["questions"]))
        for name, entry in attributes.items()
    }
    for kind, attributes in _LEXICON["kinds"].items()
}
"""Attributes of each kind of entity, by name."""
FILLER = {kind: tuple(sentences) for kind, sentences in _LEXICON["filler"].items()}
REPORT_TITLES = tuple(_LEXICON["report_titles"])
REPORTS = {kind: tuple(sentences) for kind, sentences in _LEXICON["reports"].items()}
REPORT_FILLER = tuple(_LEXICON["report_filler"])
FIRST_NAMES = _NAMES["first_names"]
SURNAME_STARTS, SURNAME_ENDS = _NAMES["surname_starts"], _NAMES["surname_ends"]
PLACE_STARTS, PLACE_ENDS = _NAMES["place_starts"], _NAMES["place_ends"]
PLACE_QUALIFIERS = tuple(_LEXICON["place_qualifiers"])
ORGANISATION_TYPES = tuple(_LEXICON["organisation_types"])
