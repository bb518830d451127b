"""Experts on disk, for later runs: a folder of safetensors files, each with one generated batch of experts.

Each combination of checkpoint, precision and other settings that decide an expert has a fingerprint, which names its
subfolder, so experts made with other settings are never read. Files have random names, are written atomically and never
change, so several processes may write at once. The header of a file lists its passages.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert import Weights
from genpoe_plugin.files import atomic_file
from genpoe_plugin.json_text import parse_json

FORMAT = 2
"""Version of the experts, part of their fingerprint. It increases when the same passage yields other tensors."""
PASSAGES, UNITS = "passages", "units"


class ExpertFiles:
    """Experts in a folder: those present when it is opened, and those added since.

    Args:
        folder: the expert store; the files are in its subfolder ``fingerprint``.
        fingerprint: hash of everything that decides an expert, except the passage.

    Raises:
        InputError: a file is damaged.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder) / fingerprint
        self._locations: dict[str, tuple[Path, int, int]] = {}  # file, first unit, number of units
        self._open: dict[Path, Any] = {}
        self._form: list[tuple[str, list[int]]] | None = None  # dtype and shape of a unit of each tensor
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self._open[path] = file = safe_open(path, framework="pt")
                names = parse_json(file.metadata()[PASSAGES])
                units = parse_json(file.metadata().get(UNITS, "null")) or [1] * len(names)
                self._check(file, names, units)
            except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}: damaged experts ({error}); delete the file") from error
            self._add(path, names, units)

    def _check(self, file: Any, names: Any, units: Any) -> None:
        """Raise a `ValueError` if a file's description is not that of its tensors, or differs from other files'."""
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the passages are no list of texts")
        if not isinstance(units, list) or not all(type(count) is int and count > 0 for count in units):
            raise ValueError("the units are no list of numbers")
        slices = [file.get_slice(name) for name in _ordered(file)]
        total = sum(units)
        if len(units) != len(names) or any(part.get_shape()[:1] != [total] for part in slices):
            raise ValueError(f"its tensors have not {total} units of {len(names)} passages")
        form = [(part.get_dtype(), part.get_shape()[1:]) for part in slices]
        if not form or form != (self._form or form):
            raise ValueError("its tensors have other shapes than those of other files")
        self._form = form

    def __contains__(self, passage: str) -> bool:
        return _name(passage) in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def read(self, passages: Sequence[str]) -> Weights:
        """The units of ``passages``, expert by expert, on the CPU; all passages must be in the folder.

        Only the bytes of these units are read.
        """
        rows: defaultdict[Path, list[tuple[int, int]]] = defaultdict(list)
        total = 0
        for passage in passages:
            path, first, units = self._locations[_name(passage)]
            rows[path] += zip(range(total, total + units), range(first, first + units), strict=True)
            total += units
        weights: Weights = ()
        for path, pairs in rows.items():
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            targets, sources = (torch.tensor(column) for column in zip(*pairs, strict=True))
            # The file is memory-mapped, so selecting rows reads no others.
            stored = [self._open[path].get_tensor(name) for name in _ordered(self._open[path])]
            weights = weights or tuple(weight.new_empty((total, *weight.shape[1:])) for weight in stored)
            for weight, source in zip(weights, stored, strict=True):
                weight[targets] = source[sources]
        return weights

    def write(self, passages: Sequence[str], weights: Weights, units: Sequence[int] | None = None) -> None:
        """Add experts.

        Args:
            passages: the experts' passages.
            weights: the experts' units, expert by expert.
            units: the number of units of each expert; one by default.

        Raises:
            InputError: the folder cannot be written to.
        """
        names = [_name(passage) for passage in passages]
        units = units or [1] * len(names)
        path = self.folder / f"{uuid4().hex}.safetensors"
        tensors = {f"weight{number}": weight.detach().cpu().contiguous() for number, weight in enumerate(weights)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata={PASSAGES: json.dumps(names), UNITS: json.dumps(list(units))})
        except (OSError, SafetensorError) as error:
            raise InputError(f"expert_store={self.folder.parent}: cannot be written ({error})") from error
        self._add(path, names, units)

    def _add(self, path: Path, names: Sequence[str], units: Sequence[int]) -> None:
        first = 0
        for name, count in zip(names, units, strict=True):
            self._locations[name] = path, first, count
            first += count


def _ordered(file: Any) -> list[str]:
    """The names of a file's tensors, ``weight0`` and so on."""
    return sorted(file.keys(), key=lambda name: int(name.removeprefix("weight")))


def _name(passage: str) -> str:
    return sha256(passage.encode()).hexdigest()
