"""``genpoe train hypernetwork``."""

from __future__ import annotations

import click


@click.command()
@click.option("--model", required=True, help="The frozen LLM: directory or hub name.")
@click.option("--data", required=True, help="Questions with passages: DPR results, or what `genpoe retrieve` writes.")
@click.option("--out", required=True, help="Directory for the checkpoint.")
@click.option("--layer", type=int, help="Decoder layer of the experts, from 0.  [default: a third of the way up]")
@click.option("--rank", default=512, show_default=True, help="Inner width of an expert's low-rank products.")
@click.option("--expert-width", type=int, help="Hidden width of an expert.  [default: the LLM's width]")
@click.option("--encoder", type=click.Choice(["attention", "mean"]), default="attention", show_default=True)
@click.option("--num-queries", default=8, show_default=True, help="Learned queries of the attention encoder.")
@click.option("--code-size", default=128, show_default=True, help="Width of a passage's code.")
@click.option("--normalise/--no-normalise", default=True, show_default=True, help="RMS-normalise the embeddings.")
@click.option("--base", type=click.Choice(["silent", "random"]), default="silent", show_default=True)
@click.option("--generator-gain", default=0.1, show_default=True, help="Factor on what is generated.")
@click.option("--epochs", default=1, show_default=True)
@click.option("--max-steps", type=int, help="Stop after so many optimizer steps.")
@click.option("--batch-size", default=32, show_default=True, help="Examples a step.")
@click.option("--learning-rate", default=1e-4, show_default=True)
@click.option("--warmup-steps", default=100, show_default=True)
@click.option(
    "--knowledge", default=0.0, show_default=True, help="Share of steps whose prompts hold the passage's text."
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="Of the frozen LLM.")
@click.option("--seed", default=0, show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def hypernetwork(
    model: str,
    data: str,
    out: str,
    layer: int | None,
    rank: int,
    expert_width: int | None,
    encoder: str,
    num_queries: int,
    code_size: int,
    normalise: bool,
    base: str,
    generator_gain: float,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    **training: float,
) -> None:
    """Train a hypernetwork: passages in, experts for a frozen LLM out."""
    from genpoe_plugin.experts.config import HypernetworkConfig
    from genpoe_plugin.language_model import load_language_model
    from genpoe_plugin.questions import read_questions
    from genpoe_plugin.training.hypernetwork import HypernetworkTraining, train_hypernetwork, training_examples

    options = HypernetworkTraining(**training)  # type: ignore[arg-type]
    examples = training_examples(read_questions(data))
    llm, tokenizer = load_language_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
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
    train_hypernetwork(config, options, examples, llm, tokenizer, out)
    click.echo(f"{out}: trained hypernetwork ({len(examples):,} examples)")
