"""The click type for layers of an LLM."""

from __future__ import annotations

from typing import Any

import click


class Layers(click.ParamType):
    """Comma-separated layer numbers."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(sorted({int(number) for number in str(value).split(",")}))
        except ValueError:
            self.fail(f"{value!r} is not a list of layers such as 5,11,12", param, ctx)
