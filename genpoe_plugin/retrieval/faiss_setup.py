"""FAISS with the settings that its exact search needs, and a few helpers; import ``faiss`` from here, and here only.

Two defaults of faiss-cpu cost a factor of fifteen on recent CPUs (77 against 5 ms a query, 300,000 vectors of 768):

- The OpenBLAS that it bundles does not know them and falls back to a kernel of 2006. ``OPENBLAS_CORETYPE`` is read
  while the library loads, so it is set before the import and taken away after it, only where the CPU has what the
  SkylakeX kernels need, and never over a value of the user's.
- From how many queries on it uses BLAS at all: 128,000 in the wheels, 20 in FAISS's own default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
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

faiss: Any = _faiss  # whose type stubs miss or misstate a part of what it has
faiss.cvar.distance_compute_blas_threshold = 20


def make_index(factory: str, dimension: int) -> Any:
    """An empty FAISS index that compares by inner product.

    Raises:
        InputError: FAISS cannot make it.
    """
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"factory {factory!r}: not one that FAISS can make ({faiss_reason(error)})") from error


def faiss_reason(error: Exception) -> str:
    """The end of a FAISS message, which begins with C++ signatures and source paths."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split())


def set_parameters(index: Any, parameters: Mapping[str, float]) -> None:
    """Set parameters of a FAISS index, whatever it is made of."""
    space = faiss.ParameterSpace()
    for part in parts(index):
        for name, value in parameters.items():
            space.set_index_parameter(part, name, value)


def parts(index: Any) -> list[Any]:
    """The indexes that are searched side by side; one, in general."""
    if isinstance(index, faiss.IndexShards):
        return [faiss.downcast_index(index.at(i)) for i in range(index.count())]
    return [index]
