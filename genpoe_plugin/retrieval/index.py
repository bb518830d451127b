"""The passage index: a directory with the vectors, the passages, and what is needed to trust both.

- ``index.faiss``: the vectors, any FAISS index type, compared by inner product, memory-mapped;
- ``passages.arrow``: the passages in the same order, an Arrow file in record batches of `BLOCK`, memory-mapped;
- ``index.json``: encoder and its fingerprint, dimension, factory string, count, size and sha256 of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_directory, check_replaceable
from genpoe_plugin.passages import Passage
from genpoe_plugin.retrieval.faiss_setup import faiss

if TYPE_CHECKING:
    from genpoe_plugin.retrieval.encoder import Encoder

FORMAT, VERSION = "genpoe-index", 1
MANIFEST, VECTORS, PASSAGES = "index.json", "index.faiss", "passages.arrow"
BLOCK = 512  # passages encoded, stored and counted off at a time
SCHEMA = pa.schema([(field, pa.string()) for field in ("id", "title", "text")])
FIELDS = {"encoder": str, "fingerprint": str, "dimension": int, "factory": str, "count": int, "files": dict}

Item = TypeVar("Item")


class PassageIndex:
    """Passages that can be searched by vector; rows count from 0, in the order of the passages."""

    def __init__(self, directory: Path, manifest: dict[str, Any], vectors: Any, passages: Any) -> None:
        self.directory, self.manifest = directory, manifest
        self._vectors, self._passages = vectors, passages

    @classmethod
    def build(
        cls,
        passages: Iterable[Passage],
        encoder: Encoder,
        directory: str | Path,
        *,
        factory: str = "Flat",
        total: int | None = None,
        progress: bool = True,
    ) -> PassageIndex:
        """Encode passages (``total`` of them, for the progress bar) and write the index; all of it, or nothing.

        Raises:
            InputError: there are no passages, an id comes twice, FAISS cannot make the index, or ``directory`` holds
                something that is not an index. An index that is there already is replaced.
        """
        directory = Path(directory).resolve()
        check_replaceable(directory, lambda found: (found / MANIFEST).is_file(), "an index")
        try:
            vectors = faiss.index_factory(encoder.dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(f"factory {factory!r}: not one that FAISS can make ({_reason(error)})") from error
        with atomic_directory(directory) as temporary:
            raw = temporary / "vectors.f32"
            bar = tqdm(desc="encoding passages", total=total, unit="passage", disable=not progress)
            with bar, raw.open("wb") as raw_file, pa.OSFile(str(temporary / PASSAGES), "wb") as passage_file:
                count = _encode(passages, encoder, raw_file, passage_file, bar)
            try:
                _fill(vectors, np.memmap(raw, np.float32, "r", shape=(count, encoder.dimension)))
            except RuntimeError as error:
                raise InputError(f"factory {factory!r}: FAISS cannot fill the index ({_reason(error)})") from error
            raw.unlink()
            faiss.write_index(vectors, str(temporary / VECTORS))
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "encoder": encoder.name,
                "fingerprint": encoder.fingerprint,
                "dimension": encoder.dimension,
                "factory": factory,
                "count": count,
                "files": {
                    name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
                    for name in (VECTORS, PASSAGES)
                },
                "faiss": faiss.__version__,
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return cls.load(directory)

    @classmethod
    def load(cls, directory: str | Path) -> PassageIndex:
        """Open an index; sizes and headers are checked, which takes no time at any size.

        Raises:
            InputError: it is not an index, or not a whole one.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        try:
            vectors = faiss.read_index(str(directory / VECTORS), faiss.IO_FLAG_MMAP_IFC)
            passages = pa.ipc.open_file(pa.memory_map(str(directory / PASSAGES)))
            last_block = passages.get_batch(passages.num_record_batches - 1).num_rows
        except (RuntimeError, MemoryError, OSError, pa.ArrowException) as error:
            raise InputError(f"{directory}: damaged index ({_reason(error)}); build it again") from error
        found = {
            "vectors": vectors.ntotal,
            "passages": (passages.num_record_batches - 1) * BLOCK + last_block,
            "dimension": vectors.d,
        }
        expected = {"vectors": manifest["count"], "passages": manifest["count"], "dimension": manifest["dimension"]}
        if found != expected:
            raise InputError(f"{directory}: damaged index ({found} where {MANIFEST} says {expected}); build it again")
        return cls(directory, manifest, vectors, passages)

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
        """Of all that decides a search: encoder, vectors and passages."""
        parts = [self.encoder_fingerprint, self.manifest["files"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.manifest["count"]

    def passage(self, row: int) -> Passage:
        """The passage of a row; an ``IndexError`` where there is no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} passages")
        block, offset = divmod(int(row), BLOCK)
        return Passage(*(column[offset].as_py() for column in self._passages.get_batch(block).columns))

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
            found_scores, found_rows = self._vectors.search(vectors[pending], fetch)
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
            if _sha256(self.directory / name) != file["sha256"]:
                raise InputError(f"{self.directory / name}: damaged (sha256 differs); build the index again")


def _encode(passages: Iterable[Passage], encoder: Encoder, raw_file: Any, passage_file: Any, bar: tqdm) -> int:
    """Write vectors and passages, block by block; returns how many."""
    positions: dict[str, int] = {}
    with pa.ipc.new_file(passage_file, SCHEMA) as writer:
        for block in _blocks(passages, BLOCK):
            for passage in block:
                position = len(positions) + 1
                if (first := positions.setdefault(passage.id, position)) != position:
                    raise InputError(
                        f"passages {first} and {position} both have the id {passage.id!r}; ids have to be unique"
                    )
            vectors = encoder.encode_passages(block)
            if not np.isfinite(vectors).all():
                bad = block[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
                raise InputError(f"{encoder.name}: the vector of passage {bad.id!r} is not finite; use another encoder")
            vectors.astype(np.float32).tofile(raw_file)
            columns = [pa.array([getattr(passage, field) for passage in block]) for field in SCHEMA.names]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            bar.update(len(block))
    if not positions:
        raise InputError("no passages to index")
    return len(positions)


def _fill(index: Any, vectors: np.ndarray) -> None:
    """Train and fill a FAISS index, and set how thoroughly it is searched; FAISS keeps that in its file."""
    index.train(vectors)
    for start in range(0, len(vectors), 2**16):
        index.add(vectors[start : start + 2**16])
    # FAISS's own defaults, one list and no refinement, find less than half of the best passages.
    if (inverted_lists := faiss.try_extract_index_ivf(index)) is not None:
        inverted_lists.nprobe = max(1, inverted_lists.nlist // 8)
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = 20


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory}: not an index (no {MANIFEST}); make one with `genpoe index build`")
    try:
        manifest = json.loads(path.read_text())
        format_and_version = manifest.get("format"), manifest.get("version")
        complete = all(isinstance(manifest.get(field), kind) for field, kind in FIELDS.items())
        sizes = {name: manifest["files"][name]["bytes"] for name in (VECTORS, PASSAGES)} if complete else {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the description of an index; build it again") from error
    if format_and_version != (FORMAT, VERSION) or not complete:
        raise InputError(f"{path}: not the description of an index of version {VERSION}; build it again")
    for name, size in sizes.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size:,} bytes" if file.is_file() else "no file"
            raise InputError(f"{file}: {found} where {size:,} bytes were written; build the index again")
    return manifest


def _blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """The end of a FAISS message, which begins with C++ signatures and source paths."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split())
