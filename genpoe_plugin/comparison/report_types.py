"""The types of the values in lm_eval's report that a comparison uses. Results may be from others, or edited by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_mapping, value.values()))


def _counts(value: Any) -> bool:
    return _mappings(value) and all(
        count is None or _number(count) for counts in value.values() for count in counts.values()
    )


def _text_or_mapping(value: Any) -> bool:
    return isinstance(value, str | dict)


def _time(value: Any) -> bool:
    """Whether it is a number of seconds, which lm_eval writes as a text."""
    try:
        return _number(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


TYPES: dict[str, Any] = {
    "config": {
        "model": _text,
        "model_args": _text_or_mapping,
        "gen_kwargs": _text_or_mapping,
        "genpoe": {
            "arguments": {"mode": _text, "passages": _text, "trace": _text},
            "fingerprint": {"mode": _text, "dtype": _text},
            "documents": _mapping,
            "seconds": _numbers,
            "questions": _number,
            "first_token_seconds": _number,
            "expert_bytes": _number,
            "peak_memory": {"bytes": _number, "of": _text},
            "provenance": {"command": _text, "directory": _text, "versions": _mapping},
        },
    },
    "n-samples": _counts,
    "higher_is_better": _mappings,
    "total_evaluation_time_seconds": _time,
}
"""Checks of the values that a report may have, nested as they are; each value may also be missing or null."""
TASK_TYPES: dict[str, Any] = {"metadata": _mapping}
"""The same for the configuration of a task."""


def wrong_value(report: dict[str, Any], types: Mapping[str, Any], where: str = "") -> str | None:
    """The name of the first value of another type; None if there is none. Nulls count as missing, and are removed."""
    for name, check in types.items():
        value, place = report.get(name), f"{where}{name}"
        if value is None:
            report.pop(name, None)
            continue
        if isinstance(check, dict):
            if not isinstance(value, dict):
                return place
            if wrong := wrong_value(value, check, f"{place}."):
                return wrong
        elif not check(value):
            return place
    return None
