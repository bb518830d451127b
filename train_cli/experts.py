"""``genpoe experts``: create checkpoints of experts that need no training."""

from __future__ import annotations

import math
from pathlib import Path

import click

from genpoe_plugin.errors import InputError
from train_cli.index import Size
from train_cli.layers import Layers
from train_cli.training_options import card_options, command_words


@click.group()
def experts() -> None:
    """Create a checkpoint of experts that need no training."""


@experts.command()
@click.option("--llm", required=True, help="The frozen LLM: directory or hub name.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the checkpoint.")
@click.option("--layers", type=Layers(), help="Layers with experts, such as 5,11,12.  [default: all]")
@click.option(
    "--calibrate",
    multiple=True,
    help="Choose layers with these questions and passages: DPR results, or ours; .gz. Repeatable, with equal shares.",
)
@click.option("--max-layers", type=click.IntRange(1), help="Maximum number of layers.")
@click.option("--max-bytes", type=Size(), help="Maximum size of the expert of an average passage, such as 200KB.")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    help="The smallest experts that keep this share of the gain of experts in all layers.",
)
@click.option("--heads", is_flag=True, help="Choose key-value heads, not whole layers.")
@click.option(
    "--num-questions", default=100, show_default=True, type=click.IntRange(1), help="Questions to calibrate with."
)
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions per batch.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Random seed for the choice of questions."
)
@card_options
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="Data type of the frozen LLM.")
@click.option("--gguf-file", help="Read the LLM from this GGUF file in its directory or repository.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def create(
    llm: str,
    out: Path,
    layers: tuple[int, ...] | None,
    calibrate: tuple[str, ...],
    max_layers: int | None,
    max_bytes: int | None,
    keep: float | None,
    heads: bool,
    num_questions: int,
    batch_size: int,
    seed: int,
    licence: str | None,
    datasets: tuple[str, ...],
    device: str,
    dtype: str,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> None:
    """Write an untrained checkpoint of experts in the attention: in all layers, in --layers, or calibrated.

    Rerun the same command to resume an interrupted calibration.
    """
    limited = max_layers is not None or max_bytes is not None or keep is not None
    if calibrate and layers:
        raise InputError("--calibrate chooses the layers; leave out --layers or --calibrate")
    if not calibrate and (limited or heads):
        raise InputError("--max-layers, --max-bytes, --keep and --heads need --calibrate QUESTIONS")
    if calibrate and not limited:
        raise InputError("--calibrate needs --max-layers, --max-bytes or --keep")

    from genpoe_plugin.checkpoints.card import DataFile, ModelCard
    from genpoe_plugin.checkpoints.checkpoint import is_checkpoint
    from genpoe_plugin.experts.footprint import footprint
    from genpoe_plugin.files import check_replaceable
    from genpoe_plugin.llm.language_model import load_language_model
    from genpoe_plugin.training.creation import attention_config, create_attention_experts

    check_replaceable(out, is_checkpoint, "a checkpoint")
    model, tokenizer = load_language_model(
        llm, device=device, dtype=dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code
    )
    config = attention_config(model, layers)
    calibration = None
    measurements = out.resolve().with_name(f"{out.resolve().name}.calibration.jsonl")
    if calibrate:
        from genpoe_plugin.training.calibration import Limits, calibrate_on

        calibration = calibrate_on(
            calibrate,
            model,
            tokenizer,
            config,
            Limits(max_layers, max_bytes, keep),
            measurements,
            heads=heads,
            num_questions=num_questions,
            batch_size=batch_size,
            seed=seed,
        )
        config = calibration.chosen.config
        chosen, every = calibration.chosen, calibration.points[0]
        click.echo(f"nats per answer token, {calibration.questions} questions:")
        click.echo(f"  {calibration.closed_book:.3f} closed-book")
        click.echo(f"  {calibration.prompt:.3f} with the passage in the prompt")
        click.echo(f"  {every.nats:.3f} with experts in all {len(every.config.layers)} layers")
        share = "" if math.isnan(chosen.gain_share) else f", which keep {chosen.gain_share:.0%} of that gain"
        click.echo(f"  {chosen.nats:.3f} with the chosen experts{share}")
    size = footprint(config, model.dtype).expert_bytes
    create_attention_experts(
        out,
        config,
        model,
        tokenizer,
        calibration,
        ModelCard(
            kind="experts",
            base_model=llm,
            out=str(out.resolve()),
            form={"layers": config.layers, "kv_heads": config.kv_heads, "bytes of a token": size},
            data=[] if calibration is None else [DataFile.read("calibration", *pair) for pair in calibration.files],
            arguments={},
            lm_eval_arguments={
                **({"gguf_file": gguf_file} if gguf_file else {}),
                **({"trust_remote_code": True} if trust_remote_code else {}),
            },
            command=command_words(),
            steps=0,
            validations=[] if calibration is None else [{"step": 0, "nats": calibration.chosen.nats}],
            licence=licence,
            datasets=datasets,
        ),
    )
    if calibrate:
        measurements.unlink()
    click.echo(
        f"{out}: experts in {len(config.layers)} layers ({','.join(map(str, config.layers))}), "
        f"{size:,} bytes per passage token"
    )
