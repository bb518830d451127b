"""``genpoe train hypernetwork``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import ATTENTION_ONLY, PRESETS
from genpoe_plugin.training.training_arguments import HypernetworkTraining
from train_cli.training_options import (
    FORM_HELP,
    card_options,
    describe,
    digests,
    form_options,
    report,
    shards,
    show_memory,
    training_options,
)

IN_ATTENTION = tuple(name for name, form in PRESETS.items() if form.get("head") == "attention")
"""Presets whose experts are in the LLM's attention."""
ADDITION_RANK, ATTENTION_RATE = 64, 1e-3
"""Default rank of additions and learning rate for experts in the attention."""


@click.command()
@click.option("--model", required=True, help="The frozen LLM: directory or hub name.")
@click.option("--data", help="Questions with passages: DPR results, or what `genpoe retrieve` writes.")
@click.option(
    "--pretrain", help="Passages to train on without questions; then train on questions with --init and --data."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the checkpoint.")
@click.option("--validation", help="Held-out questions with passages; they decide which weights are written.")
@click.option(
    "--titles/--no-titles", default=None, help="Passages with their titles.  [default: yes; no for the paper's preset]"
)
@click.option(
    "--state-gb",
    default=4.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Gigabytes of memory for the LLM's states of passages, cached over all epochs.",
)
@click.option(
    "--state-store", type=click.Path(file_okay=False), help="Folder to store these states in, also for later runs."
)
@click.option("--estimate", is_flag=True, help="Print a memory estimate and exit.")
@form_options
@training_options(HypernetworkTraining)
@card_options
@click.option("--device", help="Device, such as cuda:1.  [default: a GPU if there is one]")
@click.option("--dtype", default="auto", show_default=True, help="Data type of the frozen LLM.")
@click.option("--gguf-file", help="Read the frozen LLM from this GGUF file in its directory or repository.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def hypernetwork(
    model: str,
    data: str | None,
    pretrain: str | None,
    out: Path,
    validation: str | None,
    titles: bool | None,
    state_gb: float,
    state_store: str | None,
    estimate: bool,
    preset: str,
    init: str | None,
    licence: str | None,
    datasets: tuple[str, ...],
    device: str | None,
    dtype: str,
    gguf_file: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Train a hypernetwork, which turns passages into experts for a frozen LLM."""
    from genpoe_plugin.checkpoints.card import DataFile
    from genpoe_plugin.checkpoints.checkpoint import checkpoint_fingerprint, load_hypernetwork, read_config
    from genpoe_plugin.data.passages import read_passages
    from genpoe_plugin.data.questions import read_questions
    from genpoe_plugin.experts.config import HypernetworkConfig
    from genpoe_plugin.experts.footprint import footprint
    from genpoe_plugin.llm.empty_model import empty_model, weight_bytes
    from genpoe_plugin.llm.language_model import load_language_model, load_tokenizer
    from genpoe_plugin.training.creation import attention_config
    from genpoe_plugin.training.devices import accelerator_on
    from genpoe_plugin.training.examples import PROMPT_WORDS, TARGET_WORDS, passage_examples, training_examples
    from genpoe_plugin.training.hypernetwork import Examples, train_hypernetwork
    from genpoe_plugin.training.llm_state_cache import state_files
    from genpoe_plugin.training.trainer import is_finished
    from genpoe_plugin.training.trials import HypernetworkTrial
    from genpoe_plugin.training.validation import Validation

    form = {name: options.pop(name) for name in ("layer", "layers", *FORM_HELP)}
    changes = {name: value for name, value in form.items() if value is not None}
    _check_form(preset, init, changes)
    if (data is None) == (pretrain is None):
        raise InputError("give either --data QUESTIONS or --pretrain PASSAGES")
    arguments = HypernetworkTraining(**options)
    if pretrain is not None and (arguments.unanswerable or arguments.num_passages > 1):
        raise InputError("--unanswerable and --num-passages need questions; leave them out with --pretrain")
    from_gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    titles = preset != "paper" if titles is None else titles
    source = str(data or pretrain)
    examples: Examples
    if pretrain is not None:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, **from_gguf)
        examples = passage_examples(read_passages(pretrain), tokenizer, titles)
        if not examples:
            raise InputError(f"{pretrain}: every passage is too short; {PROMPT_WORDS + TARGET_WORDS} words are needed")
    else:
        examples = training_examples(read_questions(source), titles)
        if not examples:
            raise InputError(f"{data}: no training example: no question has a passage that contains one of its answers")
    accelerator = accelerator_on(device)
    finished_before = is_finished(out)

    empty = empty_model(model, dtype=dtype, trust_remote_code=trust_remote_code, **from_gguf)
    if init is not None:
        config = read_config(init)
        if config.head != "attention":
            raise InputError(f"--init {init}: its experts are not in the attention")
        # An untrained checkpoint gets the preset's form, in its own layers and heads.
        form = PRESETS["recommended"] if preset == "recommended" and not config.is_trained else {}
        config = replace(config, **form | changes)
    elif preset in IN_ATTENTION:
        layers = changes.pop("layers", None)
        config = replace(attention_config(empty, layers), **PRESETS[preset] | changes)
    else:
        shape = empty.config.get_text_config()
        layer = changes.pop("layer", shape.num_hidden_layers // 3)
        config = HypernetworkConfig.preset(preset, hidden_size=shape.hidden_size, layer=layer, **changes)
    if config.head == "attention":
        config = replace(config, addition_rank=config.addition_rank or ADDITION_RANK)
        if click.get_current_context().get_parameter_source("learning_rate") is ParameterSource.DEFAULT:
            arguments = replace(arguments, learning_rate=ATTENTION_RATE)
    size = footprint(config)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, **from_gguf)
    unit = f"{config.window} tokens of a passage" if config.head == "attention" else "an expert"
    if accelerator.is_main_process:
        click.echo(f"hypernetwork: {size.parameters:,} parameters; {unit}: {size.expert_bytes:,} bytes", err=True)
    state_bytes = int(state_gb * 10**9)
    trial = HypernetworkTrial(
        config=config,
        arguments=arguments,
        examples=examples,
        model=empty,
        tokenizer=tokenizer,
        llm_bytes=weight_bytes(model, empty),
        device=accelerator.device,
        state_bytes=state_bytes,
        shards=shards(accelerator),
    )
    if not show_memory(trial, accelerator, device, estimate):
        return

    llm, tokenizer = load_language_model(
        model, device=device or str(accelerator.device), dtype=dtype, trust_remote_code=trust_remote_code, **from_gguf
    )
    initial = None if init is None else load_hypernetwork(init, llm, tokenizer)
    files = [DataFile.read("training", source, len(examples))]
    held_out = None
    if validation:
        questions = list(read_questions(validation))
        held_out = Validation(
            questions,
            llm,
            tokenizer,
            layers=config.layers,
            num_passages=arguments.num_passages,
            batch_size=arguments.batch_size,
        )
        files.append(DataFile.read("validation", validation, len(questions)))
    progress = train_hypernetwork(
        config,
        arguments,
        examples,
        llm,
        tokenizer,
        out,
        identity={
            **{"model": model, **from_gguf, "dtype": dtype, "titles": titles, **digests(files)},
            **({} if init is None else {"init": checkpoint_fingerprint(init)}),
        },
        validation=held_out,
        initial=initial,
        state_bytes=state_bytes,
        state_files=None if state_store is None else state_files(state_store, config, llm, tokenizer),
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        report(progress, out, finished_before)
        describe(
            "hypernetwork",
            model,
            out,
            {**config.to_dict(), "parameters": size.parameters, f"bytes of {unit}": size.expert_bytes},
            files,
            arguments,
            progress,
            accelerator.num_processes,
            {**from_gguf, "num_passages": arguments.num_passages},
            licence=licence,
            datasets=datasets,
        )


def _check_form(preset: str, init: str | None, changes: Mapping[str, Any]) -> None:
    """Check the options for the form of the experts.

    Raises:
        InputError: some of them cannot be combined.
    """
    if init is not None:
        if other := sorted(changes.keys() - set(ATTENTION_ONLY)):
            option = other[0].replace("_", "-")
            others = ", ".join("--" + name.replace("_", "-") for name in ATTENTION_ONLY)
            raise InputError(f"--{option}: --init {init} decides the form, except {others}")
        return
    if changes.get("head") == "attention":
        raise InputError("--head attention: give --preset recommended, or --init with a checkpoint of such experts")
    if preset not in IN_ATTENTION:
        if "layers" in changes:
            raise InputError(
                f"--layers: --preset {preset} has experts in one layer, give --layer; or give --preset "
                f"{' or '.join(IN_ATTENTION)}, which allow several layers"
            )
        return
    if "layer" in changes:
        raise InputError(f"--layer: give --layers with --preset {preset}, also for a single layer")
    if other := sorted(changes.keys() - {"layers", *ATTENTION_ONLY}):
        option = other[0].replace("_", "-")
        mlp_presets = " or ".join(name for name in PRESETS if name not in IN_ATTENTION)
        raise InputError(f"--{option} is for experts beside an MLP; give --preset {mlp_presets}, not {preset}")
