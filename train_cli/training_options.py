"""Options and output that ``genpoe train reranker`` and ``genpoe train hypernetwork`` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from genpoe_plugin.experts.config import PRESETS, HypernetworkConfig
from genpoe_plugin.training.training_arguments import TrainingArguments
from train_cli.layers import Layers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from genpoe_plugin.checkpoints.card import DataFile
    from genpoe_plugin.training.memory import Trial
    from genpoe_plugin.training.trainer_state import Progress

Function = TypeVar("Function", bound=Callable[..., Any])

HELP = {
    "epochs": "Passes over the examples.",
    "max_steps": "Number of optimizer steps; replaces --epochs.",
    "batch_size": "Examples per optimizer step and process.",
    "micro_batch_size": "Examples in memory at a time; gradients are accumulated.",
    "learning_rate": "Peak learning rate of AdamW; 1e-3 by default for experts in the attention.",
    "warmup_ratio": "Share of the steps with linear warm-up.",
    "final_rate": "Final learning rate of the cosine schedule, as a share of the peak.",
    "weight_decay": "Weight decay of AdamW.",
    "max_gradient_norm": "Maximum gradient norm.",
    "precision": "Precision of the forward pass; trained weights stay in float32.",
    "validate_every": "Steps between validations.  [default: one before and one at the end]",
    "save_every": "Steps between saved training states.",
    "seed": "Random seed for initialisation, data order and sampling.",
    "negatives": "Negatives per example, drawn again in every epoch.",
    "lora_rank": "Rank of the LoRA adapter; 0 trains all weights.",
    "lora_alpha": "Alpha of the LoRA adapter.",
    "lora_targets": "Layer names, comma-separated.  [default: the attention's linear layers]",
    "gradient_checkpointing": "Recompute activations: less memory, a third more time.",
    "num_passages": "Maximum passages per example: one with the answer, the others distractors.",
    "knowledge": "Share of steps whose prompts also contain the passages.",
    "unanswerable": "Share of examples with wrong passages only; their target is the LLM without passages.",
    "distillation": "Weight of the divergence from the LLM with the passages in its prompt.",
}

FORM_HELP = {
    "expert_width": "Hidden width of an expert.  [default: the LLM's width]",
    "rank": "Inner width of a dense expert's low-rank products.",
    "core_size": "Width of the two cores of a factored or memory expert.",
    "encoder": "Passage encoder of the hypernetwork.",
    "num_queries": "Learned queries of the attention encoder, and slots of a memory expert.",
    "value_size": "Value width of the attention encoder.",
    "code_size": "Width of the passage's encoding.",
    "normalise": "RMS-normalise the token states.",
    "states": "Token representations that the encoder reads.",
    "head": "Head of the hypernetwork, which generates the expert.",
    "base": "Initial experts: random, or zero (silent).",
    "generator_gain": "Factor on generated weights.",
    "addition_rank": "Rank of the additions to keys and values (experts in the attention).  [default: 64]",
    "query_rank": "Rank of the additions to queries (experts in the attention).",
    "window": "Consecutive tokens that are pooled into one unit (experts in the attention).",
    "layout": "Text around a passage when the LLM reads it (experts in the attention): the RAG prompt's, or none.",
    "place": "Where experts are read: in the attention, or beside the MLP of the layer below.",
}


class Names(click.ParamType):
    """Comma-separated names."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(value.split(",")) if isinstance(value, str) else value


def training_options(arguments: type[TrainingArguments]) -> Callable[[Function], Function]:
    """Options for all fields of ``arguments``, with their defaults."""
    return _options(arguments, {field.name: field.default for field in fields(arguments)})


def form_options(function: Function) -> Function:
    """Options for the form of a hypernetwork; by default (None) the preset decides."""
    names = [field.name for field in fields(HypernetworkConfig) if field.name in FORM_HELP]
    function = _options(HypernetworkConfig, dict.fromkeys(names))(function)
    function = click.option("--layers", type=Layers(), help="Layers of experts in the attention, such as 5,11,12.")(
        function
    )
    function = click.option("--init", help="Start from this checkpoint, with its layers and heads.")(function)
    function = click.option(
        "--layer", type=int, help="Decoder layer of the experts, from 0.  [default: a third of the way up]"
    )(function)
    return click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        default="recommended",
        show_default=True,
        help="Form of the experts; the options below change parts of it.",
    )(function)


def _options(holder: type, defaults: Mapping[str, Any]) -> Callable[[Function], Function]:
    hints = get_type_hints(holder)

    def decorate(function: Function) -> Function:
        for name, default in reversed(list(defaults.items())):
            flag, hint = "--" + name.replace("_", "-"), hints[name]
            settings: dict[str, Any] = {"default": default, "show_default": True, "help": (HELP | FORM_HELP)[name]}
            if hint is bool:
                flag = f"{flag}/--no{flag[1:]}" if default is None else flag
                settings["is_flag"] = True
            elif get_origin(hint) is Literal:
                settings["type"] = click.Choice(get_args(hint))
            elif get_origin(hint) is tuple:
                settings |= {"type": Names(), "show_default": False}
            else:
                settings["type"] = next(kind for kind in (*get_args(hint), hint) if kind is not NoneType)
            function = click.option(flag, **settings)(function)
        return function

    return decorate


def card_options(function: Function) -> Function:
    """Options for the licence and the data sets in the model card."""
    dataset = click.option(
        "--dataset",
        "datasets",
        multiple=True,
        help="For the model card: hub name of a source data set; may be repeated.",
    )
    licence = click.option("--licence", help="For the model card: hub name of the licence, such as apache-2.0.")
    return dataset(licence(function))


def digests(files: Sequence[DataFile]) -> dict[str, str]:
    """SHA-256 of each data file, by its use; part of a run's identity."""
    return {"data" if file.use == "training" else file.use: file.sha256 for file in files}


def report(progress: Progress, out: Path, finished_before: bool) -> None:
    """Print the measures before and after training, and the output directory."""
    if finished_before:
        click.echo(f"{out}: already finished; delete it to train again")
    if progress.validations:
        first, best = progress.validations[0], max(progress.validations, key=lambda row: row["step"] == progress.best)
        for measure in first:
            if measure != "step":
                click.echo(
                    f"{measure}: {first[measure]:.3f} before training, {best[measure]:.3f} at step {progress.best}"
                )
    click.echo(f"{out}: trained in {progress.step:,} steps, loss {progress.losses[-1][1]:.3f}")


def shards(accelerator: Accelerator) -> int:
    """The number of devices that the weights that learn are sharded over."""
    from accelerate.utils import DistributedType

    return accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1


def show_memory(trial: Trial, accelerator: Accelerator, device: str | None, only: bool) -> bool:
    """Measure a trial step and print its memory.

    Args:
        trial: the training.
        accelerator: device and processes of the run.
        device: name of the device, if the user gave one.
        only: whether the user asked only for the estimate.

    Returns:
        Whether to start the training.

    Raises:
        InputError: the device has less free memory than the training needs, or the user asked only for an estimate of
            an LLM for which there is none.
    """
    from genpoe_plugin.device_memory import available_memory
    from genpoe_plugin.training.memory import NoEstimate, check_fits

    try:
        estimate = trial.measure()
    except NoEstimate as error:
        if only:
            raise
        click.echo(f"{error}; training without", err=True)
        return True
    if accelerator.is_main_process:
        click.echo(estimate.table(), err=True)
    if not only:
        check_fits(trial, estimate, available_memory(device or str(accelerator.device)))
    return not only


def describe(
    kind: Literal["hypernetwork", "reranker"],
    base_model: str,
    out: Path,
    form: Mapping[str, Any],
    data: Sequence[DataFile],
    arguments: TrainingArguments,
    progress: Progress,
    processes: int,
    lm_eval_arguments: Mapping[str, Any] | None = None,
    *,
    licence: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Write the model card, unless it exists."""
    from genpoe_plugin.checkpoints.card import CARD, ModelCard, write_card

    if (out / CARD).is_file():
        return
    card = ModelCard(
        kind=kind,
        base_model=base_model,
        out=str(out),
        form=form,
        data=data,
        arguments=asdict(arguments),
        command=command_words(processes),
        steps=progress.step,
        validations=progress.validations,
        best=progress.best,
        lm_eval_arguments=lm_eval_arguments or {},
        licence=licence,
        datasets=datasets,
    )
    write_card(out, card)


def command_words(processes: int = 1) -> list[str]:
    """The words of the running command, with the options that the user gave."""
    context = click.get_current_context()
    words = ["accelerate", "launch", "--num_processes", str(processes), "-m", "train_cli"] if processes > 1 else []
    words = words or ["genpoe"]
    words += context.command_path.split()[1:]
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value, flags = context.params[name], [*option.opts, *option.secondary_opts]
        if isinstance(value, bool):
            words.append(flags[0] if value else flags[-1])
        else:
            for item in value if option.multiple else [value]:
                words += [flags[0], ",".join(map(str, item)) if isinstance(item, tuple) else str(item)]
    return words
