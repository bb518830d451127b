"""``genpoe train hypernetwork``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from genpoe_plugin.training.arguments import HypernetworkTraining
from train_cli.training_options import FORM_HELP, form_options, report, training_options


@click.command()
@click.option("--model", required=True, help="The frozen LLM: directory or hub name.")
@click.option("--data", required=True, help="Questions with passages: DPR results, or what `genpoe retrieve` writes.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the checkpoint.")
@click.option("--validation", help="Held-out questions with passages; the weights that answer them best are kept.")
@form_options
@training_options(HypernetworkTraining)
@click.option("--device", help="Such as cuda:1.  [default: a GPU if there is one]")
@click.option("--dtype", default="auto", show_default=True, help="Of the frozen LLM.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def hypernetwork(
    model: str,
    data: str,
    out: Path,
    validation: str | None,
    preset: str,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Train a hypernetwork: passages in, experts for a frozen LLM out."""
    from genpoe_plugin.experts.config import HypernetworkConfig
    from genpoe_plugin.files import file_digest
    from genpoe_plugin.language_model import load_language_model
    from genpoe_plugin.questions import read_questions
    from genpoe_plugin.training.devices import accelerator_on
    from genpoe_plugin.training.examples import training_examples
    from genpoe_plugin.training.hypernetwork import train_hypernetwork
    from genpoe_plugin.training.trainer import is_finished
    from genpoe_plugin.training.validation import Validation

    form = {name: options.pop(name) for name in FORM_HELP}
    arguments = HypernetworkTraining(**options)
    examples = training_examples(read_questions(data))
    accelerator = accelerator_on(device)
    finished_before = is_finished(out)
    llm, tokenizer = load_language_model(
        model, device=device or str(accelerator.device), dtype=dtype, trust_remote_code=trust_remote_code
    )
    text_config = llm.config.get_text_config()
    changes = {name: value for name, value in form.items() if value is not None}
    layer = changes.pop("layer", text_config.num_hidden_layers // 3)
    config = HypernetworkConfig.preset(preset, hidden_size=text_config.hidden_size, layer=layer, **changes)
    held_out = None
    if validation:
        held_out = Validation(
            list(read_questions(validation)),
            llm,
            tokenizer,
            layer=config.layer,
            num_passages=arguments.num_passages,
            batch_size=arguments.batch_size,
        )
    identity = {
        "model": model,
        "dtype": dtype,
        "data": file_digest(data),
        "validation": file_digest(validation) if validation else None,
    }
    progress = train_hypernetwork(
        config,
        arguments,
        examples,
        llm,
        tokenizer,
        out,
        identity=identity,
        validation=held_out,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        report(progress, out, finished_before)
