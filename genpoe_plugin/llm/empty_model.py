"""LLMs without their weights, on the meta device: the shapes and dtypes of their tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import TensorInfo
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from genpoe_plugin.hub import UNREACHABLE, split_revision
from genpoe_plugin.llm.language_model import loading, source, torch_dtype

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def empty_model(
    name: str, *, dtype: str = "auto", gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """An LLM from a directory, the hub or a GGUF file, on the meta device, in the dtype that it would be loaded in.

    Raises:
        InputError: there is no configuration of a causal language model, or no such dtype.
    """
    repository, options = source(name, gguf_file)
    with loading(name):
        config = AutoConfig.from_pretrained(repository, trust_remote_code=trust_remote_code, **options)
    if dtype == "auto" and gguf_file is not None:
        dtype = "float32"  # transformers dequantises the weights of any GGUF file
    elif dtype == "auto":
        # Without a configured dtype, transformers uses that of the checkpoint's first floating point tensor.
        stored = (FLOATS[tensor.dtype] for tensor in _stored_tensors(name) if tensor.dtype in FLOATS)
        dtype = str(config.get_text_config().dtype or next(stored, "float32")).removeprefix("torch.")
    number_format = torch_dtype(dtype)
    with loading(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=number_format, trust_remote_code=trust_remote_code)


def weight_bytes(name: str, model: PreTrainedModel) -> int:
    """Bytes of the weights of ``name``, an LLM like ``model``; for a quantised one, what its files hold."""
    quantised = getattr(model.config, "quantization_config", None) is not None
    stored = _stored_tensors(name) if quantised else []
    return sum(end - start for start, end in (tensor.data_offsets for tensor in stored)) or sum(
        weight.nbytes for weight in model.parameters()
    )


def _stored_tensors(name: str) -> list[TensorInfo]:
    """The tensors in the headers of a checkpoint's safetensors files; empty if there are no such files."""
    repository, revision = split_revision(name)
    directory = Path(str(cached_file(repository, CONFIG_NAME, revision=revision))).parent
    try:
        metadata = get_local_safetensors_metadata(directory)
    except (OSError, NotASafetensorsRepoError, SafetensorsParsingError):
        try:
            metadata = get_safetensors_metadata(repository, revision=revision)
        except (*UNREACHABLE, ValueError, NotASafetensorsRepoError, SafetensorsParsingError):
            return []
    return [tensor for file in metadata.files_metadata.values() for tensor in file.tensors.values()]
