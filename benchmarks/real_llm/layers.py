"""Which layers of an LLM hold experts, and what a passage's experts weigh."""

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
"""The key-value heads of each of some layers; empty where all are meant."""
SIZES = (1, 2, 3, 4, 6, 9, 12)  # sets of so many layers are rows of the table
BYTES = 2  # of a number, in 16 bits


@dataclass(frozen=True)
class Shape:
    """What the size of attention experts follows from.

    Attributes:
        depth: decoder layers of the LLM.
        kv_heads: key-value heads of a layer.
        width: of a head.
    """

    depth: int
    kv_heads: int
    width: int

    @classmethod
    def of(cls, llm: str) -> Shape:
        """The shape of an LLM in a directory or on the hub.

        Raises:
            InputError: it has no configuration that can be read.
        """
        try:
            config = AutoConfig.from_pretrained(llm).get_text_config()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"LLM {llm}: cannot be loaded ({reason}); give a directory or a hub name") from error
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kept = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, kept, width)

    @property
    def all(self) -> Layers:
        return tuple(range(self.depth))

    def bytes(self, layers: Layers, heads: Heads = ()) -> int:
        """Of one token of a passage, in 16 bits, with all key-value heads of the layers or with ``heads`` alone."""
        kept = sum(map(len, heads)) if heads else self.kv_heads * len(layers)
        return BYTES * 2 * self.width * kept


def read_layers(path: Path, depth: int) -> dict[int, Layers]:
    """The layer sets of a JSON file, ``{"3": [5, 11, 12], ...}``, by their size, smallest first.

    A ``calibration.csv`` of `genpoe experts create --calibrate` has them as well; of it those of `SIZES` are taken.

    Raises:
        InputError: the file is not of that form, or names layers that an LLM of ``depth`` layers has not.
    """
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                points = [row for row in csv.DictReader(file) if row["layers"]]
            if any(row["kv_heads"] for row in points):
                raise InputError(f"{path}: a calibration of heads; the table needs one of whole layers")
            rows = [[int(layer) for layer in row["layers"].split()] for row in points]
            wanted = {*SIZES, depth // 2, depth // 4}
            given: Any = {str(len(row)): row for row in rows if len(row) in wanted}
        else:
            given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: neither JSON nor a calibration ({error})") from error
    if not isinstance(given, dict) or not given:
        raise InputError(f'{path}: give an object of numbers of layers and lists of layers, {{"3": [5, 11, 12]}}')
    found: dict[int, Layers] = {}
    for size, layers in given.items():
        whole = isinstance(layers, list) and all(type(layer) is int and 0 <= layer < depth for layer in layers)
        if not whole or size != str(len(set(layers))) or len(layers) != len(set(layers)) or not layers:
            raise InputError(f'{path}: "{size}": {layers}: give {size} different layers between 0 and {depth - 1}')
        found[len(layers)] = tuple(sorted(layers))
    return dict(sorted(found.items()))


def largest_set(sets: dict[int, Layers], most: int) -> Layers:
    """The largest set with at most so many layers.

    Raises:
        InputError: there is none.
    """
    fitting = [layers for size, layers in sets.items() if size <= most]
    if not fitting:
        raise InputError(f"--layers-file: no set of at most {most} layers")
    return max(fitting, key=len)


def read_heads(checkpoint: Path) -> tuple[Layers, Heads]:
    """The layers and key-value heads of a checkpoint of `genpoe experts create --heads`.

    Raises:
        InputError: there is no checkpoint, or one with all heads of its layers.
    """
    config = read_config(checkpoint)
    if config.kv_heads is None:
        raise InputError(f"--heads {checkpoint}: has all heads of its layers; create it with --heads")
    return config.layers, config.kv_heads


def named(layers: Layers, heads: Heads = ()) -> str:
    """Layers as a table names them, ``1 9``, or with their heads, ``1:0 9:0+1``."""
    if not heads:
        return " ".join(map(str, layers))
    return " ".join(f"{layer}:{'+'.join(map(str, own))}" for layer, own in zip(layers, heads, strict=True))
