"""The frozen decoder LLM: loading it for training, and its embedding table."""

from __future__ import annotations

import hashlib
import math
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


def load_language_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An LLM from a directory or the hub, without gradients and in evaluation mode, and its tokenizer.

    Args:
        name: a directory, or a repository of the hub as ``user/name`` or ``user/name@revision``.
        gguf_file: in that directory or repository, which both are read from.

    Raises:
        InputError: it cannot be loaded, or its tokenizer cannot tell which characters a token covers; there is no such
            device or dtype.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype {dtype}: no such dtype; give auto, float32, bfloat16 or float16")
    tokenizer = load_tokenizer(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    try:
        repository, of_hub = loaded_from(name)
        model = AutoModelForCausalLM.from_pretrained(
            repository, dtype=dtype, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **of_hub
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LLM {name}: cannot be loaded ({reason}); give a directory or a hub name") from error
    return to_device(model, device).eval().requires_grad_(False), tokenizer


def load_lower_layers(
    name: str, layers: int, *, device: str = "cpu", dtype: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, int]:
    """The lowest ``layers`` decoder layers of an LLM, for what only reads so far, and how many the whole LLM has.

    What is above is neither read nor given memory.

    Raises:
        InputError: it cannot be loaded, or there is no such device.
    """
    level = transformers_logging.get_verbosity()
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        text = config.get_text_config()
        depth = text.num_hidden_layers
        text.num_hidden_layers = min(layers, depth)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        # Or it warns of every weight of the layers above.
        transformers_logging.set_verbosity_error()
        model = AutoModel.from_pretrained(name, config=config, dtype=dtype, revision=revision)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LLM {name}: cannot be loaded ({reason}); give a directory or a hub name") from error
    finally:
        transformers_logging.set_verbosity(level)
    return to_device(model, device).eval().requires_grad_(False), depth


def load_tokenizer(
    name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of an LLM in a directory or on the hub (``user/name@revision``), or in a GGUF file there.

    Raises:
        InputError: it cannot be loaded, or cannot tell which characters a token covers.
    """
    check_gguf(name, gguf_file)
    repository, revision = split_revision(name)
    given = {"gguf_file": gguf_file, "revision": revision}
    options = {option: value for option, value in given.items() if value is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LLM {name}: cannot be loaded ({reason}); give a directory or a hub name") from error
    check_tokenizer(tokenizer, name)
    if gguf_file is not None:
        begin_as_stored(tokenizer, gguf_path(repository, gguf_file, revision=revision))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise an ``InputError`` if the tokenizer of the LLM ``name`` cannot tell which characters a token covers."""
    if not tokenizer.is_fast:
        raise InputError(f"LLM {name}: its tokenizer gives no character offsets; one of the fast kind is needed")


def context_length(model: PreTrainedModel) -> float:
    """How many tokens the LLM has positions for; infinitely many where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def to_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Move a model, and return it.

    Raises:
        InputError: there is no such device here.
    """
    try:
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: cannot be used ({str(error).strip().splitlines()[0]})") from error


@contextmanager
def embedding_table(model: PreTrainedModel) -> Iterator[Tensor]:
    """The LLM's token embeddings, ``[vocabulary, d]`` unless they are quantised, on the device that computes with them.

    An LLM may keep them elsewhere between its passes (accelerate's offloading), so they are at hand inside the block.
    """
    module = model.get_input_embeddings()
    with align_module_device(module):
        yield cast(Tensor, module.weight)


def embedding_entries(model: PreTrainedModel, rows: Tensor, columns: Tensor) -> Tensor:
    """Entries of the embedding table, one for each pair of ``rows`` and ``columns``, in float32 on the CPU."""
    with embedding_table(model) as table:
        rows = rows.to(table.device)
        # Looking up keeps the table's own numbers, where a module may scale what it gives; integers mean nothing alone.
        found = functional.embedding(rows, table) if table.is_floating_point() else model.get_input_embeddings()(rows)
        return found.detach()[range(len(rows)), columns.to(found.device)].float().cpu()


def weights_sample(model: PreTrainedModel) -> str:
    """A hash of some entries of every weight, adapters included, which two LLMs of one name do not share.

    Weights that are not at hand (offloaded ones) are left out.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.is_meta:
            entries = weight.detach().flatten()[:: max(1, weight.numel() // 16)]
            digest.update(f"{name} {entries.float().tolist()}".encode())
    return digest.hexdigest()[:16]
