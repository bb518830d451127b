"""The trainer's state for resuming: weights, optimizer and progress.

Each save is a directory such as ``step-00000500``, written under a temporary name and then renamed; older ones are
deleted afterwards. So the highest step is complete whenever the process is killed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from genpoe_plugin.errors import InputError
from genpoe_plugin.json_text import read_json

WEIGHTS, OPTIMIZER, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        arguments: everything that decides the result; a run with other arguments is another run.
        step: number of finished optimizer steps.
        losses: (step, loss, learning rate) of every step, counted from 1.
        validations: ``{"step": ..., measure: value, ...}`` of every validation.
        best: step of the best validation so far.
    """

    arguments: dict[str, Any]
    step: int = 0
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None


def full_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained weights (with buffers) and the optimizer's state, on the CPU, gathered from all shards.

    Every process of a distributed run must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, states = get_state_dict(module, optimizer, options=options)
    # Tied weights are one tensor with several names, which safetensors does not accept.
    whole = {
        name: cast(Tensor, weight).clone(memory_format=torch.contiguous_format) for name, weight in weights.items()
    }
    return whole, cast(dict[str, Any], states)


def save_state(directory: Path, weights: dict[str, Tensor], states: dict[str, Any], progress: Progress) -> None:
    """Save the result of :func:`full_state` and the progress, then delete earlier saves."""
    target = _directory(directory, progress.step)
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / WEIGHTS)
    moments = {f"{name}/{key}": value for name, state in states["state"].items() for key, value in state.items()}
    save_file(moments, temporary / OPTIMIZER)
    record = {**asdict(progress), "param_groups": states["param_groups"]}
    (temporary / PROGRESS).write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for other in directory.iterdir():
        if other.is_dir() and other != target:
            shutil.rmtree(other, ignore_errors=True)


def find_state(directory: Path) -> Path | None:
    """The directory of the latest complete save in ``directory``; None without one."""
    return max(directory.glob("step-*"), default=None)


def read_progress(saved: Path) -> Progress:
    """Read the progress of the run at the save ``saved``.

    Raises:
        InputError: the file is damaged.
    """
    try:
        record = read_json(saved / PROGRESS)
        del record["param_groups"]
        record["losses"] = [tuple(row) for row in record["losses"]]
        return Progress(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{saved / PROGRESS}: damaged ({error}); delete {saved.parent} to start over") from error


def load_state(saved: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and optimizer state, sharded like ``module``.

    Raises:
        InputError: a file is damaged, or belongs to another model.
    """
    try:
        weights = load_file(saved / WEIGHTS)
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(saved / OPTIMIZER).items():
            parameter, key = name.rsplit("/", 1)
            states.setdefault(parameter, {})[key] = value
        groups = read_json(saved / PROGRESS)["param_groups"]
        set_state_dict(
            module,
            optimizer,
            model_state_dict=weights,  # type: ignore[arg-type]
            optim_state_dict={"state": states, "param_groups": groups},  # type: ignore[dict-item]
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False),
        )
    except (OSError, SafetensorError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{saved}: damaged, or from another model ({reason}); delete it to start over") from error


def _directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"
