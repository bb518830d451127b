"""Where in a decoder LLM experts have their places, found by structure, so that any family will do."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError

ATTENTION_TYPES = ("full_attention", "sliding_attention")
PLAIN = {"input_layernorm", "post_attention_layernorm"}
"""The norms of a layer that has one before its attention and one before its MLP."""
SANDWICH = PLAIN | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
"""Those of one that has another behind each of the two (Gemma 2 and 3)."""


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


def find_query_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """What makes the queries of decoder layer ``layer``, and nothing else.

    Raises:
        InputError: the model has no such layer, or the layer makes queries, keys and values in one product.
    """
    projection = getattr(find_attention(model, layer), "q_proj", None)
    if projection is None:
        raise InputError(
            f"layer {layer} of {type(model).__name__} has no q_proj of its own, so nothing can be added to its queries"
        )
    return projection


class BesideMLP(NamedTuple):
    """The modules of two layers between which experts of tokens are read.

    Attributes:
        below: the layer whose MLP they stand beside.
        before_mlp: its norm of what enters the MLP.
        before_attention, attention, behind_attention: of the layer above; the last only where it has such a norm.
    """

    below: nn.Module
    before_mlp: nn.Module
    before_attention: nn.Module
    attention: nn.Module
    behind_attention: nn.Module | None


def find_beside_mlp(model: PreTrainedModel, layer: int) -> BesideMLP:
    """What reads experts of tokens beside the MLP of the layer below ``layer``, which is at least 1.

    Raises:
        InputError: the model has no such layer, or one of the two is built otherwise than a norm and an attention, then
            a norm and an MLP, so that the modules by themselves do not say what it computes.
    """
    attention, (decoder, layers) = find_attention(model, layer), find_decoder(model)
    below, own = layers[layer - 1], layers[layer]
    norms = [{name for name, _ in one.named_children() if "norm" in name} for one in (below, own)]
    scaled = hasattr(own, "residual_multiplier")
    if norms[0] != norms[1] or norms[0] not in (PLAIN, SANDWICH) or scaled or not hasattr(decoder, "rotary_emb"):
        raise InputError(
            f"layers {layer - 1} and {layer} of {type(model).__name__} are not each a norm and an attention, then a "
            "norm and an MLP, so experts of tokens have no place beside an MLP"
        )
    sandwich = norms[0] == SANDWICH
    return BesideMLP(
        below,
        below.get_submodule("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        own.get_submodule("input_layernorm"),
        attention,
        own.get_submodule("post_attention_layernorm") if sandwich else None,
    )
