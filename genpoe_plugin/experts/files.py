"""Experts on disk, for later runs: a folder of safetensors files, each with the experts of one generation.

Below the folder given, one for every way to make experts, named by its fingerprint: so experts of another checkpoint
or precision are never taken for these. Files are named at random, written whole or not at all, and never changed, so
several processes may write at once; what each of them has is in its header.
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

FORMAT = 2
"""Of the experts, for their fingerprint: it rises whenever the same passage becomes other tensors."""
PASSAGES, UNITS = "passages", "units"


class ExpertFiles:
    """What is in the folder when it is opened, and what is added.

    Args:
        fingerprint: of all that makes experts what they are, but for the passage.

    Raises:
        InputError: a file is damaged.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder) / fingerprint
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, first unit, number of units
        self._open: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self._open[path] = file = safe_open(path, framework="pt")
                names = json.loads(file.metadata()[PASSAGES])
                units = json.loads(file.metadata().get(UNITS, "null")) or [1] * len(names)
            except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}: damaged experts ({error}); delete the file") from error
            self._add(path, names, units)

    def __contains__(self, passage: str) -> bool:
        return _name(passage) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, passages: Sequence[str]) -> Weights:
        """The units of passages that are all there, one expert's after the other's, on the CPU.

        Only their bytes are read.
        """
        rows: defaultdict[Path, list[tuple[int, int]]] = defaultdict(list)
        place = 0
        for passage in passages:
            path, first, units = self._places[_name(passage)]
            rows[path] += zip(range(place, place + units), range(first, first + units), strict=True)
            place += units
        found: Weights = ()
        for path, pairs in rows.items():
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            places, numbers = (torch.tensor(column) for column in zip(*pairs, strict=True))
            # Mapped into memory, so that selecting reads no other rows.
            names = sorted(self._open[path].keys(), key=lambda name: int(name.removeprefix("weight")))
            stored = [self._open[path].get_tensor(name) for name in names]
            found = found or tuple(weight.new_empty((place, *weight.shape[1:])) for weight in stored)
            for weight, source in zip(found, stored, strict=True):
                weight[places] = source[numbers]
        return found

    def write(self, passages: Sequence[str], weights: Weights, units: Sequence[int] | None = None) -> None:
        """Add experts.

        Args:
            weights: their units, one expert's after the other's.
            units: how many each of them has; without it, one.

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
        for name, own in zip(names, units, strict=True):
            self._places[name] = path, first, own
            first += own


def _name(passage: str) -> str:
    return sha256(passage.encode()).hexdigest()
