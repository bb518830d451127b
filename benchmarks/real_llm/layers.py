"""Sets of layers with experts, and the size of a passage's experts."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from genpoe_plugin.checkpoints.checkpoint import read_config
from genpoe_plugin.errors import InputError

Layers = tuple[int, ...]
Heads = tuple[tuple[int, ...], ...]
"""The key-value heads of each layer; empty for all heads."""
SIZES = (1, 2, 3, 4, 6, 9, 12)  # numbers of layers that get a row in the table
BYTES = 2  # per number in 16 bits


@dataclass(frozen=True)
class Shape:
    """The properties of an LLM that determine the size of experts in its attention.

    Attributes:
        depth: number of decoder layers.
        kv_heads: key-value heads per layer.
        width: width of a head.
    """

    depth: int
    kv_heads: int
    width: int

    @classmethod
    def of(cls, llm: str) -> Shape:
        """The shape of an LLM in a directory or on the hub.

        Raises:
            InputError: its configuration cannot be read.
        """
        try:
            config = AutoConfig.from_pretrained(llm).get_text_config()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"LLM {llm}: cannot be loaded ({reason}); give a directory or a hub name") from error
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, kv_heads, width)

    @property
    def all(self) -> Layers:
        return tuple(range(self.depth))

    def bytes(self, layers: Layers, heads: Heads = ()) -> int:
        """Bytes per passage token in 16 bits, with all key-value heads of the layers or only ``heads``."""
        count = sum(map(len, heads)) if heads else self.kv_heads * len(layers)
        return BYTES * 2 * self.width * count


def read_layers(path: Path, depth: int) -> dict[int, Layers]:
    """Read the sets of layers in a JSON file, ``{"3": [5, 11, 12], ...}``, by size in ascending order.

    A ``calibration.csv`` of `genpoe experts create --calibrate` is accepted too; its sets of the `SIZES`, of half of
    the layers and of a quarter of them are used.

    Raises:
        InputError: the file has another form, or names layers that an LLM of ``depth`` layers does not have.
    """
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                points = [row for row in csv.DictReader(file) if row["layers"]]
            if any(row["kv_heads"] for row in points):
                raise InputError(f"{path}: a calibration of heads; the table needs one of whole layers")
            rows = [[int(layer) for layer in row["layers"].split()] for row in points]
            wanted = {*SIZES, depth // 2, depth // 4}
            sets: Any = {str(len(row)): row for row in rows if len(row) in wanted}
        else:
            sets = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: neither JSON nor a calibration ({error})") from error
    if not isinstance(sets, dict) or not sets:
        raise InputError(
            f'{path}: give an object that maps a number of layers to a list of layers, {{"3": [5, 11, 12]}}'
        )
    found: dict[int, Layers] = {}
    for size, layers in sets.items():
        valid = isinstance(layers, list) and all(type(layer) is int and 0 <= layer < depth for layer in layers)
        if not valid or size != str(len(set(layers))) or len(layers) != len(set(layers)) or not layers:
            raise InputError(f'{path}: "{size}": {layers}: give {size} different layers between 0 and {depth - 1}')
        found[len(layers)] = tuple(sorted(layers))
    return dict(sorted(found.items()))


def largest_set(sets: dict[int, Layers], max_layers: int) -> Layers:
    """The largest set with at most ``max_layers`` layers.

    Raises:
        InputError: there is no such set.
    """
    fitting = [layers for size, layers in sets.items() if size <= max_layers]
    if not fitting:
        raise InputError(f"--layers-file: no set of at most {max_layers} layers")
    return max(fitting, key=len)


def read_heads(checkpoint: Path) -> tuple[Layers, Heads]:
    """The layers and key-value heads of a checkpoint of `genpoe experts create --heads`.

    Raises:
        InputError: there is no checkpoint, or it has all heads of its layers.
    """
    config = read_config(checkpoint)
    if config.kv_heads is None:
        raise InputError(f"--heads {checkpoint}: has all heads of its layers; create it with --heads")
    return config.layers, config.kv_heads


def named(layers: Layers, heads: Heads = ()) -> str:
    """Layers as text for a table: ``1 9``, or with their heads ``1:0 9:0+1``."""
    if not heads:
        return " ".join(map(str, layers))
    return " ".join(f"{layer}:{'+'.join(map(str, own))}" for layer, own in zip(layers, heads, strict=True))
