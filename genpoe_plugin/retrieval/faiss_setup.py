"""FAISS with settings for fast exact search, and some helpers. Import ``faiss`` only from this module.

Two defaults of faiss-cpu make exact search fifteen times slower on recent CPUs (77 ms instead of 5 ms per query over
300,000 vectors of 768 dimensions):

- Its bundled OpenBLAS does not recognise these CPUs and uses a kernel of 2006. OpenBLAS reads ``OPENBLAS_CORETYPE``
  while it loads, so the variable is set before the import and removed afterwards. It is set only if the CPU supports
  the SkylakeX kernels and the user has not set it.
- The number of queries from which FAISS uses BLAS at all is 128,000 in the wheels; FAISS's own default is 20.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from genpoe_plugin.errors import InputError


def _has_avx512() -> bool:
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return False
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags.split())


_set_here = "OPENBLAS_CORETYPE" not in os.environ and _has_avx512()
if _set_here:
    os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"

import faiss as _faiss  # noqa: E402

if _set_here:
    del os.environ["OPENBLAS_CORETYPE"]

MAPPED = 1 << 26  # bytes from which a file of vectors is memory-mapped
TABLES = 1 << 31  # bytes of the largest table that FAISS computes for the distances of an IVFPQ index
faiss: Any = _faiss  # Any, because FAISS's type stubs are incomplete and partly wrong
faiss.cvar.distance_compute_blas_threshold = 20


def make_index(factory: str, dimension: int) -> Any:
    """An empty FAISS index for the inner product.

    Args:
        factory: FAISS factory string.
        dimension: dimension of the vectors.

    Raises:
        InputError: FAISS does not accept the factory string.
    """
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"factory {factory!r}: FAISS cannot create it ({faiss_reason(error)})") from error


def read_faiss(path: Path, flags: int = 0) -> Any:
    """Read a FAISS index from a file. FAISS reads it in C++, so files of unknown origin are a risk that remains.

    Args:
        path: the file.
        flags: FAISS's flags, such as ``IO_FLAG_MMAP_IFC``.

    Raises:
        InputError: it needs more memory than it may have.
        RuntimeError: FAISS cannot read it.
    """
    # A damaged file may state more bytes than it has, for which FAISS would allocate memory: its limit is a terabyte,
    # and none for the number of lists of an IVF index, hence the limit of the process. Tables that it computes for some
    # types while it reads count as well; it makes none of more than TABLES.
    size = path.stat().st_size
    most = size + TABLES
    limited = hasattr(faiss, "set_deserialization_vector_byte_limit")  # newer than faiss-cpu 1.11
    with _reading:
        before = faiss.get_deserialization_vector_byte_limit() if limited else 0
        try:
            if limited:
                faiss.set_deserialization_vector_byte_limit(most)
            with _memory_limit(most) if size < MAPPED and not _uses_cuda() else nullcontext(), suppress(MemoryError):
                return faiss.read_index(str(path), flags)
        finally:
            if limited:
                faiss.set_deserialization_vector_byte_limit(before)
    raise InputError(
        f"{path}: needs more memory than the {most:,} bytes that it may have, or than there are; free memory, or build "
        "the index again if the file is damaged"
    )


_reading = Lock()  # the limits are those of the whole process


def _uses_cuda() -> bool:
    """Whether this process has a GPU's drivers, which reserve much more address space than they use."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


@contextmanager
def _memory_limit(count: int) -> Iterator[None]:
    """Let the process have ``count`` more bytes of address space in the block, where the system can limit it.

    It holds for all threads, so the block must be short.
    """
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([used + count, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def faiss_reason(error: Exception) -> str:
    """The end of a FAISS error message, without its C++ signatures and source paths."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split())


def set_parameters(index: Any, parameters: Mapping[str, float]) -> None:
    """Set search parameters of a FAISS index of any type, and of all its shards."""
    space = faiss.ParameterSpace()
    for part in parts(index):
        for name, value in parameters.items():
            space.set_index_parameter(part, name, value)


def parts(index: Any) -> list[Any]:
    """The shards of a FAISS index that is split into several; otherwise the index itself."""
    if isinstance(index, faiss.IndexShards):
        return [faiss.downcast_index(index.at(i)) for i in range(index.count())]
    return [index]
