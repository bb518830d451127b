"""``genpoe demo`` and ``genpoe demo pretrain``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.group(invoke_without_command=True)
@click.option("--out", default="demo-out", show_default=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the world and of all training.")
@click.pass_context
def demo(context: click.Context, out: Path, seed: int) -> None:
    """Passages become experts in a world that nobody has read about.

    Makes the world, builds its index, trains reranker and hypernetwork on its train side, and evaluates the test
    side through lm_eval in all modes and controls. What is in OUT already is not done again.
    """
    if context.invoked_subcommand is not None:
        return
    from genpoe_plugin.demo.run import DemoSettings, lm_eval_command, matrix_file, results_directory, run_demo
    from genpoe_plugin.demo.table import exact_matches, paired_p_value, render

    settings = DemoSettings(seed=seed)
    rows = run_demo(out, settings)
    runs = [results_directory(out, mode, "retrieved") for mode in ("genpoe_rag", "rag")]
    p_value = paired_p_value(*map(exact_matches, runs))
    click.echo(f"\n{render(rows)}\n")
    click.echo(
        "EM, F1 and recall in %; R@k: the passage that answers is among the first k. Test entities were not seen"
    )
    click.echo(f"in training. genpoe_rag against rag, paired: p = {p_value:.2f} (exact McNemar test).")
    click.echo(
        f"\nThe genpoe row again, by hand:\n{shlex.join(lm_eval_command(out, 'genpoe', 'retrieved', settings))}\n"
    )
    click.echo(f"All modes, controls and K, one page:\ngenpoe compare --run {matrix_file(out)} --jobs 2\n")
    click.echo(f"table: {out / 'table.json'}")


@demo.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the LLM and the encoder.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def pretrain(out: Path, seed: int) -> None:
    """Make the demo's LLM and encoder again, which come with the package: about half an hour."""
    from genpoe_plugin.demo.pretrain import pretrain_encoder, pretrain_llm

    pretrain_llm(out / "llm", seed)
    pretrain_encoder(out / "encoder", out / "llm", seed)
    click.echo(f"{out}: pretrained LLM and encoder")
