"""Create a checkpoint of attention experts for an LLM without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.checkpoints.card import ModelCard, write_card
from genpoe_plugin.checkpoints.checkpoint import write_hypernetwork
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.decoder import find_attention
from genpoe_plugin.experts.generator import attention_dimensions
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.files import atomic_directory

if TYPE_CHECKING:
    from genpoe_plugin.training.calibration import Calibration


def attention_config(model: PreTrainedModel, layers: tuple[int, ...] | None = None) -> HypernetworkConfig:
    """The configuration of untrained attention experts in some layers of an LLM, by default in all layers.

    Raises:
        InputError: the LLM lacks one of the layers, or experts do not support the attention there.
    """
    text = model.config.get_text_config()
    layers = tuple(range(text.num_hidden_layers)) if layers is None else layers
    for layer in layers:
        find_attention(model, layer)
    return HypernetworkConfig.preset(
        "attention", hidden_size=text.hidden_size, layers=layers, **attention_dimensions(model)
    )


def create_attention_experts(
    directory: str | Path,
    config: HypernetworkConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration | None = None,
    card: ModelCard | None = None,
) -> None:
    """Write an untrained checkpoint, its card, and the curve of the calibration that chose its layers.

    It replaces an older checkpoint in the directory atomically.

    Args:
        directory: directory of the checkpoint.
        config: configuration of the experts.
        model, tokenizer: the LLM that the experts are for.
        calibration: the calibration that chose the layers, if there was one.
        card: the model card; None writes none.
    """
    record = {}
    if calibration is not None:
        record["calibration"] = {
            "questions": calibration.questions,
            "closed_book_nats": calibration.closed_book,
            "prompt_nats": calibration.prompt,
            "nats": calibration.chosen.nats,
            "kept": calibration.chosen.gain_share,
        }
    with atomic_directory(directory) as temporary:
        if calibration is not None:
            # Imported here because it loads matplotlib.
            from genpoe_plugin.training.calibration import write_calibration

            write_calibration(temporary, calibration)
        if card is not None:
            write_card(temporary, card)
        write_hypernetwork(temporary, config, Hypernetwork(config).state_dict(), model, tokenizer, record)
