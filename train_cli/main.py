"""The click group ``genpoe``. A command's module is imported only when that command runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import click

from genpoe_plugin import __version__
from genpoe_plugin.errors import InputError


class LazyCommand(NamedTuple):
    """Where a command is (``module:attribute``), and its line in ``--help``, which must not cost the import."""

    target: str
    help: str


class LazyGroup(click.Group):
    """A group whose subcommands are named in a mapping and imported on use."""

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
    """The outermost group: it turns the errors that users are meant to read into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt as error:
            click.echo(str(error) or "interrupted", err=True)
            ctx.exit(130)


@click.group(
    "genpoe",
    cls=MainGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    lazy={
        "demo": LazyCommand("train_cli.demo:demo", "A real LLM answers real questions in every mode."),
        "ask": LazyCommand("train_cli.ask:ask", "Answer one question in every mode, for a first look."),
        "data": LazyCommand("train_cli.data:data", "Download data, and make training data of it."),
        "index": LazyCommand("train_cli.index:index", "Build or describe a passage index."),
        "retrieve": LazyCommand("train_cli.retrieve:retrieve", "Retrieve passages for questions, ahead of time."),
        "rerank": LazyCommand("train_cli.rerank:rerank", "Rerank retrieved passages."),
        "experts": LazyCommand("train_cli.experts:experts", "Make an untrained checkpoint of attention experts."),
        "compare": LazyCommand("train_cli.compare:compare", "A leaderboard of lm_eval results."),
    },
)
@click.version_option(__version__, prog_name="genpoe")
def main() -> None:
    """Passages as experts inside a frozen LLM: data, indexes, training, comparisons, and a demo.

    Evaluation is lm_eval's own command: lm_eval --model genpoe --tasks genpoe_nq ...
    """


@main.group(
    "train",
    cls=LazyGroup,
    lazy={
        "reranker": LazyCommand("train_cli.train_reranker:reranker", "Train the reranker."),
        "hypernetwork": LazyCommand(
            "train_cli.train_hypernetwork:hypernetwork", "Train the hypernetwork that makes experts of passages."
        ),
    },
)
def train() -> None:
    """Train the reranker or the hypernetwork."""
