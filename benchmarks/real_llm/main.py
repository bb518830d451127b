"""The click group ``real-llm``. A command's module is imported only when that command runs."""

from __future__ import annotations

import click

from train_cli.main import LazyCommand, MainGroup

COMMANDS = {
    "table": LazyCommand("benchmarks.real_llm.table:table", "One LLM in every mode, with controls and layer sets."),
    "report": LazyCommand("benchmarks.real_llm.report:report", "The tables of several LLMs as one document."),
}


@click.group("real-llm", cls=MainGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
def real_llm() -> None:
    """Experts in real, pretrained LLMs."""
