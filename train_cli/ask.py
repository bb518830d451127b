"""``genpoe ask``."""

from __future__ import annotations

import click

from genpoe_plugin.errors import harmless


@click.command()
@click.argument("question")
@click.option("--model", required=True, help="Frozen LLM: directory or hub id.")
@click.option(
    "--hypernetwork", required=True, help="Hypernetwork for the LLM: directory or hub id (user/name@revision)."
)
@click.option("--passage", "passages", multiple=True, help='Passage as "Title: text"; may be repeated.')
@click.option("--index", help="Retrieve the passages from this index, or from several as A+B.")
@click.option("--num-passages", default=3, show_default=True, type=click.IntRange(1), help="Passages to retrieve.")
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True, help="Device of the LLM.")
@click.option("--dtype", default="auto", show_default=True, help="Data type of the LLM.")
@click.option("--gguf-file", help="Read the LLM from this GGUF file in its directory or repository.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def ask(
    question: str,
    model: str,
    hypernetwork: str,
    passages: tuple[str, ...],
    index: str | None,
    num_passages: int,
    max_new_tokens: int,
    device: str,
    dtype: str,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer QUESTION in every mode, and show each passage's share of the LLM's attention."""
    if bool(passages) == (index is not None):
        raise click.UsageError("give passages, each with --passage, or an --index to retrieve them from")
    from genpoe_plugin.data.answers import first_line
    from genpoe_plugin.model import GenPoEModel
    from genpoe_plugin.prompts import MODES

    genpoe = GenPoEModel.from_pretrained(
        model, hypernetwork, device=device, dtype=dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code
    )
    if index is not None:
        from genpoe_plugin.retrieval.loading import load_retriever

        (retrieved,) = load_retriever(index).retrieve([question], num_passages)
        passages = tuple(entry.passage.string for entry in retrieved)
    for mode in MODES:
        (answer,) = genpoe.generate([question], [passages], mode=mode, max_new_tokens=max_new_tokens)
        click.echo(f"{mode:12} {harmless(first_line(answer))}")
    if genpoe.has_router:
        (masses,) = genpoe.router_mass([question], [passages])
        for passage, mass in zip(passages, masses, strict=True):
            click.echo(f"{mass:8.1%} of the attention, as experts: {harmless(passage[:60])}")
