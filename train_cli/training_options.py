"""What the commands of both trainings share: an option for every argument, and what is said at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from genpoe_plugin.training.arguments import TrainingArguments

if TYPE_CHECKING:
    from genpoe_plugin.training.state import Progress

Function = TypeVar("Function", bound=Callable[..., Any])

HELP = {
    "epochs": "Passes over the examples.",
    "max_steps": "Optimizer steps, instead of epochs.",
    "batch_size": "Examples an optimizer step, of each process.",
    "micro_batch_size": "Examples in memory at a time; gradients are accumulated.",
    "learning_rate": "Peak of AdamW's rate.",
    "warmup_ratio": "Share of the steps that the rate rises in.",
    "final_rate": "What the cosine ends at, as a share of the peak.",
    "weight_decay": "AdamW's.",
    "max_gradient_norm": "Gradients are clipped to this length.",
    "precision": "Of the forward pass; what learns stays in float32.",
    "validate_every": "Steps between validations.  [default: one before and one at the end]",
    "save_every": "Steps between savings, from which a stopped run goes on.",
    "seed": "Of initialisation, order and draws.",
    "negatives": "Per group, drawn anew every epoch.",
    "lora_rank": "0 trains every weight.",
    "lora_alpha": "Scale of the adapter, times its rank.",
    "lora_targets": "Layer names, comma-separated.  [default: the attention's linear layers]",
    "gradient_checkpointing": "Less memory for a third more time.",
    "num_passages": "At most, per example: one that answers, the others distractors.",
    "knowledge": "Share of steps whose prompts hold the passages' text.",
    "distillation": "Weight of matching the LLM's own answers with the passages in its prompt.",
}


class Names(click.ParamType):
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(value.split(",")) if isinstance(value, str) else value


def training_options(arguments: type[TrainingArguments]) -> Callable[[Function], Function]:
    """Options for all fields of ``arguments``, in their order."""
    hints = get_type_hints(arguments)

    def decorate(function: Function) -> Function:
        for field in reversed(fields(arguments)):
            flag = "--" + field.name.replace("_", "-")
            hint = hints[field.name]
            settings: dict[str, Any] = {"default": field.default, "show_default": True, "help": HELP[field.name]}
            if hint is bool:
                settings["is_flag"] = True
            elif get_origin(hint) is Literal:
                settings["type"] = click.Choice(get_args(hint))
            elif get_origin(hint) is tuple:
                settings |= {"type": Names(), "show_default": False}
            elif type(None) in get_args(hint):
                settings["type"] = next(kind for kind in get_args(hint) if kind is not type(None))
            function = click.option(flag, **settings)(function)
        return function

    return decorate


def report(progress: Progress, out: Path, finished_before: bool) -> None:
    """Say what came out: measures before and after, and where it is."""
    if finished_before:
        click.echo(f"{out}: finished before; delete it to train again")
    if progress.validations:
        first, best = progress.validations[0], max(progress.validations, key=lambda row: row["step"] == progress.best)
        for measure in first:
            if measure != "step":
                click.echo(
                    f"{measure}: {first[measure]:.3f} before training, {best[measure]:.3f} at step {progress.best}"
                )
    click.echo(f"{out}: trained in {progress.step:,} steps, loss {progress.losses[-1][1]:.3f}")
