"""``genpoe train reranker``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from genpoe_plugin.training.training_arguments import RerankerTraining
from train_cli.training_options import card_options, describe, digests, report, shards, show_memory, training_options


@click.command()
@click.option("--model", required=True, help="Decoder LLM or reranker to start from: directory or hub name.")
@click.option("--data", required=True, help="Training data, as `genpoe data reranker` writes it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the trained reranker.")
@click.option("--validation", help="Held-out data; it decides which weights are written.")
@click.option("--estimate", is_flag=True, help="Print a memory estimate and exit.")
@click.option(
    "--reranker-format",
    help="How the LLM reads a pair: bge, qwen3, likelihood or a template file.  "
    "[default: that of a known reranker, else bge]",
)
@click.option("--max-length", default=512, show_default=True, help="Maximum tokens of query and passage together.")
@training_options(RerankerTraining)
@card_options
@click.option("--device", help="Device, such as cuda:1.  [default: a GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Data type of the frozen weights.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def reranker(
    model: str,
    data: str,
    out: Path,
    validation: str | None,
    estimate: bool,
    reranker_format: str | None,
    max_length: int,
    licence: str | None,
    datasets: tuple[str, ...],
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Train a reranker: a decoder LLM that scores whether a passage answers a question."""
    from genpoe_plugin.checkpoints.card import DataFile
    from genpoe_plugin.llm.empty_model import empty_model, weight_bytes
    from genpoe_plugin.llm.language_model import load_tokenizer
    from genpoe_plugin.selection.recognition import format_to_train
    from genpoe_plugin.selection.reranker_format import BGE
    from genpoe_plugin.selection.reranking import Reranker
    from genpoe_plugin.training.devices import accelerator_on
    from genpoe_plugin.training.reranker import train_reranker
    from genpoe_plugin.training.reranker_data import read_examples
    from genpoe_plugin.training.trainer import is_finished
    from genpoe_plugin.training.trials import RerankerTrial

    arguments = RerankerTraining(**options)
    form = format_to_train(model, reranker_format)
    examples = read_examples(data)
    prompt = examples[0].prompt if form == BGE else form.prompt  # the data has BGE's prompts
    files = [DataFile.read("training", data, len(examples))]
    held_out = read_examples(validation) if validation else []
    if validation:
        files.append(DataFile.read("validation", validation, len(held_out)))
    accelerator = accelerator_on(device)
    finished_before = is_finished(out)

    empty = empty_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    trial = RerankerTrial(
        arguments=arguments,
        examples=examples,
        model=empty,
        tokenizer=load_tokenizer(model, trust_remote_code=trust_remote_code),
        format=form,
        prompt=prompt,
        max_length=max_length,
        llm_bytes=weight_bytes(model, empty),
        device=accelerator.device,
        shards=shards(accelerator),
    )
    if not show_memory(trial, accelerator, device, estimate):
        return

    initial = Reranker.load(
        model,
        device=device or str(accelerator.device),
        dtype=dtype,
        format=reranker_format or (None if form != BGE else "bge"),
        prompt=prompt,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    identity: dict[str, Any] = {"model": model, "dtype": dtype, "max_length": max_length, **digests(files)}
    if form != BGE:  # so that trainings from before there were formats go on
        identity["format"] = form.saved
    progress = train_reranker(
        initial, arguments, examples, out, identity=identity, held_out=held_out, accelerator=accelerator
    )
    if accelerator.is_main_process:
        report(progress, out, finished_before)
        settings = {"format": form.saved, "prompt": prompt, "max_length": max_length}
        describe(
            "reranker",
            model,
            out,
            settings,
            files,
            arguments,
            progress,
            accelerator.num_processes,
            licence=licence,
            datasets=datasets,
        )
