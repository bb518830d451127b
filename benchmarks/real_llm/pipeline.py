"""``real-llm pipeline``: the whole pipeline on real text, in every mode, over the number of passages.

One corpus, retrieval by a sentence encoder, and evaluations that are declared for `genpoe compare --run`: one matrix
for the retrieved passages, and two for the passages that multi-hop questions need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.real_llm.commands import run_genpoe, whole_name
from benchmarks.real_llm.layers import Shape
from benchmarks.real_llm.pipeline_data import DATA_SETS, asked_file, retrieve, write_asked
from benchmarks.real_retrieval import encoder_name
from genpoe_plugin.checkpoints.checkpoint import read_config
from genpoe_plugin.files import atomic_file

COUNTS = [1, 2, 4, 8]
"""Passages per question."""
TEMPERATURE = 0.05
"""Of gates from cosine similarities, whose differences are small."""
PURPOSES = ("retrieved", "hops", "reversed")


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, help="Directory or hub name of experts that were trained for it.")
@click.option("--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of data sets.")
@click.option("--retrieval", required=True, type=click.Path(path_type=Path), help="Folder for index and passages.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the runs.")
@click.option("--encoder", help="Directory of a sentence encoder.  [default: all-MiniLM-L6-v2, from its package]")
@click.option("--limit", default=500, show_default=True, type=click.IntRange(2), help="Questions of each data set.")
@click.option("--dtype", default="float32", show_default=True, help="Of the LLM.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions at a time.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Runs at a time.")
@click.option("--max-tokens", default=16, show_default=True, type=click.IntRange(1), help="Of an answer.")
def pipeline(
    llm: str,
    hypernetwork: str,
    data: Path,
    retrieval: Path,
    out: Path,
    encoder: str | None,
    limit: int,
    dtype: str,
    device: str,
    batch_size: int,
    jobs: int,
    max_tokens: int,
) -> None:
    """Evaluate the whole pipeline with a real LLM on NQ, SQuAD, TriviaQA, HotpotQA and 2WikiMultihopQA.

    Rerun the same command to resume.
    """
    # A wrong name is found before the index is built.
    Shape.of(llm)
    read_config(hypernetwork)
    retrieve(data, retrieval, encoder or encoder_name(), device)
    write_asked(data, retrieval, out, limit)
    for purpose in PURPOSES:
        options = {
            "device": device,
            "batch_size": batch_size,
            "gen_kwargs": {"max_gen_toks": max_tokens},
            "metadata": {
                "genpoe_data": {
                    data_set.task: str(file.resolve())
                    for name, data_set in DATA_SETS.items()
                    if (file := asked_file(out, name, purpose)).is_file()
                }
            },
        }
        path = out / f"{purpose}.yaml"
        declared = matrix(purpose, whole_name(llm), whole_name(hypernetwork), dtype, out.resolve(), options)
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")
        run_genpoe("compare", "--run", path, "--jobs", str(jobs))


def matrix(purpose: str, llm: str, hypernetwork: str, dtype: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The declaration of `genpoe compare --run` for the files of a purpose."""
    tasks = list(options["metadata"]["genpoe_data"])
    shared = {"pretrained": llm, "dtype": dtype, "hypernetwork": hypernetwork}
    shared["expert_store"] = str(out / "experts")  # the expert of every passage is generated once for all runs
    equal = {"gates": "uniform"}
    sharp = {"gates": "retriever", "gate_temperature": TEMPERATURE}
    models: dict[str, Any]
    if purpose == "retrieved":
        models = {
            "closed": {"modes": ["closed_book"]},
            # Prompts with eight passages are left out: they take most of the time and exceed some LLMs' context.
            "rag": {"modes": ["rag"], "num_passages": COUNTS[:-1]},
            "equal": {"modes": ["genpoe"], "num_passages": COUNTS, **equal},
            "sharp": {"modes": ["genpoe"], "num_passages": COUNTS[1:], **sharp},
            "both": {"modes": ["genpoe_rag"], "num_passages": [1]},
            "control": {"modes": ["genpoe", "genpoe_rag"], "num_passages": [1], "passages": ["shuffled"]},
        }
    else:
        models = {"hops": {"modes": ["rag", "genpoe"], "num_passages": [1, 2], **equal}}
    return {"out": str(out / purpose), "tasks": tasks, "options": options, "model_args": shared, "models": models}
