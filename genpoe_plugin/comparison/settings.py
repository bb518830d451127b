"""What a run was made with, as far as it decides an answer; and a short name for it among others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genpoe_plugin.arguments import ARGUMENTS, DEFAULTS, LOADED, NON_DECIDING, control_of, is_used, tells_apart
from genpoe_plugin.comparison.runs import Run

Settings = dict[str, Any]
"""Name to value; two runs with equal settings are the same run."""

_SHORT = {"num_passages": "K", "pretrained": "model", "num_retrieved": "of", "hypernetwork": "hypernetwork"}
_FILES = ("pretrained", *LOADED, "peft", "delta")


def deciding(arguments: Mapping[str, Any]) -> Settings:
    """Those of the genpoe model's arguments that decide its answers: mode and control leave some unused."""
    mode = arguments.get("mode", DEFAULTS["mode"])
    control = control_of(mode, arguments.get("passages", DEFAULTS["passages"]))
    kept = {name: value for name, value in arguments.items() if tells_apart(name, value, mode, control)}
    return kept | {"mode": mode, "passages": control}


def settings_of(run: Run) -> Settings:
    """Of a run of any model. Fingerprints are in the place of the paths of what was loaded."""
    arguments = {name: value for name, value in run.arguments.items() if name not in NON_DECIDING}
    genpoe = run.genpoe
    if genpoe is None:
        # The name "mode" tells our runs apart from others.
        return {
            "kind": run.config.get("model"),
            **{f"{name}_" if name == "mode" else name: value for name, value in arguments.items()},
        }
    settings = deciding(arguments | genpoe.get("arguments", {}))
    fingerprint = genpoe.get("fingerprint", {})
    for name in LOADED:
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
    ours = [settings for settings in systems if "mode" in settings]
    for name in {name for settings in ours for name in settings} & ARGUMENTS.keys():
        # What one of them leaves at a default that settings do not tell is another value all the same.
        lacking = [settings for settings in ours if name not in settings]
        if any(is_used(name, settings["mode"], settings["passages"]) for settings in lacking):
            values[name].add(json.dumps(DEFAULTS[name]))
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
