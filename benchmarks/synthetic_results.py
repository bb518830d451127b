"""Synthetic result folders in lm_eval's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from genpoe_plugin.data.questions import passages_from_ctxs
from genpoe_plugin.prompts import PROMPT_MODES, knowledge_block

DATE = "2026-01-01T00-00-{:02d}.000000"


def documents(count: int, passages: int = 0, task: str = "t") -> list[dict[str, Any]]:
    """Docs of a task. The passage with the answer has rank 1, 2, 3, 4 in turn; every fifth doc has none."""
    docs: list[dict[str, Any]] = []
    for number in range(count):
        doc: dict[str, Any] = {"question": f"{task}: what is number {number}", "answers": [f"answer {number}"]}
        if passages:
            gold = number % 5 if number % 5 < 4 else passages
            doc["ctxs"] = [
                {
                    "id": f"{number}.{rank}",
                    "title": f"Title {number}",
                    "text": f"Passage {rank} about number {number}.",
                    "score": 1 / (1 + rank),
                    "rank": rank + 1,
                    "has_answer": rank == gold,
                }
                for rank in range(passages)
            ]
        docs.append(doc)
    return docs


def genpoe_facts(
    mode: str = "genpoe", passages: str = "retrieved", num_passages: int = 4, seed: int = 0, **facts: Any
) -> dict[str, Any]:
    """The section ``genpoe`` that the genpoe model adds to the results of a run."""
    decided = {
        "mode": mode,
        "passages": passages,
        "num_passages": num_passages,
        "seed": seed,
        "num_retrieved": 20,
        "gates": "softmax",
        "question_field": "question",
        "hypernetwork": "hypernetwork-fingerprint" if mode.startswith("genpoe") else None,
        "index": None,
        "reranker": None,
    }
    return {
        "arguments": decided | {"hypernetwork": "experts" if mode.startswith("genpoe") else None, "trace": None},
        "fingerprint": decided | {"dtype": "torch.float32"},
        "questions": 100,
        "seconds": {"experts": 0.25, "generate": 0.75},
        "peak_memory": {"bytes": 1 << 30, "of": "process"},
        "provenance": {
            "command": f"lm_eval run --model genpoe --model_args mode={mode},passages={passages},seed={seed}",
            "directory": "/somewhere",
            "versions": {"python": "3.11", "lm-eval": "0.4.13", "torch": "2.13.0"},
            "device": "a machine",
        },
        **facts,
    }


def write_run(
    folder: Path,
    scores: Mapping[str, Sequence[float]],
    *,
    docs: Sequence[Mapping[str, Any]],
    task: str = "t",
    model: str = "hf",
    model_args: Mapping[str, Any] | None = None,
    genpoe: Mapping[str, Any] | None = None,
    version: Any = 1.0,
    generation: Mapping[str, Any] | None = None,
    metric_list: Sequence[Mapping[str, Any]] | None = None,
    shots: int = 0,
    prompt: str = "Question: {}?\nAnswer:",
    second: int = 0,
    trace: bool = False,
    **report: Any,
) -> Path:
    """Write the results and samples of a run below ``folder``; returns the path of the results.

    Args:
        scores: one value per doc for each metric.
        genpoe: for a run of the genpoe model, the result of `genpoe_facts`.
        trace: whether to write a trace, with the first ``num_passages`` of each doc.
        report: further fields of lm_eval's report.
    """
    place = folder / "model"
    place.mkdir(parents=True, exist_ok=True)
    date = DATE.format(second)
    hashes, lines = [], []
    for number, doc in enumerate(docs):
        text, target = prompt.format(doc["question"]), str(doc["answers"])
        found = [sha256(part.encode()).hexdigest() for part in (json.dumps(doc), text, target)]
        hashes += found
        lines.append(
            {
                "doc_id": number,
                "doc": doc,
                "target": target,
                "arguments": {"gen_args_0": {"arg_0": text, "arg_1": {}}},
                "resps": [[f" response {number}"]],
                "filtered_resps": [f" response {number}"],
                "filter": "none",
                "metrics": list(scores),
                **dict(zip(("doc_hash", "prompt_hash", "target_hash"), found, strict=True)),
                **{metric: values[number] for metric, values in scores.items()},
            }
        )
    (place / f"samples_{task}_{date}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if genpoe and trace:
        path = folder / "trace.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in _trace(docs, task, genpoe, prompt)))
        genpoe = {**genpoe, "arguments": {**genpoe["arguments"], "trace": str(path)}}
    stated = metric_list or [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in scores]
    kind = "genpoe" if genpoe else model
    record = {
        "results": {task: {f"{name},none": sum(values) / len(values) for name, values in scores.items()}},
        "configs": {task: {"task": task, "metric_list": stated, "generation_kwargs": generation or {"until": ["\n"]}}},
        "versions": {task: version},
        "n-shot": {task: shots},
        "higher_is_better": {task: {entry["metric"]: entry["higher_is_better"] for entry in stated}},
        "n-samples": {task: {"original": len(docs), "effective": len(docs)}},
        "config": {
            "model": kind,
            "model_args": {"pretrained": "llm", **(model_args or {})},
            **({"genpoe": dict(genpoe)} if genpoe else {}),
            "batch_size": 8,
            "device": "cpu",
        },
        "task_hashes": {task: sha256("".join(hashes).encode()).hexdigest()},
        "total_evaluation_time_seconds": "12.5",
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.19.0",
        **report,
    }
    path = place / f"results_{date}.json"
    path.write_text(json.dumps(record, indent=2))
    return path


def _trace(
    docs: Sequence[Mapping[str, Any]], task: str, genpoe: Mapping[str, Any], prompt: str
) -> Iterator[dict[str, Any]]:
    facts = genpoe["fingerprint"]
    for number, doc in enumerate(docs):
        question_prompt = prompt.format(doc["question"])
        texts = [ctx["text"] for ctx in doc["ctxs"][: facts["num_passages"]]]
        retrieved = [
            {
                "id": entry.passage.id,
                **{name: getattr(entry, name) for name in ("rank", "score", "has_answer")},
            }
            for entry in passages_from_ctxs(doc["ctxs"], "")
        ]
        kept = zip(retrieved[: facts["num_passages"]], texts, strict=True)
        used = [dict(ctx, title=f"Title {number}", words=len(text.split()), gate=0.25) for ctx, text in kept]
        yield {
            "task": task,
            "doc_id": number,
            "question": doc["question"],
            "mode": facts["mode"],
            "control": facts["passages"],
            "hypernetwork": facts["hypernetwork"],
            "prompt_hash": sha256(question_prompt.encode()).hexdigest(),
            "prompt": knowledge_block(texts) + question_prompt if facts["mode"] in PROMPT_MODES else question_prompt,
            "retrieved": retrieved,
            "passages": used,
        }
