"""``real-llm pipeline``: the whole pipeline on real text, in every mode, over the number of passages.

One corpus, retrieval by a sentence encoder, by BM25 or by both, a reranker if there is one, and evaluations that are
declared for `genpoe compare --run`: one matrix for the retrieved passages, and two for the passages that multi-hop
questions need.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.real_llm.commands import run_genpoe, whole_name
from benchmarks.real_llm.layers import Shape
from benchmarks.real_llm.pipeline_data import (
    DATA_SETS,
    RETRIEVED,
    RETRIEVERS,
    evaluated_file,
    rerank,
    retrieve,
    write_evaluated,
)
from genpoe_plugin.checkpoints.checkpoint import read_config
from genpoe_plugin.files import atomic_file
from genpoe_plugin.selection.recognition import recognise

COUNTS = (1, 2, 4, 8)
"""Passages per question."""
MAX_IN_PROMPT = 4
"""Larger numbers of passages are not put into prompts: they take most of the time and exceed some LLMs' context."""
TEMPERATURES = {"dense": 0.05, "bm25": 1.0, "reranker": 1.0}
"""Temperature of sharp gates, by the scores that they are made of: cosine similarities differ by little, scores of BM25
and of rerankers by more. Reciprocal ranks say little about a passage, so the hybrid alone has no sharp gates."""
PURPOSES = ("retrieved", "hops", "reversed")


class Counts(click.ParamType):
    """Positive whole numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not whole numbers from 1 with commas between them, such as 1,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class DataSets(click.ParamType):
    """Names of data sets with commas between them."""

    name = "data sets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(str(value).split(","))
        if unknown := [name for name in names if name not in DATA_SETS]:
            self.fail(f"{unknown[0]!r} is not one of {', '.join(DATA_SETS)}", param, ctx)
        return names


@click.command()
@click.option("--llm", required=True, help="Directory or hub name of a decoder LLM.")
@click.option("--hypernetwork", required=True, help="Directory or hub name of experts that were trained for it.")
@click.option("--data", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of data sets.")
@click.option("--retrieval", required=True, type=click.Path(path_type=Path), help="Folder for index and passages.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the runs.")
@click.option("--retriever", default="dense", show_default=True, type=click.Choice(RETRIEVERS))
@click.option("--reranker", help="Directory or hub name of a reranker for the retrieved passages.")
@click.option("--reranker-format", help="Its format, if its checkpoint does not say it; see `genpoe rerank`.")
@click.option(
    "--num-retrieved",
    default=RETRIEVED,
    show_default=True,
    type=click.IntRange(1, RETRIEVED),
    help="Passages per question that are evaluated or reranked.",
)
@click.option("--encoder", help="Directory of a sentence encoder.  [default: all-MiniLM-L6-v2, from its package]")
@click.option(
    "--data-sets", "names", default=tuple(DATA_SETS), type=DataSets(), metavar="NAME,...", help="[default: all]"
)
@click.option("--num-passages", "counts", default=COUNTS, type=Counts(), metavar="K,...", help="[default: 1,2,4,8]")
@click.option("--limit", default=500, show_default=True, type=click.IntRange(2), help="Questions of each data set.")
@click.option(
    "--gate-temperature",
    type=click.FloatRange(0, min_open=True),
    help="Temperature of sharp gates.  [default: by retriever or reranker; hybrid alone: no sharp gates]",
)
@click.option("--dtype", default="float32", show_default=True, help="Data type of the LLM.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Questions per batch.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Simultaneous runs.")
@click.option("--max-tokens", default=16, show_default=True, type=click.IntRange(1), help="Tokens of an answer.")
def pipeline(
    llm: str,
    hypernetwork: str,
    data: Path,
    retrieval: Path,
    out: Path,
    retriever: str,
    reranker: str | None,
    reranker_format: str | None,
    num_retrieved: int,
    encoder: str | None,
    names: tuple[str, ...],
    counts: tuple[int, ...],
    limit: int,
    gate_temperature: float | None,
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
    if reranker:
        recognise(reranker, reranker_format)
    retrieve(data, retrieval, retriever, names, encoder, device)
    write_evaluated(data, retrieval, out, retriever, names, limit, num_retrieved)
    reranked = rerank(out, names, reranker, reranker_format, device) if reranker else {}
    for purpose in PURPOSES:
        found = {name: evaluated_file(out, name, purpose) for name in names}
        if purpose == "retrieved":
            found |= reranked
        files = {DATA_SETS[name].task: str(file.resolve()) for name, file in found.items() if file.is_file()}
        if not files:
            continue
        options = {
            "device": device,
            "batch_size": batch_size,
            "gen_kwargs": {"max_gen_toks": max_tokens},
            "metadata": {"genpoe_data": files},
        }
        models = {"pretrained": whole_name(llm), "hypernetwork": whole_name(hypernetwork), "dtype": dtype}
        temperature = gate_temperature or TEMPERATURES.get("reranker" if reranker else retriever)
        sharp = {"gates": "softmax" if reranker else "retriever", "gate_temperature": temperature}
        declared = matrix(purpose, models, counts, sharp if temperature else None, out.resolve(), options)
        path = out / f"{purpose}.yaml"
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")
        run_genpoe("compare", "--run", path, "--jobs", str(jobs))


def matrix(
    purpose: str,
    model_args: dict[str, Any],
    counts: Sequence[int],
    sharp: dict[str, Any] | None,
    out: Path,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The declaration of `genpoe compare --run` for the files of a purpose.

    Args:
        purpose: one of `PURPOSES`.
        model_args: model arguments of all runs.
        counts: numbers of passages per question.
        sharp: arguments of sharp gates; None to leave them out.
        out: folder of the study.
        options: options of lm_eval.
    """
    tasks = list(options["metadata"]["genpoe_data"])
    # The expert of every passage is generated once for all runs.
    shared = {**model_args, "expert_store": str(out / "experts")}
    equal = {"gates": "uniform"}
    models: dict[str, Any]
    if purpose == "retrieved":
        several = [count for count in counts if count > 1]
        models = {
            "closed": {"modes": ["closed_book"]},
            "rag": {"modes": ["rag"], "num_passages": [count for count in counts if count <= MAX_IN_PROMPT]},
            "equal": {"modes": ["genpoe"], "num_passages": list(counts), **equal},
            "sharp": {"modes": ["genpoe"], "num_passages": several if sharp else [], **(sharp or {})},
            "both": {"modes": ["genpoe_rag"], "num_passages": [1]},
            "control": {"modes": ["genpoe", "genpoe_rag"], "num_passages": [1], "passages": ["shuffled"]},
        }
        models = {name: one for name, one in models.items() if one.get("num_passages") != []}
    else:
        models = {"hops": {"modes": ["rag", "genpoe"], "num_passages": [1, 2], **equal}}
    return {"out": str(out / purpose), "tasks": tasks, "options": options, "model_args": shared, "models": models}
