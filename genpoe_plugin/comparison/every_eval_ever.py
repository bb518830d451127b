"""Write a comparison as records of Every Eval Ever, the shared format for evaluation results.

The format is ``eval.schema.json`` of https://github.com/evaleval/every_eval_ever. A record is one row of a board. Its
place is that of a submission: ``task/developer/model/UUID.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from genpoe_plugin import __version__
from genpoe_plugin.comparison import cells
from genpoe_plugin.comparison.leaderboard import Board, Comparison, System
from genpoe_plugin.comparison.origin import origin_of
from genpoe_plugin.comparison.statistics import LEVEL
from genpoe_plugin.files import atomic_file

SCHEMA_VERSION = "0.3.0"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_records(comparison: Comparison, out: Path) -> list[Path]:
    """Write the records into ``out``, and return their paths."""
    paths = []
    for board in comparison.boards:
        for system in board.systems:
            record = _record(board, system)
            developer, _, name = record["model_info"]["id"].rpartition("/")
            # Not random, so that a repeated export replaces its own records.
            content = f"{board.task} {system.name} {board.group.protocol}"
            uuid = UUID(bytes=hashlib.sha256(content.encode()).digest()[:16], version=4)
            path = out.joinpath(*map(_folder, (board.task, developer or "unknown", name)), f"{uuid}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            paths.append(path)
    return paths


def _folder(name: str) -> str:
    """A name in the results as the name of one folder, which is never one above it."""
    return re.sub(r"[/\\\0]|^\.+$", "_", name)[:200]


def _record(board: Board, system: System) -> dict[str, Any]:
    run, origin = system.runs[0], origin_of(system.runs[0])
    model, now = _model(system), str(time.time())
    engine = "vllm" if "vllm" in str(system.settings.get("kind")) else "transformers"
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{board.task}/{model}/{now}",
        "evaluation_timestamp": run.date,
        "retrieved_timestamp": now,
        "source_metadata": {
            "source_name": f"genpoe compare, lm-eval-genpoe {__version__}",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {"name": "lm_eval", "version": origin.versions.get("lm-eval", "unknown")},
        "model_info": {
            "name": system.label,
            "id": model,
            "inference_engine": {"name": engine, "version": origin.versions.get(engine, "unknown")},
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "unknown",
                **{name: str(value) for name, value in system.settings.items()},
            },
        },
        "evaluation_results": [_result(board, system, metric, origin.command) for metric in board.metrics],
    }


def _model(system: System) -> str:
    """The LLM's name on the hub, or the name of its folder."""
    name = str(
        next((system.settings[key] for key in ("pretrained", "model", "path") if key in system.settings), "unknown")
    )
    return name if _HUB_NAME.fullmatch(name) else Path(name).name or "unknown"


def _result(board: Board, system: System, metric: str, command: str) -> dict[str, Any]:
    estimate = system.estimates[metric]
    bounds = {"score_type": "continuous", "min_score": 0, "max_score": 1} if cells.is_share(metric, board) else {}
    return {
        "evaluation_name": board.task,
        "source_data": {
            "dataset_name": board.task,
            "source_type": "other",
            "additional_details": {"questions": board.group.protocol.questions},
        },
        "metric_config": {
            "evaluation_description": f"{metric}, mean over questions",
            "metric_name": metric,
            "lower_is_better": not system.runs[0].higher_is_better(metric),
            **bounds,
        },
        "score_details": {
            "score": estimate.mean,
            "details": {"seeds": str(len(system.runs)), **({"flag": system.flag} if system.flag else {})},
            "uncertainty": {
                "confidence_interval": {"lower": estimate.low, "upper": estimate.high, "confidence_level": LEVEL},
                "num_samples": board.n,
            },
        },
        "generation_config": {
            "generation_args": {"execution_command": command},
            "additional_details": {"decoding": board.group.protocol.decoding, "few_shot": board.group.protocol.shots},
        },
    }
