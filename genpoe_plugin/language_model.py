"""The frozen decoder LLM: loading it for training, and its embedding table."""

from __future__ import annotations

from typing import cast

from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.errors import InputError


def load_language_model(
    name: str, *, device: str = "cpu", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An LLM from a directory or the hub, without gradients and in evaluation mode, and its tokenizer.

    Raises:
        InputError: it cannot be loaded, or its tokenizer cannot tell which characters a token covers.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"LLM {name}: cannot be loaded ({reason}); give a directory or a hub name") from error
    if not tokenizer.is_fast:
        raise InputError(f"LLM {name}: its tokenizer gives no character offsets; one of the fast kind is needed")
    model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), tokenizer


def embedding_table(model: PreTrainedModel) -> Tensor:
    """The LLM's token embeddings, ``[vocabulary, d]``."""
    return cast(Tensor, model.get_input_embeddings().weight)
