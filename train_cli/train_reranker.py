"""``genpoe train reranker``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from genpoe_plugin.training.arguments import RerankerTraining
from train_cli.training_options import report, training_options


@click.command()
@click.option("--model", required=True, help="Decoder LLM or reranker to start from: directory or hub name.")
@click.option("--data", required=True, help="Training data, as `genpoe data reranker` writes it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the trained reranker.")
@click.option("--validation", help="Held-out data; the weights that rank it best are kept.")
@click.option("--max-length", default=512, show_default=True, help="Tokens of query and passage together.")
@training_options(RerankerTraining)
@click.option("--device", help="Such as cuda:1.  [default: a GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the frozen weights beside an adapter.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def reranker(
    model: str,
    data: str,
    out: Path,
    validation: str | None,
    max_length: int,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    **training: Any,
) -> None:
    """Train a reranker: a decoder LLM that tells passages with an answer from those without."""
    from genpoe_plugin.files import file_digest
    from genpoe_plugin.reranking import Reranker
    from genpoe_plugin.training.devices import accelerator_on
    from genpoe_plugin.training.reranker import train_reranker
    from genpoe_plugin.training.reranker_data import read_examples
    from genpoe_plugin.training.trainer import is_finished

    arguments = RerankerTraining(**training)
    examples = read_examples(data)
    held_out = read_examples(validation) if validation else []
    accelerator = accelerator_on(device)
    finished_before = is_finished(out)
    start = Reranker.load(
        model,
        device=device or str(accelerator.device),
        dtype=dtype,
        prompt=examples[0].prompt,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    identity = {
        "model": model,
        "dtype": dtype,
        "max_length": max_length,
        "data": file_digest(data),
        "validation": file_digest(validation) if validation else None,
    }
    progress = train_reranker(
        start, arguments, examples, out, identity=identity, held_out=held_out, accelerator=accelerator
    )
    if accelerator.is_main_process:
        report(progress, out, finished_before)
