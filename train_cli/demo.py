"""``genpoe demo`` and ``genpoe demo world``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from genpoe_plugin.errors import InputError

OUT, WORLD_OUT = "demo-out", "demo-world-out"


@click.group(invoke_without_command=True)
@click.option("--out", default=OUT, show_default=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="lm_eval runs at a time.")
@click.pass_context
def demo(context: click.Context, out: Path, jobs: int) -> None:
    """A real LLM answers real questions in every mode.

    Downloads SmolLM2-135M-Instruct and all-MiniLM-L6-v2 (about 180 MB), and runs lm_eval with the experts and the
    questions that come with this package, in all modes and with controls. Finished steps in OUT are skipped.
    If the models cannot be downloaded, `genpoe demo world` runs instead.
    """
    if context.invoked_subcommand is not None:
        return
    from genpoe_plugin.demo import real_demo

    real_demo.check_folder(out)
    try:
        real_demo.fetch_models(out, lambda line: click.echo(line, err=True))
    except InputError as error:
        click.echo(f"the demo's models are not available, so `genpoe demo world` runs instead ({error})", err=True)
        context.invoke(world)
        return
    from genpoe_plugin.comparison.leaderboard import compare
    from genpoe_plugin.comparison.output_files import write
    from train_cli.compare import show_in_terminal

    comparison = compare([real_demo.run(out, jobs)])
    show_in_terminal(comparison)
    page, *_ = write(comparison, out / "comparison")
    ask = ["genpoe", "ask", "--model", str(out / "llm"), "--hypernetwork", str(real_demo.EXPERTS)]
    ask += ["--index", str(out / "index"), "who was the first man in space"]
    click.echo(f"Ask your own question about the demo's passages:\n{shlex.join(ask)}\n")
    click.echo(f"page: {page}")


@demo.command()
@click.option("--out", default=WORLD_OUT, show_default=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Random seed of the world and of all training."
)
def world(out: Path, seed: int) -> None:
    """Turn passages into experts in an invented world, which no LLM has read about.

    Creates the world, builds its index, trains reranker and hypernetwork on its training part, and evaluates on its
    test part with lm_eval in all modes and controls. Finished steps in OUT are skipped.
    """
    from genpoe_plugin.demo.world_demo import DemoSettings, matrix_file, run_demo
    from genpoe_plugin.demo.world_table import render

    result = run_demo(out, DemoSettings(seed=seed))
    click.echo(f"\n{render(result.rows)}\n")
    click.echo(
        "EM, F1 and recall in %; R@k: a passage with the answer is among the first k. Test entities were not seen"
    )
    click.echo(f"in training. genpoe_rag against rag, paired: p = {result.p_value:.2f} (exact McNemar test).")
    click.echo(f"\nThe command of the genpoe row:\n{result.command}\n")
    click.echo(f"All modes, controls and K on one page:\ngenpoe compare --run {matrix_file(out)} --jobs 2\n")
    click.echo(f"table: {out / 'table.json'}")
