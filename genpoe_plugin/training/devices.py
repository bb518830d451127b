"""The device of a training, alone or as one process of ``accelerate launch``."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from genpoe_plugin.errors import InputError


def accelerator_on(device: str | None) -> Accelerator:
    """The accelerator of a run on ``device``; by default on a GPU if there is one.

    Raises:
        InputError: the device is unknown, or a GPU is named in a distributed run, where every process has its own.
    """
    try:
        cpu = device is not None and torch.device(device).type == "cpu"
    except RuntimeError as error:
        raise InputError(f"device {device}: cannot be used ({str(error).splitlines()[0]})") from error
    accelerator = Accelerator(cpu=cpu)
    if accelerator.num_processes > 1 and device not in (None, "cpu"):
        raise InputError(f"device {device}: each process of a distributed run has its own; leave it out")
    return accelerator
