"""Choose the FAISS index type for a number of passages and an amount of memory, by computing sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.faiss_setup import faiss, faiss_reason, make_index

EXACT_UP_TO = 300_000  # passages; exact search over them takes milliseconds
# Inverted lists, each with its smallest number of passages; fewer lists if training them would exceed the memory.
INVERTED_LISTS = (
    (10_000_000, "IVF65536_HNSW32"),
    (5_000_000, "IVF16384_HNSW32"),
    (1_000_000, "IVF4096"),
    (40_000, "IVF1024"),
    (10_000, "IVF256"),
)
# Vectors for the second, finer comparison of the best results, best first, each with its description.
REFINEMENTS = (
    ("SQfp16", "16-bit vectors"),
    ("SQ8", "8-bit vectors"),
    ("SQ6", "6-bit vectors"),
    ("SQ4", "4-bit vectors"),
)
POINTS_PER_CENTROID = 39  # FAISS's own minimum for k-means; it warns below
MIN_TRAINING_ROWS = 2**16  # largest number of rows that OPQ uses
CHUNK = 2**14  # rows that are converted, added and searched at a time
PROCESS = 800_000_000  # bytes of Python with its libraries, after an encoder has run


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen index type.

    Attributes:
        factory: FAISS factory string.
        bytes: size of the index files.
        peak: peak memory in bytes of the process that builds and tunes the index.
        reason: the reason for the choice, in one line.
    """

    factory: str
    bytes: int
    peak: int
    reason: str


def choose_factory(count: int, dimension: int, memory: int | None = None) -> Choice:
    """Choose the index type with the highest recall that can be built and searched within ``memory``.

    Args:
        count: number of vectors.
        dimension: dimension of the vectors, which are compared by inner product.
        memory: memory limit in bytes; None for no limit.

    Raises:
        InputError: no index type fits the memory.
    """
    least = None
    for factory, kind in _candidates(count, dimension):
        choice = describe_factory(factory, count, dimension, kind)
        if memory is None or choice.peak <= memory:
            return choice
        least = choice if least is None or choice.peak < least.peak else least
    assert memory is not None and least is not None
    raise InputError(
        f"{gigabytes(memory)} of memory: too little for {count:,} passages (dimension {dimension:,}); {least.factory}"
        f" needs {gigabytes(least.peak)}; give more memory, or --factory {least.factory} with this memory, which is"
        " built in parts and slower to search"
    )


def describe_factory(factory: str, count: int, dimension: int, kind: str = "as given") -> Choice:
    """The sizes of a given index type.

    Args:
        factory: FAISS factory string.
        count: number of vectors.
        dimension: dimension of the vectors.
        kind: description of the type, for the reason.

    Raises:
        InputError: FAISS does not accept the factory string.
    """
    index = make_index(factory, dimension)
    size = _size(index, count)
    peak = max(filling_bytes(index, count), PROCESS + _training_bytes(index, training_rows(index, count)))
    reason = (
        f"{count:,} passages (dimension {dimension:,}), {kind}: {gigabytes(size.disk)} on disk, at most"
        f" {gigabytes(peak)} of memory"
    )
    return Choice(factory, size.disk, peak, reason)


def index_bytes(factory: str, count: int, dimension: int) -> int:
    """Estimated bytes of the FAISS file of an index with ``count`` vectors, within about one percent for large indexes.

    Lists with 4-bit codes end in blocks of 32; the estimate counts half a block per list.

    Raises:
        InputError: FAISS does not accept the factory string.
    """
    return _size(make_index(factory, dimension), count).disk


def filling_bytes(index: Any, count: int) -> int:
    """Memory in bytes of a process that fills an index with ``count`` vectors and searches it."""
    return PROCESS + _size(index, count).memory + CHUNK * 12 * index.d


def training_rows(index: Any, count: int, memory: int | None = None) -> int:
    """The number of ``count`` vectors to train an index on: as many as its k-means needs and ``memory`` allows."""
    rows = max(MIN_TRAINING_ROWS, POINTS_PER_CENTROID * centroids(index))
    if memory is not None:
        fixed, each = _training_bytes(index, 0), _training_bytes(index, 1) - _training_bytes(index, 0)
        rows = min(rows, max(0, memory - PROCESS - fixed) // each)
    return min(rows, count)


def centroids(index: Any) -> int:
    """The largest number of centroids of any k-means in an index; 0 without k-means."""
    counts = [0]
    for part in _parts(index):
        if hasattr(part, "pq"):
            counts.append(part.pq.ksub)
        if isinstance(part, faiss.IndexIVF):
            counts.append(part.nlist)
    return max(counts)


def train(factory: str, index: Any, vectors: np.ndarray) -> None:
    """Train an index on vectors, float32 ``[n, dimension]``, with FAISS's GPUs if there are any.

    An OPQ rotation is trained for the codes that follow it. FAISS's factory would train it for 8-bit codes, which takes
    longer and is worse for 4-bit codes: recall@20 is 0.70 instead of 0.84 (200,000 vectors of dimension 768,
    OPQ96_384,IVF1024,PQ96x4fs, all lists).

    Args:
        factory: FAISS factory string, for error messages.
        index: an index of `make_index`.
        vectors: training vectors.

    Raises:
        InputError: FAISS cannot train the index.
    """
    rotations, clusterings = [], []  # keeps objects alive that FAISS only points to
    for part in _parts(index):
        if isinstance(part, faiss.IndexPreTransform):
            transforms = [faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size())]
            codes = [inner.pq for inner in _parts(part.index) if hasattr(inner, "pq")]
            for rotation in transforms:
                if isinstance(rotation, faiss.OPQMatrix) and codes and codes[0].M == rotation.M:
                    rotations.append((rotation, faiss.ProductQuantizer(rotation.d_out, rotation.M, codes[0].nbits)))
        if isinstance(part, faiss.IndexIVF) and faiss.get_num_gpus():
            clusterings.append((part, faiss.index_cpu_to_all_gpus(faiss.IndexFlat(part.d, part.metric_type))))
            part.clustering_index = clusterings[-1][1]
        for learner in [part, *([part.pq] if hasattr(part, "pq") else [])]:
            if hasattr(learner, "cp"):
                learner.cp.min_points_per_centroid = 1  # silences repeated warnings about few training vectors
    for rotation, codes_of_rotation in rotations:
        codes_of_rotation.cp.min_points_per_centroid = 1
        rotation.pq = codes_of_rotation
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise InputError(f"factory {factory!r}: FAISS cannot train it ({faiss_reason(error)})") from error
    finally:
        for rotation, _ in rotations:
            rotation.pq = None
        for part, _ in clusterings:
            part.clustering_index = None


def gigabytes(size: int) -> str:
    """A number of bytes as text, in gigabytes."""
    return f"{size / 1e9:.1f} GB"


def _candidates(count: int, dimension: int) -> Iterator[tuple[str, str]]:
    """Factory strings with their descriptions, best first."""
    if count <= EXACT_UP_TO or dimension < 8:
        yield "Flat", "exact search"
    if dimension < 8:
        return
    # 4-bit codes for 4 dimensions each, after a rotation that reduces wide vectors to their most important dimensions.
    rotated = min(dimension, max(384, dimension // 2)) // 8 * 8
    codes = rotated // 4
    lists = [name for least, name in INVERTED_LISTS if least <= count]
    for refinement, kind in REFINEMENTS:
        for name in lists:
            yield f"OPQ{codes}_{rotated},{name},PQ{codes}x4fs,Refine({refinement})", f"short codes, then {kind}"


@dataclass(frozen=True, slots=True)
class _Size:
    disk: int
    memory: int

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.disk + other.disk, self.memory + other.memory)


def _size(index: Any, count: int) -> _Size:
    """Bytes of an index with ``count`` vectors.

    Lists and graphs grow by doubling, so they may need twice their size in memory. So do lists of 4-bit codes during
    search, because FAISS reads them instead of memory-mapping them.
    """
    part = faiss.downcast_index(index)  # does not keep its argument alive
    if isinstance(part, faiss.IndexPreTransform):
        inner = _size(part.index, count)
        for i in range(part.chain.size()):
            transform = part.chain.at(i)
            inner += _exactly(4 * (transform.d_in + 1) * transform.d_out)
        return inner
    if isinstance(part, faiss.IndexRefine):
        return _size(part.base_index, count) + _size(part.refine_index, count)
    if isinstance(part, faiss.IndexIVF):
        quantiser = _size(part.quantizer, part.nlist) + _exactly(_tables(part))
        padded = count
        if isinstance(part, faiss.IndexIVFFastScan):
            padded += min(part.nlist, count) * part.bbs // 2
        disk = padded * part.code_size + 8 * (count + part.nlist)
        return quantiser + _Size(disk, 2 * disk)
    if isinstance(part, faiss.IndexHNSW):
        neighbours = part.hnsw.cum_nneighbor_per_level
        chances = part.hnsw.assign_probas
        links = sum(chances.at(level) * neighbours.at(level + 1) for level in range(chances.size()))
        disk = round(count * (4 * links + 8 + 4))
        storage = _size(part.storage, count)
        return _Size(storage.disk + disk, 2 * (storage.disk + disk))
    # All other types have one code per vector, possibly padded to blocks; unknown types are counted as float32.
    code_size = part.code_size if hasattr(part, "code_size") else 4 * part.d
    rows = -(-count // part.bbs) * part.bbs if isinstance(part, faiss.IndexFastScan) else count
    return _exactly(rows * code_size + _tables(part))


def _tables(index: Any) -> int:
    """Bytes of the tables of product and scalar quantisers in an index."""
    return 4 * index.d * (index.pq.ksub if hasattr(index, "pq") else 2 if hasattr(index, "sq") else 0)


def _exactly(size: int) -> _Size:
    return _Size(size, size)


def _training_bytes(index: Any, rows: int) -> int:
    """Bytes for training: float32 vectors before and after each transformation, and the buffers of OPQ."""
    widths, opq = [index.d], 0
    for part in _parts(index):
        if isinstance(part, faiss.IndexPreTransform):
            transforms = [faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size())]
            widths += [transform.d_out for transform in transforms]
            opq = sum(isinstance(transform, faiss.OPQMatrix) for transform in transforms)
    return 4 * rows * sum(widths) + opq * 4 * MIN_TRAINING_ROWS * 4 * index.d


def _parts(index: Any) -> Iterator[Any]:
    """An index and all its component indexes."""
    part = faiss.downcast_index(index)  # does not keep its argument alive
    yield part
    for name in ("index", "base_index", "refine_index", "quantizer", "storage"):
        if isinstance(inner := getattr(part, name, None), faiss.Index):
            yield from _parts(inner)
