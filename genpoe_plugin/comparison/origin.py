"""Where a result comes from, and the command that makes it again."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from genpoe_plugin.arguments import LOADED
from genpoe_plugin.comparison.runs import Run

_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_DEFAULT_SEEDS = [0, 1234, 1234, 1234]


@dataclass(frozen=True)
class Origin:
    """Where a run comes from.

    Attributes:
        command: that made it. ``recorded``: it is word for word the one that did, which the genpoe model notes; of
            other runs it is put together from lm_eval's own record.
        directory: where it ran; None where that is not known.
        fingerprints: of what was loaded and asked, by what it is of.
        versions: of the libraries.
    """

    command: str
    recorded: bool
    directory: str | None
    fingerprints: dict[str, str]
    versions: dict[str, str]
    device: str | None
    date: str
    results: str


def origin_of(run: Run) -> Origin:
    """Where a run comes from."""
    genpoe = run.genpoe or {}
    noted = genpoe.get("provenance", {})
    fingerprint = genpoe.get("fingerprint", {})
    fingerprints = {name: fingerprint.get(name) for name in LOADED}
    fingerprints |= {
        "model": run.config.get("model_sha"),
        "data": genpoe.get("documents", {}).get(run.task) or run.documents[:16],
        "prompts": run.prompts[:16],
    }
    versions = noted.get("versions") or {
        "lm-eval": run.report.get("lm_eval_version"),
        "transformers": run.report.get("transformers_version"),
        "lm-eval-genpoe": fingerprint.get("version"),
    }
    return Origin(
        command=noted.get("command") or _rebuilt(run),
        recorded="command" in noted,
        directory=noted.get("directory"),
        fingerprints={name: str(value) for name, value in fingerprints.items() if value},
        versions={name: str(value) for name, value in versions.items() if value},
        device=noted.get("device") or run.config.get("device"),
        date=run.date,
        results=str(run.results),
    )


def _rebuilt(run: Run) -> str:
    config, report = run.config, run.report
    arguments = run.arguments
    words = ["lm_eval", "--model", str(config.get("model")), "--model_args", _pairs(arguments)]
    words += ["--tasks", ",".join(report["configs"])]
    if shots := report["n-shot"].get(run.task):
        words += ["--num_fewshot", str(shots)]
    for name in ("batch_size", "device", "limit"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    if config.get("gen_kwargs"):
        given = config["gen_kwargs"]
        words += ["--gen_kwargs", given if isinstance(given, str) else _pairs(given)]
    if report.get("chat_template"):
        words += ["--apply_chat_template"]
    if report.get("system_instruction"):
        words += ["--system_instruction", report["system_instruction"]]
    if report.get("fewshot_as_multiturn"):
        words += ["--fewshot_as_multiturn", "true"]
    seeds = [config.get(name) for name in _SEEDS]
    if None not in seeds and seeds != _DEFAULT_SEEDS:
        words += ["--seed", ",".join(map(str, seeds))]
    # lm_eval keeps what --metadata said among the model's arguments and what the task's own YAML says.
    metadata = {
        name: value
        for name, value in (run.task_config.get("metadata") or {}).items()
        if name.startswith("genpoe_") and name not in arguments
    }
    if metadata:
        words += ["--metadata", json.dumps(metadata)]
    return shlex.join([*words, "--log_samples", "--output_path", str(run.results.parents[1])])


def _pairs(arguments: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in arguments.items())
