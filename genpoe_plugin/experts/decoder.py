"""Find the modules of a decoder LLM that experts attach to, by structure, so that it works for any family."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError

ATTENTION_TYPES = ("full_attention", "sliding_attention")
PRE_NORMS = {"input_layernorm", "post_attention_layernorm"}
"""Names of the norms of a layer with one norm before its attention and one before its MLP."""
SANDWICH_NORMS = PRE_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
"""Names of the norms of a layer that also has one after each of the two (Gemma 2 and 3)."""


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder of a language model and the list of its layers, found by structure.

    Raises:
        InputError: the model contains no list of decoder layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, child
    raise InputError(
        f"{type(model).__name__}: no list of {depth} decoder layers found, so experts cannot be added to it"
    )


def find_layer(model: PreTrainedModel, layer: int) -> nn.Module:
    """The decoder layer with index ``layer``, from 0.

    Raises:
        InputError: the model has no such layer.
    """
    _, layers = find_decoder(model)
    if not 0 <= layer < len(layers):
        raise InputError(f"layer {layer} is not in {type(model).__name__}, which has layers 0 to {len(layers) - 1}")
    return layers[layer]


def find_mlp(model: PreTrainedModel, layer: int) -> nn.Module:
    """The MLP of decoder layer ``layer``: its only child, besides the attention, that contains other modules.

    The search looks at modules and not at weights, because a quantised LLM may pack its weights, or keep them outside
    its parameters.

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
    """The attention of decoder layer ``layer``, which must have keys and values for each head, and rotary positions.

    Raises:
        InputError: the model has no such layer, or the layer has no attention of this kind.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    decoder, _ = find_decoder(model)
    attentions = [
        child
        for key, child in find_layer(model, layer).named_children()
        if ("attn" in key.lower() or "attention" in key.lower()) and hasattr(child, "layer_idx")
    ]
    types = getattr(config, "layer_types", None)
    reason = None
    if len(attentions) != 1 or (types and types[layer] not in ATTENTION_TYPES):
        reason = "has no softmax attention (a state space or linear layer)"
    elif hasattr(attentions[0], "sinks"):
        reason = "has learned sinks in its softmax, which experts cannot join yet"
    elif getattr(config, "kv_lora_rank", None):
        reason = "keeps latent states instead of keys and values"
    elif not any(hasattr(module, "rotary_emb") for module in (model, decoder, *attentions)):
        reason = "has no rotary positions"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "does not use transformers' AttentionInterface"
    if reason:
        raise InputError(f"layer {layer} of {name} {reason}, so attention experts cannot be added to it")
    return attentions[0]


def find_query_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module of decoder layer ``layer`` that computes its queries, and nothing else.

    Raises:
        InputError: the model has no such layer, or the layer computes queries, keys and values in one projection.
    """
    projection = getattr(find_attention(model, layer), "q_proj", None)
    if projection is None:
        raise InputError(
            f"layer {layer} of {type(model).__name__} has no separate q_proj, so nothing can be added to its queries"
        )
    return projection


class BesideMLP(NamedTuple):
    """The modules of two neighbouring layers that read attention experts beside an MLP.

    Attributes:
        below: the layer whose MLP the experts stand beside.
        before_mlp: the norm before the MLP of ``below``.
        before_attention: the norm before the attention of the layer above.
        attention: the attention of the layer above.
        behind_attention: the norm after that attention; None if the layer has none.
    """

    below: nn.Module
    before_mlp: nn.Module
    before_attention: nn.Module
    attention: nn.Module
    behind_attention: nn.Module | None


def find_beside_mlp(model: PreTrainedModel, layer: int) -> BesideMLP:
    """The modules that read attention experts beside the MLP of the layer below ``layer``.

    Args:
        layer: index of the layer whose attention reads the experts, from 1.

    Raises:
        InputError: the model has no such layer, or one of the two layers is not a norm and an attention, then a norm
            and an MLP. What another layer computes cannot be derived from its modules.
    """
    attention, (decoder, layers) = find_attention(model, layer), find_decoder(model)
    below, above = layers[layer - 1], layers[layer]
    norms = [{name for name, _ in one.named_children() if "norm" in name} for one in (below, above)]
    scaled = hasattr(above, "residual_multiplier")
    known = norms[0] in (PRE_NORMS, SANDWICH_NORMS)
    if norms[0] != norms[1] or not known or scaled or not hasattr(decoder, "rotary_emb"):
        raise InputError(
            f"layers {layer - 1} and {layer} of {type(model).__name__} are not each a norm and an attention, then a "
            "norm and an MLP, so attention experts cannot be read beside an MLP"
        )
    sandwich = norms[0] == SANDWICH_NORMS
    return BesideMLP(
        below,
        below.get_submodule("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        above.get_submodule("input_layernorm"),
        attention,
        above.get_submodule("post_attention_layernorm") if sandwich else None,
    )
