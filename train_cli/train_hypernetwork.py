"""``genpoe train hypernetwork``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from genpoe_plugin.training.arguments import HypernetworkTraining
from train_cli.training_options import report, training_options


@click.command()
@click.option("--model", required=True, help="The frozen LLM: directory or hub name.")
@click.option("--data", required=True, help="Questions with passages: DPR results, or what `genpoe retrieve` writes.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the checkpoint.")
@click.option("--validation", help="Held-out questions with passages; the weights that answer them best are kept.")
@click.option("--layer", type=int, help="Decoder layer of the experts, from 0.  [default: a third of the way up]")
@click.option("--rank", default=512, show_default=True, help="Inner width of an expert's low-rank products.")
@click.option("--expert-width", type=int, help="Hidden width of an expert.  [default: the LLM's width]")
@click.option("--encoder", type=click.Choice(["attention", "mean"]), default="attention", show_default=True)
@click.option("--num-queries", default=8, show_default=True, help="Learned queries of the attention encoder.")
@click.option("--code-size", default=128, show_default=True, help="Width of a passage's code.")
@click.option("--normalise/--no-normalise", default=True, show_default=True, help="RMS-normalise the embeddings.")
@click.option("--base", type=click.Choice(["silent", "random"]), default="silent", show_default=True)
@click.option("--generator-gain", default=0.1, show_default=True, help="Factor on what is generated.")
@training_options(HypernetworkTraining)
@click.option("--device", help="Such as cuda:1.  [default: a GPU if there is one]")
@click.option("--dtype", default="auto", show_default=True, help="Of the frozen LLM.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def hypernetwork(
    model: str,
    data: str,
    out: Path,
    validation: str | None,
    layer: int | None,
    rank: int,
    expert_width: int | None,
    encoder: str,
    num_queries: int,
    code_size: int,
    normalise: bool,
    base: str,
    generator_gain: float,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    **training: Any,
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

    arguments = HypernetworkTraining(**training)
    examples = training_examples(read_questions(data))
    accelerator = accelerator_on(device)
    finished_before = is_finished(out)
    llm, tokenizer = load_language_model(
        model, device=device or str(accelerator.device), dtype=dtype, trust_remote_code=trust_remote_code
    )
    text_config = llm.config.get_text_config()
    config = HypernetworkConfig.from_dict(
        {
            "hidden_size": text_config.hidden_size,
            "layer": text_config.num_hidden_layers // 3 if layer is None else layer,
            "rank": rank,
            "expert_width": text_config.hidden_size if expert_width is None else expert_width,
            "encoder": encoder,
            "num_queries": num_queries,
            "code_size": code_size,
            "normalise": normalise,
            "head": "dense",
            "base": base,
            "generator_gain": generator_gain,
        }
    )
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
