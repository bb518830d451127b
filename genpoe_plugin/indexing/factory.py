"""Which FAISS index type for how many passages and how much memory, by arithmetic on bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.faiss_setup import faiss, faiss_reason, make_index

EXACT_UP_TO = 300_000  # passages that are searched one by one in milliseconds
# Inverted lists, and from how many passages on; fewer where training them would not fit.
INVERTED_LISTS = (
    (10_000_000, "IVF65536_HNSW32"),
    (5_000_000, "IVF16384_HNSW32"),
    (1_000_000, "IVF4096"),
    (40_000, "IVF1024"),
    (10_000, "IVF256"),
)
# What the best of the first, coarse look are compared by, best first, with what it is called.
REFINEMENTS = (
    ("SQfp16", "16-bit vectors"),
    ("SQ8", "8-bit vectors"),
    ("SQ6", "6-bit vectors"),
    ("SQ4", "4-bit vectors"),
)
POINTS_PER_CENTROID = 39  # FAISS's own minimum for k-means; with fewer it warns
MIN_TRAINING_ROWS = 2**16  # what OPQ looks at, at most
CHUNK = 2**14  # rows that are converted, added and searched at a time
PROCESS = 800_000_000  # Python with its libraries, after an encoder has run in it


@dataclass(frozen=True, slots=True)
class Choice:
    """A FAISS factory string with the ``bytes`` of its files and the ``peak`` bytes of memory of the process that
    builds and tunes it, and the ``reason`` for it in one line."""

    factory: str
    bytes: int
    peak: int
    reason: str


def choose_factory(count: int, dimension: int, memory: int | None = None) -> Choice:
    """The index type for ``count`` vectors of ``dimension`` numbers, compared by inner product: the one that finds
    most of those that can be built and searched within ``memory`` bytes (None: any).

    Raises:
        InputError: none can.
    """
    least = None
    for factory, kind in _candidates(count, dimension):
        choice = describe_factory(factory, count, dimension, kind)
        if memory is None or choice.peak <= memory:
            return choice
        least = choice if least is None or choice.peak < least.peak else least
    assert memory is not None and least is not None
    raise InputError(
        f"{gigabytes(memory)} of memory: too little for {count:,} passages of {dimension:,} numbers; {least.factory}"
        f" takes {gigabytes(least.peak)}; give more memory, or --factory {least.factory} with this much, which is built"
        " in parts, slower to search"
    )


def describe_factory(factory: str, count: int, dimension: int, kind: str = "as given") -> Choice:
    """What an index type takes; ``kind`` says in the reason what it is.

    Raises:
        InputError: FAISS cannot make it.
    """
    index = make_index(factory, dimension)
    size = _size(index, count)
    peak = max(filling_bytes(index, count), PROCESS + _training_bytes(index, training_rows(index, count)))
    reason = (
        f"{count:,} passages of {dimension:,} numbers, {kind}: {gigabytes(size.disk)}, and"
        f" {gigabytes(peak)} of memory at most"
    )
    return Choice(factory, size.disk, peak, reason)


def index_bytes(factory: str, count: int, dimension: int) -> int:
    """The bytes of the FAISS file of an index with ``count`` vectors, to about a percent for large ones; the lists of
    types with 4-bit codes end in blocks of 32, which is counted as half a block a list.

    Raises:
        InputError: FAISS cannot make such an index.
    """
    return _size(make_index(factory, dimension), count).disk


def filling_bytes(index: Any, count: int) -> int:
    """The memory of the process that fills an index with ``count`` vectors, and searches it."""
    return PROCESS + _size(index, count).memory + CHUNK * 12 * index.d


def training_rows(index: Any, count: int, memory: int | None = None) -> int:
    """How many of ``count`` vectors an index is trained on: what its k-means needs, as far as ``memory`` goes."""
    rows = max(MIN_TRAINING_ROWS, POINTS_PER_CENTROID * centroids(index))
    if memory is not None:
        fixed, each = _training_bytes(index, 0), _training_bytes(index, 1) - _training_bytes(index, 0)
        rows = min(rows, max(0, memory - PROCESS - fixed) // each)
    return min(rows, count)


def centroids(index: Any) -> int:
    """The largest number of centroids that any k-means in an index looks for; 0 if there is none."""
    counts = [0]
    for part in _parts(index):
        if hasattr(part, "pq"):
            counts.append(part.pq.ksub)
        if isinstance(part, faiss.IndexIVF):
            counts.append(part.nlist)
    return max(counts)


def train(factory: str, index: Any, vectors: np.ndarray) -> None:
    """Train an index of `make_index` on float32 [n, dimension], on GPUs where FAISS has any.

    An OPQ rotation is learned for the codes that follow it. FAISS's factory has it learned for codes of 8 bits, which
    takes longer and, before codes of 4 bits, finds far less: alone 0.70 of the best 20, this way 0.84 (200,000 vectors
    of 768, OPQ96_384,IVF1024,PQ96x4fs, all lists).

    Raises:
        InputError: FAISS cannot.
    """
    rotations, clusterings = [], []  # with what FAISS points to and does not keep alive
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
                learner.cp.min_points_per_centroid = 1  # else it says again and again on how few it is trained
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
    return f"{size / 1e9:.1f} GB"


def _candidates(count: int, dimension: int) -> Iterator[tuple[str, str]]:
    """Factory strings with what they are called, best first."""
    if count <= EXACT_UP_TO or dimension < 8:
        yield "Flat", "exact search"
    if dimension < 8:
        return
    # Codes of 4 bits for 4 numbers each, after a rotation that keeps what matters most of wide vectors.
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
    """Bytes of an index of ``count`` vectors.

    Lists and graphs grow by doubling, so they may take twice their size in memory. So do lists of 4-bit codes when they
    are searched: FAISS does not map them from the file, but reads them.
    """
    part = faiss.downcast_index(index)  # which does not keep its argument alive
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
    # What is left holds a code for each vector: as such, rounded up to blocks, or at least counted as if it did.
    code_size = part.code_size if hasattr(part, "code_size") else 4 * part.d
    rows = -(-count // part.bbs) * part.bbs if isinstance(part, faiss.IndexFastScan) else count
    return _exactly(rows * code_size + _tables(part))


def _tables(index: Any) -> int:
    """What product and scalar quantisers of an index have learned."""
    return 4 * index.d * (index.pq.ksub if hasattr(index, "pq") else 2 if hasattr(index, "sq") else 0)


def _exactly(size: int) -> _Size:
    return _Size(size, size)


def _training_bytes(index: Any, rows: int) -> int:
    """Float32 vectors before and after each transformation, and what OPQ computes with."""
    widths, opq = [index.d], 0
    for part in _parts(index):
        if isinstance(part, faiss.IndexPreTransform):
            transforms = [faiss.downcast_VectorTransform(part.chain.at(i)) for i in range(part.chain.size())]
            widths += [transform.d_out for transform in transforms]
            opq = sum(isinstance(transform, faiss.OPQMatrix) for transform in transforms)
    return 4 * rows * sum(widths) + opq * 4 * MIN_TRAINING_ROWS * 4 * index.d


def _parts(index: Any) -> Iterator[Any]:
    """An index and all that it is made of."""
    part = faiss.downcast_index(index)  # which does not keep its argument alive
    yield part
    for name in ("index", "base_index", "refine_index", "quantizer", "storage"):
        if isinstance(inner := getattr(part, name, None), faiss.Index):
            yield from _parts(inner)
