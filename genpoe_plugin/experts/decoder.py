"""Where in a decoder LLM experts have their places, found by structure, so that any family will do."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError

ATTENTION_TYPES = ("full_attention", "sliding_attention")


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a language model and the list of its layers, by structure.

    Raises:
        InputError: nothing in the model looks like a stack of decoder layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, child
    raise InputError(f"{type(model).__name__}: no list of {depth} decoder layers found, so experts have no place in it")


def find_layer(model: PreTrainedModel, layer: int) -> nn.Module:
    """Decoder layer ``layer``, counted from 0.

    Raises:
        InputError: the model has no such layer.
    """
    _, layers = find_decoder(model)
    if not 0 <= layer < len(layers):
        raise InputError(f"layer {layer} is not in {type(model).__name__}, which has layers 0 to {len(layers) - 1}")
    return layers[layer]


def find_mlp(model: PreTrainedModel, layer: int) -> nn.Module:
    """The MLP of decoder layer ``layer``: the one child made of other modules that is not the attention.

    Modules and not weights are what tells: those of a quantised LLM may be packed, or no parameters at all.

    Raises:
        InputError: the model has no such layer, or the layer has no MLP of its own.
    """
    candidates = [
        child
        for name, child in find_layer(model, layer).named_children()
        if "attn" not in name.lower() and "attention" not in name.lower() and any(True for _ in child.children())
    ]
    if len(candidates) != 1:
        raise InputError(
            f"layer {layer} of {type(model).__name__} has {len(candidates)} modules that could be its MLP, not one"
        )
    return candidates[0]


def find_attention(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention of decoder layer ``layer``: one with keys and values for each head, and rotary positions.

    Raises:
        InputError: the model has no such layer, or the layer has another attention or none.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    decoder, _ = find_decoder(model)
    found = [
        child
        for key, child in find_layer(model, layer).named_children()
        if ("attn" in key.lower() or "attention" in key.lower()) and hasattr(child, "layer_idx")
    ]
    types = getattr(config, "layer_types", None)
    reason = None
    if len(found) != 1 or (types and types[layer] not in ATTENTION_TYPES):
        reason = "has no softmax attention (a state space or linear layer)"
    elif hasattr(found[0], "sinks"):
        reason = "has learned sinks in its softmax, which experts cannot join yet"
    elif getattr(config, "kv_lora_rank", None):
        reason = "keeps latent states instead of keys and values"
    elif not any(hasattr(module, "rotary_emb") for module in (model, decoder, *found)):
        reason = "has no rotary positions"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "does not use transformers' AttentionInterface"
    if reason:
        raise InputError(f"layer {layer} of {name} {reason}, so there is no place in it for attention experts")
    return found[0]
