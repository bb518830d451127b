"""The frozen decoder LLM: load it or its lower layers, and access its embedding table."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import loaded_from, split_revision
from genpoe_plugin.llm.gguf_files import begin_as_stored, check_gguf, gguf_path


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Raise an `InputError` where transformers cannot load the LLM ``name``."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # of the hub's cache
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "" if os.path.isdir(name) else "; give a directory or a hub name"
        raise InputError(f"LLM {name}: cannot be loaded ({reason}){advice}") from error


def source(name: str, gguf_file: str | None = None) -> tuple[str, dict[str, str]]:
    """The repository of the LLM ``name``, and transformers' options for its revision and its GGUF file.

    Raises:
        InputError: there is no such file.
    """
    check_gguf(name, gguf_file)
    repository, revision = split_revision(name)
    requested = {"gguf_file": gguf_file, "revision": revision}
    return repository, {option: value for option, value in requested.items() if value is not None}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        InputError: there is no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype {name}: no such dtype; give auto, float32, bfloat16 or float16")
    return dtype


def load_language_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an LLM, without gradients and in evaluation mode, and its tokenizer.

    Args:
        name: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
        device: device of the model.
        dtype: dtype of the weights; ``auto`` keeps that of the checkpoint.
        gguf_file: GGUF file in the directory or repository with the model and the tokenizer.
        trust_remote_code: whether to run code from the repository.

    Raises:
        InputError: it cannot be loaded, its tokenizer has no character offsets, or there is no such device or dtype.
    """
    if dtype != "auto":
        torch_dtype(dtype)
    tokenizer = load_tokenizer(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    with loading(name):
        repository, of_hub = loaded_from(name)
        model = AutoModelForCausalLM.from_pretrained(
            repository, dtype=dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **of_hub
        )
    return to_device(model, device).eval().requires_grad_(False), tokenizer


def load_lower_layers(
    name: str, layers: int, *, device: str = "cpu", dtype: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, int]:
    """Load only the lowest decoder layers of an LLM; the other layers are neither read nor allocated.

    Args:
        name: a directory, or a hub repository.
        layers: number of layers to load.
        device: device of the model.
        dtype: dtype of the weights; ``auto`` keeps that of the checkpoint.
        revision: revision of the repository.

    Returns:
        The model, and the number of layers of the whole LLM.

    Raises:
        InputError: it cannot be loaded, or there is no such device.
    """
    level = transformers_logging.get_verbosity()
    with loading(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
        text = config.get_text_config()
        depth = text.num_hidden_layers
        text.num_hidden_layers = min(layers, depth)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        # Otherwise transformers warns about every weight of the omitted layers.
        transformers_logging.set_verbosity_error()
        try:
            model = AutoModel.from_pretrained(name, config=config, dtype=dtype, revision=revision)
        finally:
            transformers_logging.set_verbosity(level)
    return to_device(model, device).eval().requires_grad_(False), depth


def load_tokenizer(
    name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an LLM from a directory, the hub (``user/name@revision``), or a GGUF file there.

    Raises:
        InputError: it cannot be loaded, or has no character offsets.
    """
    repository, options = source(name, gguf_file)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=trust_remote_code, **options)
    check_tokenizer(tokenizer, name)
    if gguf_file is not None:
        begin_as_stored(tokenizer, gguf_path(repository, gguf_file, revision=options.get("revision")))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise an `InputError` if the tokenizer of the LLM ``name`` has no character offsets."""
    if not tokenizer.is_fast:
        raise InputError(f"LLM {name}: its tokenizer has no character offsets; a fast tokenizer is needed")


def context_length(model: PreTrainedModel) -> float:
    """The LLM's maximum number of tokens; infinity if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def to_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Move a model to a device and return it.

    Raises:
        InputError: the device is not available.
    """
    try:
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: cannot be used ({str(error).strip().splitlines()[0]})") from error


@contextmanager
def embedding_table(model: PreTrainedModel) -> Iterator[Tensor]:
    """The LLM's token embeddings, ``[vocabulary, d]`` unless they are quantised, on the device that computes with them.

    With accelerate's offloading, the embeddings are loaded only inside the block.
    """
    module = model.get_input_embeddings()
    with align_module_device(module):
        yield cast(Tensor, module.weight)


def embedding_entries(model: PreTrainedModel, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of the embedding table, one per pair of ``rows`` and ``columns``, in float32 on the CPU, ``[n]``."""
    with embedding_table(model) as table:
        rows = rows.to(table.device)
        # A plain lookup returns the table's own values, which the module may scale. Quantised integers need the module.
        states = functional.embedding(rows, table) if table.is_floating_point() else model.get_input_embeddings()(rows)
        return states.detach()[range(len(rows)), columns.to(states.device)].float().cpu()


def weights_sample(model: PreTrainedModel) -> str:
    """A hash of some entries of every weight, including adapters, to distinguish LLMs of the same name.

    Offloaded weights are left out.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            entries = weight.detach().flatten()[:: max(1, weight.numel() // 16)]
            digest.update(f"{name} {entries.float().tolist()}".encode())
    return digest.hexdigest()[:16]
