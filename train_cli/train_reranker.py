"""``genpoe train reranker``."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.option("--model", required=True, help="Decoder LLM or reranker to start from: directory or hub name.")
@click.option("--data", required=True, help="Training data, as `genpoe data reranker` writes it.")
@click.option("--out", required=True, help="Directory for the trained reranker.")
@click.option("--eval-data", help="Held-out data, ranked before and after.")
@click.option("--negatives", default=15, show_default=True, help="Per group, drawn anew every epoch.")
@click.option("--batch-size", default=16, show_default=True, help="Groups an optimizer step.")
@click.option("--micro-batch-size", default=1, show_default=True, help="Groups in memory at a time.")
@click.option("--epochs", default=1, show_default=True)
@click.option("--max-steps", type=int, help="Optimizer steps, instead of epochs.")
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--warmup-ratio", default=0.1, show_default=True, help="Share of the steps.")
@click.option("--max-gradient-norm", default=1.0, show_default=True)
@click.option("--lora-rank", default=32, show_default=True, help="0 trains every weight.")
@click.option("--lora-alpha", default=64.0, show_default=True)
@click.option("--lora-targets", help="Layer names, comma-separated.  [default: the attention's linear layers]")
@click.option("--max-length", default=512, show_default=True, help="Tokens of query and passage together.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Of the frozen weights: float32 or bfloat16.")
@click.option("--seed", default=0, show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def reranker(lora_targets: str | None, **options: Any) -> None:
    """Train a reranker: a decoder LLM that tells passages with an answer from those without."""
    from genpoe_plugin.training.reranker import RerankerTrainingConfig, train_reranker

    targets = tuple(lora_targets.split(",")) if lora_targets else ()
    config = RerankerTrainingConfig(lora_targets=targets, **options)
    record = train_reranker(config)
    for when in ("before", "after"):
        for measure, value in (record[when] or {}).items():
            click.echo(f"{measure} {when} training: {value:.3f}")
    click.echo(f"{config.out}: trained reranker")
