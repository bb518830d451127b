"""The click group ``genpoe``. The module of a command is imported only when the command runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import click

from genpoe_plugin import __version__
from genpoe_plugin.errors import InputError
from genpoe_plugin.interrupts import STATUS, exit_at_once


class LazyCommand(NamedTuple):
    """A command that is imported on use.

    Attributes:
        target: location of the command, as ``module:attribute``.
        help: line in ``--help``, which is shown without importing the module.
    """

    target: str
    help: str


class LazyGroup(click.Group):
    """A group whose subcommands are imported on use.

    Args:
        lazy: the subcommands, by name.
    """

    def __init__(self, *args: Any, lazy: dict[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self.lazy[cmd_name].target.split(":")
        return getattr(import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.help) for name, command in self.lazy.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class MainGroup(LazyGroup):
    """The top-level group: it prints an `InputError` or an interrupt as one line and exits with status 2 or 130.

    So it does with an error of the operating system that names a file.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:
            # Of the operating system: a name that is too long, a folder without permission, a full disk.
            if error.filename is None or error.strerror is None:
                raise
            click.echo(f"error: {InputError(f'{error.filename}: {error.strerror}')}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt as error:
            click.echo(str(error) or "interrupted", err=True)
            ctx.exit(STATUS)


@click.group(
    "genpoe",
    cls=MainGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    lazy={
        "demo": LazyCommand("train_cli.demo:demo", "A real LLM answers real questions in every mode."),
        "ask": LazyCommand("train_cli.ask:ask", "Answer one question in every mode, for a first look."),
        "data": LazyCommand("train_cli.data:data", "Download data, and convert it to training data."),
        "index": LazyCommand("train_cli.index:index", "Build or describe a passage index."),
        "retrieve": LazyCommand("train_cli.retrieve:retrieve", "Retrieve passages for questions, ahead of time."),
        "rerank": LazyCommand("train_cli.rerank:rerank", "Rerank retrieved passages."),
        "experts": LazyCommand("train_cli.experts:experts", "Create an untrained checkpoint of attention experts."),
        "compare": LazyCommand("train_cli.compare:compare", "A leaderboard of lm_eval results."),
    },
)
@click.version_option(__version__, prog_name="genpoe")
def main() -> None:
    """Passages as experts inside a frozen LLM: data, indexes, training, comparisons, and a demo.

    To evaluate, use the command of lm_eval: lm_eval --model genpoe --tasks genpoe_nq ...
    """


@main.group(
    "train",
    cls=LazyGroup,
    lazy={
        "reranker": LazyCommand("train_cli.train_reranker:reranker", "Train the reranker."),
        "hypernetwork": LazyCommand(
            "train_cli.train_hypernetwork:hypernetwork", "Train the hypernetwork that turns passages into experts."
        ),
    },
)
def train() -> None:
    """Train the reranker or the hypernetwork."""


def run() -> None:
    """The command ``genpoe``: `main`, which ends at once when it is interrupted."""
    try:
        main(prog_name="genpoe")
    except SystemExit as end:
        if end.code == STATUS:
            exit_at_once()
        raise
