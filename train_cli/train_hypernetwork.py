"""``genpoe train hypernetwork``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from genpoe_plugin.errors import InputError
from genpoe_plugin.training.arguments import HypernetworkTraining
from train_cli.training_options import FORM_HELP, describe, digests, form_options, report, show_memory, training_options

ADDITION_RANK = 64


@click.command()
@click.option("--model", required=True, help="The frozen LLM: directory or hub name.")
@click.option("--data", help="Questions with passages: DPR results, or what `genpoe retrieve` writes.")
@click.option(
    "--pretrain", help="Passages to learn from without questions: their experts go on with them. Then --init, --data."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the checkpoint.")
@click.option("--validation", help="Held-out questions with passages; the weights that answer them best are kept.")
@click.option(
    "--titles/--no-titles", default=None, help="Passages with their titles.  [default: yes; no for the paper's preset]"
)
@click.option("--estimate", is_flag=True, help="Say how much memory it takes, and stop.")
@form_options
@training_options(HypernetworkTraining)
@click.option("--device", help="Such as cuda:1.  [default: a GPU if there is one]")
@click.option("--dtype", default="auto", show_default=True, help="Of the frozen LLM.")
@click.option("--gguf-file", help="Read the frozen LLM from this GGUF file in its directory or repository.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def hypernetwork(
    model: str,
    data: str | None,
    pretrain: str | None,
    out: Path,
    validation: str | None,
    titles: bool | None,
    estimate: bool,
    preset: str,
    init: str | None,
    device: str | None,
    dtype: str,
    gguf_file: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Train a hypernetwork: passages in, experts for a frozen LLM out."""
    from genpoe_plugin.checkpoint import read_form
    from genpoe_plugin.experts.config import HypernetworkConfig
    from genpoe_plugin.experts.creation import attention_config
    from genpoe_plugin.experts.footprint import footprint
    from genpoe_plugin.language_model import load_language_model, load_tokenizer
    from genpoe_plugin.passages import read_passages
    from genpoe_plugin.questions import read_questions
    from genpoe_plugin.training.card import DataFile
    from genpoe_plugin.training.devices import accelerator_on
    from genpoe_plugin.training.examples import CONTINUED, GIVEN, passage_examples, training_examples
    from genpoe_plugin.training.hypernetwork import Examples, train_hypernetwork
    from genpoe_plugin.training.model_size import empty_model, read_size
    from genpoe_plugin.training.plans import plan_hypernetwork
    from genpoe_plugin.training.trainer import is_finished
    from genpoe_plugin.training.validation import Validation

    form = {name: options.pop(name) for name in ("layer", "layers", *FORM_HELP)}
    if preset != "attention" and init is None and form["layers"] is not None:
        raise InputError("--layers: several layers have experts with --preset attention alone; --layer names one")
    if init is not None and any(value is not None for value in form.values()):
        named = next(name for name, value in form.items() if value is not None).replace("_", "-")
        if named not in ("addition-rank", "window"):
            raise InputError(f"--{named}: the form is that of --init {init}, but for --addition-rank and --window")
    if (data is None) == (pretrain is None):
        raise InputError("give either --data QUESTIONS or --pretrain PASSAGES")
    arguments = HypernetworkTraining(**options)
    titles = preset != "paper" if titles is None else titles
    source = str(data or pretrain)
    examples: Examples
    if pretrain is not None:
        examples = passage_examples(read_passages(pretrain), titles)
        if not examples:
            raise InputError(f"{pretrain}: no passage has the {GIVEN + CONTINUED} words that are needed")
    else:
        examples = training_examples(read_questions(source), titles)
        if not examples:
            raise InputError(f"{data}: no training example: no question has a passage that contains one of its answers")
    accelerator = accelerator_on(device)
    finished_before = is_finished(out)

    from_gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    llm_size = read_size(model, dtype=dtype, trust_remote_code=trust_remote_code, **from_gguf)
    changes = {name: value for name, value in form.items() if value is not None}
    initial = None
    if init is not None:
        config, initial = read_form(init)
        config = replace(config, **changes)
        if config.head != "attention":
            raise InputError(f"--init {init}: its experts are not in the attention")
    elif preset == "attention":
        shape = empty_model(model, trust_remote_code=trust_remote_code, **from_gguf)
        layers = changes.pop("layers", None) or ((changes.pop("layer"),) if "layer" in changes else None)
        config = replace(attention_config(shape, layers), **changes)
    else:
        layer = changes.pop("layer", llm_size.layers // 3)
        config = HypernetworkConfig.preset(preset, hidden_size=llm_size.hidden_size, layer=layer, **changes)
    if config.head == "attention" and config.addition_rank is None:
        config = replace(config, addition_rank=ADDITION_RANK)
    if config.hidden_size != llm_size.hidden_size:
        raise InputError(
            f"--init {init}: made for an LLM of width {config.hidden_size}, {model} has {llm_size.hidden_size}"
        )
    size = footprint(config)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, **from_gguf)
    if accelerator.is_main_process:
        click.echo(f"hypernetwork: {size.parameters:,} parameters; an expert: {size.expert_bytes:,} bytes", err=True)
    plan = plan_hypernetwork(config, arguments, examples, llm_size, tokenizer, accelerator)
    if not show_memory(plan.estimate(), accelerator, device, estimate):
        return

    llm, tokenizer = load_language_model(
        model, device=device or str(accelerator.device), dtype=dtype, trust_remote_code=trust_remote_code, **from_gguf
    )
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
        identity={"model": model, **from_gguf, "dtype": dtype, "titles": titles, **digests(files)},
        validation=held_out,
        initial=initial,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        report(progress, out, finished_before)
        describe(
            "hypernetwork",
            model,
            out,
            {**config.to_dict(), "parameters": size.parameters, "bytes of an expert": size.expert_bytes},
            files,
            arguments,
            progress,
            accelerator.num_processes,
            {**from_gguf, "num_passages": arguments.num_passages},
        )
