"""What a run that was stopped needs to go on: weights, optimizer and progress, whole at any moment.

Every saving is a directory of its own, ``step-000500``, written under another name and renamed; older ones are deleted
after that. So whenever the process dies, the highest step that is there is complete.
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

WEIGHTS, OPTIMIZER, PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        arguments: all that decides its result; a run with others is another run.
        step: optimizer steps done.
        losses: (step, loss, learning rate) of every step, steps counted from 1.
        validations: ``{"step": ..., measure: value, ...}`` of every validation.
        best: the step of the best validation so far.
    """

    arguments: dict[str, Any]
    step: int = 0
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None


def full_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights that learn (and buffers) and the optimizer's state, on the CPU, gathered from where they are sharded.

    To be called in every process of a distributed run.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, states = get_state_dict(module, optimizer, options=options)
    # Tied weights are one tensor under several names, which safetensors does not take.
    whole = {
        name: cast(Tensor, weight).clone(memory_format=torch.contiguous_format) for name, weight in weights.items()
    }
    return whole, cast(dict[str, Any], states)


def save_state(directory: Path, weights: dict[str, Tensor], states: dict[str, Any], progress: Progress) -> None:
    """Save what :func:`full_state` gave, and forget what was saved before."""
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
    """The latest complete saving in ``directory``, if there is one."""
    return max(directory.glob("step-*"), default=None)


def read_progress(saved: Path) -> Progress:
    """How far the run was when ``saved`` was written.

    Raises:
        InputError: the file is damaged.
    """
    try:
        record = json.loads((saved / PROGRESS).read_text(encoding="utf-8"))
        del record["param_groups"]
        record["losses"] = [tuple(row) for row in record["losses"]]
        return Progress(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{saved / PROGRESS}: damaged ({error}); delete {saved.parent} to start over") from error


def load_state(saved: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimizer state back, sharded as ``module`` is.

    Raises:
        InputError: a file is damaged, or not of this model.
    """
    try:
        weights = load_file(saved / WEIGHTS)
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(saved / OPTIMIZER).items():
            parameter, key = name.rsplit("/", 1)
            states.setdefault(parameter, {})[key] = value
        groups = json.loads((saved / PROGRESS).read_text(encoding="utf-8"))["param_groups"]
        set_state_dict(
            module,
            optimizer,
            model_state_dict=weights,  # type: ignore[arg-type]
            optim_state_dict={"state": states, "param_groups": groups},  # type: ignore[dict-item]
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False),
        )
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{saved}: damaged or of another model ({reason}); delete it to start over") from error


def _directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"
