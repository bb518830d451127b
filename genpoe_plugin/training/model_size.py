"""The sizes of a decoder LLM that decide its memory, from its configuration, without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import TensorInfo
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.decoder import find_decoder
from genpoe_plugin.hub import UNREACHABLE, split_revision
from genpoe_plugin.llm.gguf_files import check_gguf

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class LanguageModelSize:
    """The sizes of a decoder LLM; in brackets, their letters in the formulas of `genpoe_plugin.training.memory`.

    Attributes:
        weights: number of weights.
        largest_weight: number of weights in the largest tensor.
        weight_bytes: bytes of all weights.
        number_bytes: bytes per value of the hidden states in the model's dtype [w].
        layers: number of layers [n].
        hidden_size: hidden width [d].
        heads: number of attention heads.
        attention_width: width of all heads together [a].
        mlp_width: number of values that an MLP stores per token [3·f].
        layer_weights: number of weights per layer.
        vocabulary: vocabulary size [V].
    """

    weights: int
    largest_weight: int
    weight_bytes: int
    number_bytes: int
    layers: int
    hidden_size: int
    heads: int
    attention_width: int
    mlp_width: int
    layer_weights: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel, *, dtype: str = "auto", weight_bytes: int | None = None) -> LanguageModelSize:
        """The sizes of a model, which may be on the meta device.

        Args:
            model: the LLM.
            dtype: dtype that it will be loaded in; ``auto`` takes that of its configuration, or else float32.
            weight_bytes: bytes of a quantised model's weights; by default they follow from the dtype.

        Raises:
            InputError: there is no such dtype, or the model contains no list of decoder layers.
        """
        config = model.config.get_text_config()
        number_bytes = _number_bytes(dtype, config.dtype)
        sizes = [weight.numel() for weight in model.parameters()]
        heads = getattr(config, "num_attention_heads", 1)  # state space models have no heads
        (layer, *_) = find_decoder(model)[1]
        mlp = sum(
            weight.numel()
            for name, weight in layer.named_parameters()
            if weight.dim() > 1 and "attn" not in name.lower() and "attention" not in name.lower()
        )
        return cls(
            weights=sum(sizes),
            largest_weight=max(sizes),
            weight_bytes=sum(sizes) * number_bytes if weight_bytes is None else weight_bytes,
            number_bytes=number_bytes,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=heads,
            attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
            mlp_width=mlp // config.hidden_size,
            layer_weights=sum(weight.numel() for weight in layer.parameters()),
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class AdapterSize:
    """The size of a LoRA adapter.

    Attributes:
        weights: number of weights.
        kept: number of values per token that its layers store for the backward pass.
    """

    weights: int
    kept: int

    @classmethod
    def of(cls, model: PreTrainedModel, targets: Sequence[str], rank: int) -> AdapterSize:
        """The size of an adapter of ``rank`` on the layers whose names are, or end in, one of ``targets``."""
        endings = tuple(f".{target}" for target in targets)
        shapes = [
            # The weight of transformers' Conv1D (GPT-2) is transposed.
            module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
            for name, module in model.named_modules()
            if f".{name}".endswith(endings) and isinstance(getattr(module, "weight", None), torch.Tensor)
        ]
        inputs, outputs = sum(shape[0] for shape in shapes), sum(shape[1] for shape in shapes)
        return cls(rank * (inputs + outputs), inputs + rank * len(shapes))


def empty_model(name: str, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """An LLM from a directory, the hub or a GGUF file, on the meta device: modules without storage.

    Raises:
        InputError: there is no configuration of a causal language model.
    """
    check_gguf(name, gguf_file)
    repository, revision = split_revision(name)
    requested = {"gguf_file": gguf_file, "revision": revision}
    options = {option: value for option, value in requested.items() if value is not None}
    try:
        config = AutoConfig.from_pretrained(repository, trust_remote_code=trust_remote_code, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LLM {name}: cannot be loaded ({reason}); give a directory or a hub name") from error


def read_size(
    name: str, *, dtype: str = "auto", gguf_file: str | None = None, trust_remote_code: bool = False
) -> LanguageModelSize:
    """The sizes of an LLM from a directory, the hub or a GGUF file, when it is loaded in ``dtype``.

    Raises:
        InputError: there is no configuration of a causal language model, or no such dtype.
    """
    model = empty_model(name, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    if gguf_file is not None:
        # transformers dequantises the weights of any GGUF file.
        return LanguageModelSize.of(model, dtype="float32" if dtype == "auto" else dtype)
    quantised = getattr(model.config, "quantization_config", None) is not None
    unknown = dtype == "auto" and model.config.get_text_config().dtype is None
    stored = _stored_tensors(name) if quantised or unknown else []
    if unknown:
        # transformers uses the dtype of the checkpoint's first floating point tensor.
        dtype = next((FLOATS[tensor.dtype] for tensor in stored if tensor.dtype in FLOATS), "float32")
    bytes_stored = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in stored)
    return LanguageModelSize.of(model, dtype=dtype, weight_bytes=bytes_stored if quantised and stored else None)


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


def _number_bytes(dtype: str, configured: torch.dtype | str | None) -> int:
    # In a saved configuration of transformers, the dtype is a name.
    name = str(configured or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    torch_dtype = getattr(torch, name, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise InputError(f"dtype {dtype}: no such dtype; give auto, float32, bfloat16 or float16")
    return torch_dtype.itemsize
