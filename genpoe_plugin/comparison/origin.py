"""The origin of a result: the command that reproduces it, versions and fingerprints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from genpoe_plugin.arguments import LOADED
from genpoe_plugin.comparison.runs import Run

_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_DEFAULT_SEEDS = [0, 1234, 1234, 1234]


@dataclass(frozen=True)
class Origin:
    """The origin of a run.

    Attributes:
        command: the command of the run.
        recorded: whether the model recorded the exact command (genpoe models do); otherwise it is reconstructed from
            lm_eval's record.
        directory: working directory of the run; None if unknown.
        fingerprints: fingerprints of checkpoint, index, reranker, model, data and prompts, by name.
        versions: versions of the libraries.
        device: device of the run, if known.
        date: date of the run.
        results: path of lm_eval's results.
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
    """The origin of a run."""
    genpoe = run.genpoe or {}
    provenance = genpoe.get("provenance", {})
    fingerprint = genpoe.get("fingerprint", {})
    fingerprints = {name: fingerprint.get(name) for name in LOADED}
    fingerprints |= {
        "model": run.config.get("model_sha"),
        "data": genpoe.get("documents", {}).get(run.task) or run.documents[:16],
        "prompts": run.prompts[:16],
    }
    versions = provenance.get("versions") or {
        "lm-eval": run.report.get("lm_eval_version"),
        "transformers": run.report.get("transformers_version"),
        "lm-eval-genpoe": fingerprint.get("version"),
    }
    command = _recorded(provenance.get("command"))
    return Origin(
        command=command or _reconstructed(run),
        recorded=command is not None,
        directory=str(provenance["directory"]) if provenance.get("directory") else None,
        fingerprints={name: str(value) for name, value in fingerprints.items() if value},
        versions={name: str(value) for name, value in versions.items() if value},
        device=provenance.get("device") or run.config.get("device"),
        date=run.date,
        results=str(run.results),
    )


def _recorded(command: Any) -> str | None:
    """A recorded command, quoted anew, so that a shell reads all of it as words; None if it is none of ours.

    Users copy the command from the page or the terminal, and the results may be from others.
    """
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # an unclosed quote
        return None
    return _line(words) if words[:1] in (["lm_eval"], ["python"]) else None


def _line(words: Sequence[str]) -> str:
    """A shell command, without the control characters of a terminal."""
    return shlex.join("".join(c for c in word if c in "\n\t" or category(c) != "Cc") for word in words)


def _reconstructed(run: Run) -> str:
    """The command of a run, reconstructed from lm_eval's record."""
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
        gen_kwargs = config["gen_kwargs"]
        words += ["--gen_kwargs", gen_kwargs if isinstance(gen_kwargs, str) else _pairs(gen_kwargs)]
    if report.get("chat_template"):
        words += ["--apply_chat_template"]
    if report.get("system_instruction"):
        words += ["--system_instruction", str(report["system_instruction"])]
    if report.get("fewshot_as_multiturn"):
        words += ["--fewshot_as_multiturn", "true"]
    seeds = [config.get(name) for name in _SEEDS]
    if None not in seeds and seeds != _DEFAULT_SEEDS:
        words += ["--seed", ",".join(map(str, seeds))]
    # lm_eval merges --metadata into the model's arguments and into the metadata of the task's YAML.
    metadata = {
        name: value
        for name, value in (run.task_config.get("metadata") or {}).items()
        if name.startswith("genpoe_") and name not in arguments
    }
    if metadata:
        words += ["--metadata", json.dumps(metadata)]
    return _line([*words, "--log_samples", "--output_path", str(run.results.parents[1])])


def _pairs(arguments: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in arguments.items())
