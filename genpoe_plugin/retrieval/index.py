"""The passage index: a directory with the vectors, the passages, and what is needed to trust both.

- ``index.faiss``: the vectors, any FAISS index type, compared by inner product; where they were built in parts,
  ``index-00000.faiss`` and so on, which FAISS searches side by side;
- ``passages.arrow`` and ``ids.npy``: the passages in the same order, by row and by id (`PassageStore`);
- ``index.json``: encoder and its fingerprint, dimension, factory string, count, how thoroughly to search and the recall
  that was measured so, size and sha256 of the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import file_digest, refuse_pickles
from genpoe_plugin.retrieval.faiss_setup import faiss, faiss_reason, set_parameters
from genpoe_plugin.retrieval.passage_store import IDS, PASSAGES, PassageStore

if TYPE_CHECKING:
    pass

FORMAT, VERSION = "genpoe-index", 2
MANIFEST, VECTORS = "index.json", "index.faiss"
FIELDS = {
    "encoder": str,
    "fingerprint": str,
    "pooling": str,
    "dimension": int,
    "factory": str,
    "count": int,
    "vectors": list,
    "search": dict,
    "files": dict,
}
# What every FAISS file begins with, after the four letters of its type: dimension and number of vectors.
HEADER = struct.Struct("<4siq")
GPU_RESULTS = 2048  # that FAISS finds on a GPU for one question, at most

_log = logging.getLogger(__name__)


class PassageIndex:
    """Passages that can be searched by vector; rows count from 0, in the order of the passages."""

    def __init__(self, directory: Path, manifest: dict[str, Any], passages: PassageStore) -> None:
        self.directory, self.manifest = directory, manifest
        self._passages = passages

    @classmethod
    def load(cls, directory: str | Path) -> PassageIndex:
        """Open an index; sizes and headers are checked, which takes no time at any size. Its vectors are mapped into
        memory when it is first searched.

        Raises:
            InputError: it is not an index, or not a whole one.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        passages = PassageStore.open(directory)
        headers = [_read_header(directory / name) for name in manifest["vectors"]]
        found = {
            "vectors": sum(count for _, count in headers),
            "passages": len(passages),
            "dimensions": sorted({dimension for dimension, _ in headers}),
        }
        expected = {"vectors": manifest["count"], "passages": manifest["count"], "dimensions": [manifest["dimension"]]}
        if found != expected:
            raise InputError(f"{directory}: damaged index ({found} where {MANIFEST} says {expected}); build it again")
        return cls(directory, manifest, passages)

    @property
    def encoder_name(self) -> str:
        return self.manifest["encoder"]

    @property
    def encoder_fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def dimension(self) -> int:
        return self.manifest["dimension"]

    @property
    def fingerprint(self) -> str:
        """Of all that decides a search: encoder, vectors, passages, and how thoroughly it is searched."""
        parts = [self.encoder_fingerprint, self.manifest["files"], self.manifest["search"]["parameters"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.manifest["count"]

    def passage(self, row: int) -> Passage:
        """The passage of a row; an ``IndexError`` where there is no such row."""
        return self._passages.passage(row)

    def row(self, identifier: str) -> int:
        """The row of the passage with this id; a ``KeyError`` where there is none."""
        return self._passages.row(identifier)

    @cached_property
    def vectors(self) -> Any:
        """The FAISS index, with the parameters of the manifest."""
        index = open_vectors([self.directory / name for name in self.manifest["vectors"]])
        set_parameters(index, self.manifest["search"]["parameters"])
        return index

    @cached_property
    def _on_gpus(self) -> Any | None:
        """A copy on all GPUs, where FAISS has any and they can search this type of index."""
        if not faiss.get_num_gpus():
            return None
        try:
            return faiss.index_cpu_to_all_gpus(self.vectors)
        except RuntimeError as error:
            _log.warning("%s: searched on the CPU (%s)", self.directory, faiss_reason(error))
            return None

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` best passages (all, if there are fewer) of each question vector, best first, ties by row.

        Args:
            vectors: float [n, dimension].

        Returns:
            Scores (inner products), float32 [n, k], and rows, int64 [n, k]; approximate index types may find fewer,
            and then end in rows of -1.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise InputError(f"{self.directory}: vectors of {self.dimension} numbers; searched for {vectors.shape}")
        if k < 1:
            raise InputError(f"{k} passages asked for; at least 1 is needed")
        k = min(k, len(self))
        scores = np.empty((len(vectors), k), np.float32)
        rows = np.empty((len(vectors), k), np.int64)
        # Among passages that tie for the last places FAISS keeps any, and ties are common, since corpora repeat
        # themselves. So look beyond the k-th, and further for the questions whose tie has not ended there.
        fetch, pending = k + 1, np.arange(len(vectors))
        while pending.size:
            fetch = min(fetch, len(self))
            on_gpus = self._on_gpus if fetch <= GPU_RESULTS else None
            found_scores, found_rows = (on_gpus or self.vectors).search(vectors[pending], fetch)
            order = np.lexsort((found_rows, -found_scores))
            found_scores = np.take_along_axis(found_scores, order, axis=1)
            found_rows = np.take_along_axis(found_rows, order, axis=1)
            scores[pending], rows[pending] = found_scores[:, :k], found_rows[:, :k]
            open_end = (found_scores[:, k - 1] == found_scores[:, -1]) & (found_rows[:, -1] >= 0)
            pending = pending[open_end & (fetch < len(self))]
            fetch *= 2
        return scores, rows

    def verify(self) -> None:
        """Read every byte; an ``InputError`` names the first file that is not as it was written."""
        for name, file in self.manifest["files"].items():
            if file_digest(self.directory / name) != file["sha256"]:
                raise InputError(f"{self.directory / name}: damaged (sha256 differs); build the index again")


def open_vectors(paths: Sequence[Path]) -> Any:
    """The FAISS index in some files, mapped into memory as far as its type allows.

    Raises:
        InputError: a file is damaged.
    """
    parts = []
    for path in paths:
        try:
            parts.append(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"{path}: damaged ({faiss_reason(error)}); build the index again") from error
    if len(parts) == 1:
        return parts[0]
    together = faiss.IndexShards(parts[0].d, False, True)
    for part in parts:
        together.add_shard(part)
    return together


def _read_header(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        _, dimension, count = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))
    return dimension, count


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    refuse_pickles(directory)
    if not path.is_file():
        raise InputError(f"{directory}: not an index (no {MANIFEST}); make one with `genpoe index build`")
    try:
        manifest = json.loads(path.read_text())
        format_and_version = manifest.get("format"), manifest.get("version")
        complete = all(isinstance(manifest.get(field), kind) for field, kind in FIELDS.items())
        names = [*manifest["vectors"], PASSAGES, IDS] if complete else []
        sizes = {name: manifest["files"][name]["bytes"] for name in names}
        complete = complete and isinstance(manifest["search"]["parameters"], dict)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the description of an index; build it again") from error
    if format_and_version != (FORMAT, VERSION):
        found = f"version {format_and_version[1]}" if format_and_version[0] == FORMAT else "something else"
        raise InputError(f"{path}: {found} where version {VERSION} of an index is needed; build it again")
    if not complete:
        raise InputError(f"{path}: not the description of an index; build it again")
    for name, size in sizes.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size:,} bytes" if file.is_file() else "no file"
            raise InputError(f"{file}: {found} where {size:,} bytes were written; build the index again")
    return manifest
