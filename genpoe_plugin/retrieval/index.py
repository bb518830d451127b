"""The passage index: a directory with the vectors, the passages, and a manifest to check both.

- ``index.faiss``: the vectors, in any FAISS index type, for the inner product. If they were built in parts, the files
  are ``index-00000.faiss`` and so on, and FAISS searches them as shards;
- ``passages.arrow``: the passages in the same order (`PassageStore`);
- ``index.json``, the manifest: encoder with its options and fingerprint, dimension, factory string, number of passages,
  search parameters with their measured recall, and size and SHA-256 of the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.encoder_options import EncoderOptions, in_words, options_of
from genpoe_plugin.retrieval.faiss_setup import MAPPED, faiss, faiss_reason, read_faiss, set_parameters
from genpoe_plugin.retrieval.manifest import DENSE, MANIFEST, invalid, read_manifest, retriever_kind, verify_files
from genpoe_plugin.retrieval.passage_store import PASSAGES, PassageStore

VECTORS = "index.faiss"
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
# The header of every FAISS file: four letters for its type, the dimension, and the number of vectors.
HEADER = struct.Struct("<4siq")
LARGE = 2**12  # of a search parameter: those of any size are below this in small indexes
MAX_GPU_RESULTS = 2048  # FAISS returns at most this many results per query on a GPU

_log = logging.getLogger(__name__)


class PassageIndex:
    """An index of passages that is searched with question vectors.

    Rows are counted from 0, in the order of the passages.

    Args:
        directory: directory of the index.
        manifest: content of ``index.json``.
        passages: the passages of the index.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], passages: PassageStore) -> None:
        self.directory, self.manifest = directory, manifest
        self.passages = passages

    @classmethod
    def load(cls, directory: str | Path) -> PassageIndex:
        """Open an index and check the sizes and headers of its files.

        The vectors are read, or memory-mapped, at the first search.

        Raises:
            InputError: the directory is not an index, or the index is incomplete or damaged.
        """
        directory = Path(directory)
        manifest = _checked_manifest(directory)
        passages = PassageStore.open(directory)
        headers = [_read_header(directory / name) for name in manifest["vectors"]]
        actual = {
            "vectors": sum(count for _, count in headers),
            "passages": len(passages),
            "dimensions": sorted({dimension for dimension, _ in headers}),
        }
        expected = {"vectors": manifest["count"], "passages": manifest["count"], "dimensions": [manifest["dimension"]]}
        if actual != expected:
            raise InputError(f"{directory}: damaged index ({actual} where {MANIFEST} says {expected}); build it again")
        return cls(directory, manifest, passages)

    @property
    def encoder_name(self) -> str:
        """Name or path of the encoder."""
        return self.manifest["encoder"]

    @property
    def encoder_fingerprint(self) -> str:
        """Fingerprint of the encoder; see `Encoder`."""
        return self.manifest["fingerprint"]

    @property
    def encoder_options(self) -> EncoderOptions:
        """Prompts and cut of the encoder."""
        return options_of(self.manifest)

    @property
    def encoder_words(self) -> str:
        """The encoder with its options, for error messages."""
        return in_words(self.encoder_name, self.encoder_fingerprint, self.encoder_options)

    @property
    def dimension(self) -> int:
        """Dimension of the vectors."""
        return self.manifest["dimension"]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides a search: encoder, vectors, passages and search parameters."""
        parts = [self.encoder_fingerprint, self.manifest["files"], self.manifest["search"]["parameters"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.manifest["count"]

    def passage(self, row: int) -> Passage:
        """The passage of a row.

        Raises:
            IndexError: there is no such row.
        """
        return self.passages.passage(row)

    @cached_property
    def vectors(self) -> Any:
        """The FAISS index, with the search parameters of the manifest."""
        index = open_vectors([self.directory / name for name in self.manifest["vectors"]])
        try:
            set_parameters(index, self.manifest["search"]["parameters"])
        except (RuntimeError, TypeError) as error:
            raise invalid(self.directory) from error
        if (index.d, index.ntotal) != (self.dimension, len(self)):
            raise self._damaged(f"{index.ntotal:,} vectors of {index.d} dimensions")
        return index

    @cached_property
    def _on_gpus(self) -> Any | None:
        """A copy of the FAISS index on all GPUs; None if there are none or they do not support its type."""
        if not faiss.get_num_gpus():
            return None
        try:
            return faiss.index_cpu_to_all_gpus(self.vectors)
        except RuntimeError as error:
            _log.warning("%s: searched on the CPU (%s)", self.directory, faiss_reason(error))
            return None

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search the ``k`` best passages of each question vector, best first; the row breaks ties.

        Args:
            vectors: question vectors, float ``[n, dimension]``.
            k: number of passages; larger values are reduced to the size of the index.

        Returns:
            Scores (inner products), float32 ``[n, k]``, and rows, int64 ``[n, k]``. Approximate index types may find
            fewer passages; the remaining rows are -1.

        Raises:
            InputError: the vectors have another dimension, or ``k`` is below 1.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise InputError(
                f"{self.directory}: the index has vectors of dimension {self.dimension}, the queries have shape "
                f"{vectors.shape}"
            )
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        k = min(k, len(self))
        scores = np.empty((len(vectors), k), np.float32)
        rows = np.empty((len(vectors), k), np.int64)
        # FAISS returns any of the passages that tie for the last place, and ties are common because corpora contain
        # duplicates. So fetch more than k, and still more for questions whose tie continues there.
        fetch, pending = k + 1, np.arange(len(vectors))
        while pending.size:
            fetch = min(fetch, len(self))
            on_gpus = self._on_gpus if fetch <= MAX_GPU_RESULTS else None
            try:
                found_scores, found_rows = (on_gpus or self.vectors).search(vectors[pending], fetch)
            except (RuntimeError, MemoryError) as error:
                raise self._damaged(faiss_reason(error)) from error
            if found_rows.max(initial=-1) >= len(self):
                raise self._damaged(f"it has no row {found_rows.max():,}")
            order = np.lexsort((found_rows, -found_scores))
            found_scores = np.take_along_axis(found_scores, order, axis=1)
            found_rows = np.take_along_axis(found_rows, order, axis=1)
            scores[pending], rows[pending] = found_scores[:, :k], found_rows[:, :k]
            open_end = (found_scores[:, k - 1] == found_scores[:, -1]) & (found_rows[:, -1] >= 0)
            pending = pending[open_end & (fetch < len(self))]
            fetch *= 2
        return scores, rows

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self.directory}: damaged index ({reason}); build it again")

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest.

        Raises:
            InputError: a file is damaged; the message names it.
        """
        verify_files(self.directory, self.manifest)


def open_vectors(paths: Sequence[Path]) -> Any:
    """Open a FAISS index from its files; large files are memory-mapped as far as their type allows.

    FAISS crashes on some damaged files that it maps and refuses them when it reads them, so small files are read.

    Raises:
        InputError: a file is damaged.
    """
    parts = []
    for path in paths:
        try:
            large = path.stat().st_size >= MAPPED
            parts.append(read_faiss(path, faiss.IO_FLAG_MMAP_IFC if large else 0))
        except RuntimeError as error:
            raise InputError(f"{path}: damaged ({faiss_reason(error)}); build the index again") from error
    if len(parts) == 1:
        return parts[0]
    joined = faiss.IndexShards(parts[0].d, False, True)
    for part in parts:
        joined.add_shard(part)
    return joined


def _read_header(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        _, dimension, count = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))
    return dimension, count


def _can_be_set(parameters: Any, count: int) -> bool:
    """Whether search parameters are numbers that do not make FAISS allocate memory for more than all passages."""
    numbers = isinstance(parameters, dict) and all(isinstance(value, int | float) for value in parameters.values())
    return numbers and all(0 <= value <= max(count, LARGE) for value in parameters.values())


def _checked_manifest(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    if (kind := retriever_kind(manifest)) != DENSE:
        raise InputError(f"{directory}: an index of {kind}, which has no vectors")
    complete = all(isinstance(manifest.get(field), kind) for field, kind in FIELDS.items())
    if (
        not complete
        or not all(isinstance(name, str) for name in manifest["vectors"])
        or not {*manifest["vectors"], PASSAGES} <= manifest["files"].keys()
        or min(len(manifest["vectors"]), manifest["count"], manifest["dimension"]) < 1
        or not _can_be_set(manifest["search"].get("parameters"), manifest["count"])
    ):
        raise invalid(directory)
    try:
        options_of(manifest)
    except TypeError as error:
        raise invalid(directory) from error
    return manifest
