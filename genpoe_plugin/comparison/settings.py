"""What a run was made with, as far as it decides an answer; and a short name for it among others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genpoe_plugin.comparison.runs import NON_DECIDING, Run
from genpoe_plugin.prompts import EXPERT_MODES

Settings = dict[str, Any]
"""Name to value; two runs with equal settings are the same run."""

_PASSAGES = ("num_passages", "gates", "index", "reranker", "num_retrieved", "question_field", "seed")
# What a control leaves unused. A passage drawn at random has no rerank score, so gates are uniform.
_UNUSED = {
    "none": {*_PASSAGES},
    "constant": {*_PASSAGES} - {"index", "question_field", "seed"},
    "random": {"gates", "reranker", "num_retrieved"},
    "retrieved": {"seed"},
    "gold": {"seed"},
    "shuffled": set[str](),
}
_SHORT = {"num_passages": "K", "pretrained": "model", "num_retrieved": "of", "hypernetwork": "hypernetwork"}
_FILES = ("pretrained", "hypernetwork", "index", "reranker", "peft", "delta")


def deciding(arguments: Mapping[str, Any]) -> Settings:
    """Those of the genpoe model's arguments that decide its answers: mode and control leave some unused."""
    mode = arguments.get("mode", "genpoe")
    control = "none" if mode == "closed_book" else arguments.get("passages", "retrieved")
    unused = {*NON_DECIDING, *_UNUSED[control]}
    if mode not in EXPERT_MODES:
        unused |= {"hypernetwork", "expert_layers", "expert_dtype", "gates"}
    kept = {name: value for name, value in arguments.items() if name not in unused and value is not None}
    return kept | {"mode": mode, "passages": control}


def settings_of(run: Run) -> Settings:
    """Of a run of any model. Fingerprints are in the place of the paths of what was loaded."""
    arguments = {name: value for name, value in run.arguments.items() if name not in NON_DECIDING}
    genpoe = run.genpoe
    if genpoe is None:
        return {"kind": run.config.get("model"), **arguments}
    settings = deciding(arguments | genpoe.get("arguments", {}))
    fingerprint = genpoe.get("fingerprint", {})
    for name in ("hypernetwork", "index", "reranker"):
        if name in settings and fingerprint.get(name):
            settings[name] = fingerprint[name]
    if run.brings_passages:
        settings.pop("index", None)
    if dtype := fingerprint.get("dtype"):
        settings["dtype"] = dtype.removeprefix("torch.")  # as lm_eval's users write it
    return {"kind": run.config.get("model"), **settings}


def without_seed(settings: Settings) -> Settings:
    """What runs that are seeds of one another share. Only the genpoe model's seed is one."""
    return {name: value for name, value in settings.items() if name != "seed" or "mode" not in settings}


def key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def labels(systems: Sequence[Settings], shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each: mode, passages and K, and of the rest what is not the same for all that have it.

    Args:
        systems: settings, without seeds.
        shown: for each of them, what to show in the place of a value, such as a file's name for its fingerprint.
    """
    told = {"mode", "passages", "num_passages", "kind"}
    values: dict[str, set[str]] = {}
    for settings in systems:
        for name in settings:
            values.setdefault(name, set()).add(json.dumps(settings[name], default=str))
    differing = [name for name in values if len(values[name]) > 1 and name not in told]
    names = []
    for settings, show in zip(systems, shown, strict=True):
        if "mode" in settings:
            words = [settings["mode"]]
            if settings["passages"] != "retrieved" and settings["mode"] != "closed_book":
                words.append(settings["passages"])
            if "num_passages" in settings:
                words.append(f"K={settings['num_passages']}")
            if settings["kind"] != "genpoe":
                words.append(str(settings["kind"]))
        else:
            model = next((settings[name] for name in ("pretrained", "model", "path") if settings.get(name)), "")
            words = [str(settings["kind"]), Path(str(model)).name]
        for name in differing:
            if name in settings and not ("mode" not in settings and name in ("pretrained", "model", "path")):
                value = show.get(name, settings[name])
                words.append(f"{_SHORT.get(name, name)}={Path(str(value)).name if name in _FILES else value}")
        names.append(" ".join(word for word in words if word))
    return _distinct(names)


def _distinct(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result
