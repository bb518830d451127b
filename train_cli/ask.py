"""``genpoe ask``."""

from __future__ import annotations

import click


@click.command()
@click.argument("question")
@click.option("--model", required=True, help="The frozen LLM: directory, or user/name of the hub.")
@click.option("--hypernetwork", required=True, help="For it: directory, or user/name@revision of the hub.")
@click.option("--passage", "passages", multiple=True, required=True, help='As "Title: text"; may be repeated.')
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True, help="Of the LLM.")
@click.option("--dtype", default="auto", show_default=True, help="Of the LLM.")
@click.option("--gguf-file", help="Read the LLM from this GGUF file in its directory or repository.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def ask(
    question: str,
    model: str,
    hypernetwork: str,
    passages: tuple[str, ...],
    max_new_tokens: int,
    device: str,
    dtype: str,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer QUESTION in every mode, side by side."""
    from genpoe_plugin.answers import first_line
    from genpoe_plugin.model import GenPoEModel
    from genpoe_plugin.prompts import MODES

    genpoe = GenPoEModel.from_pretrained(
        model, hypernetwork, device=device, dtype=dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code
    )
    for mode in MODES:
        (answer,) = genpoe.generate([question], [passages], mode=mode, max_new_tokens=max_new_tokens)
        click.echo(f"{mode:12} {first_line(answer)}")
    if genpoe.has_router:
        (masses,) = genpoe.router_mass([question], [passages])
        for passage, mass in zip(passages, masses, strict=True):
            click.echo(f"{mass:8.1%} of the attention, as experts: {passage[:60]}")
