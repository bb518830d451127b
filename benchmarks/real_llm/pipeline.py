"""``real-llm pipeline``: the whole pipeline on real text, in every mode, over the number of passages.

One corpus, retrieval by a sentence encoder, rerank scores where there is a reranker, and evaluations that are one
declaration of `genpoe compare --run`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.real_llm.pipeline_data import DATA_SETS, asked_file, retrieve, write_asked
from benchmarks.real_retrieval import encoder_name
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file

COUNTS = [1, 2, 4, 8]
"""Passages per question."""
TEMPERATURE = 0.05
"""Of gates from cosine similarities, whose differences are small."""
PURPOSES = ("retrieved", "hops", "reversed")


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, type=click.Path(path_type=Path), help="Trained checkpoint of it.")
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
    hypernetwork: Path,
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
    retrieve(data, retrieval, encoder or encoder_name(), device)
    write_asked(data, retrieval, limit)
    out.mkdir(parents=True, exist_ok=True)
    for purpose in PURPOSES:
        options = {
            "device": device,
            "batch_size": batch_size,
            "gen_kwargs": {"max_gen_toks": max_tokens},
            "metadata": {
                "genpoe_data": {
                    data_set.task: str(file.resolve())
                    for name, data_set in DATA_SETS.items()
                    if (file := asked_file(retrieval, name, purpose)).is_file()
                }
            },
        }
        path = out / f"{purpose}.yaml"
        declared = matrix(purpose, llm, hypernetwork, dtype, out.resolve(), options)
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")
        words = ["compare", "--run", str(path), "--jobs", str(jobs)]
        done = subprocess.run([sys.executable, "-m", "train_cli", *words], stdin=subprocess.DEVNULL)
        if done.returncode:
            raise InputError(f"genpoe {' '.join(words)}: stopped with status {done.returncode}")


def matrix(
    purpose: str, llm: str, hypernetwork: Path, dtype: str, out: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """The declaration of `genpoe compare --run` for the files of a purpose."""
    tasks = list(options["metadata"]["genpoe_data"])
    shared = {"pretrained": llm, "dtype": dtype, "hypernetwork": str(hypernetwork.resolve())}
    shared["expert_store"] = str(out / "experts")  # every passage is read once for all runs
    equal = {"gates": "uniform"}
    sharp = {"gates": "retriever", "gate_temperature": TEMPERATURE}
    models: dict[str, Any]
    if purpose == "retrieved":
        models = {
            "closed": {"modes": ["closed_book"]},
            "rag": {"modes": ["rag"], "num_passages": COUNTS[:-1]},
            "equal": {"modes": ["genpoe"], "num_passages": COUNTS, **equal},
            "sharp": {"modes": ["genpoe"], "num_passages": COUNTS[1:], **sharp},
            "both": {"modes": ["genpoe_rag"], "num_passages": [1]},
            "control": {"modes": ["genpoe", "genpoe_rag"], "num_passages": [1], "passages": ["shuffled"]},
        }
    else:
        models = {"hops": {"modes": ["rag", "genpoe"], "num_passages": [1, 2], **equal}}
    return {"out": str(out / purpose), "tasks": tasks, "options": options, "model_args": shared, "models": models}
