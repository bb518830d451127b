"""Search-time tuning of an approximate index to a recall target, measured against exact search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from genpoe_plugin.indexing.factory import CHUNK
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.indexing.vectors import chunks, gathered, sampled_rows
from genpoe_plugin.retrieval.faiss_setup import faiss, parts, set_parameters

RECALL_AT = 20
QUERIES = 1000
NOISE = 0.5
SEED = 1
# FAISS's names of what can be set after an index is built.
PROBES, BREADTH, COARSE_BREADTH, REFINED = "nprobe", "efSearch", "quantizer_efSearch", "k_factor_rf"
# What a step costs in bytes read, by measurement: the next vector of a list 0.1 ns a byte, one to be refined, anywhere
# in memory, 0.6 to 0.9.
ANYWHERE = 8
SEEN = 20  # vectors that a graph looks at for each that it keeps in view


@dataclass(frozen=True, slots=True)
class Tuning:
    """``parameters`` of FAISS's ``ParameterSpace``, and the recall@``at`` that was measured with them."""

    parameters: dict[str, float]
    recall: float
    at: int


def query_vectors(shards: Shards, number: int = QUERIES) -> np.ndarray:
    """Vectors that are like passages but are none: float32 [number, dimension], fewer where there are few passages.

    Each is a passage's vector, moved half as far as two passages are from each other, in a direction in which they
    do differ: noise in all directions alike would hardly change which vectors are near.
    """
    number = min(number, shards.count)
    passages, some, others = (
        gathered(shards, sampled_rows(shards.count, number, SEED + i))[np.random.default_rng(i).permutation(number)]
        for i in range(3)
    )
    return passages + np.float32(NOISE / math.sqrt(2)) * (some - others)


def nearest(shards: Shards, queries: np.ndarray, at: int = RECALL_AT, *, progress: bool = False) -> list[set[int]]:
    """The rows that exact search finds among the best ``at`` of each query, and those that tie with the last."""
    # Not above, because FAISS has to be loaded by `faiss_setup`.
    from faiss.contrib.exhaustive_search import knn_ground_truth

    at = min(at, shards.count)
    with tqdm(desc="exact search", total=shards.count, unit="passage", disable=not progress) as bar:

        def counted() -> Iterator[np.ndarray]:
            for chunk in chunks(shards, 0, shards.count, CHUNK):
                yield chunk
                bar.update(len(chunk))

        further = min(2 * at, shards.count)
        scores, rows = knn_ground_truth(queries, counted(), further, faiss.METRIC_INNER_PRODUCT)
    return [set(found[line >= line[at - 1]].tolist()) for line, found in zip(scores, rows, strict=True)]


def tune(
    index: Any,
    queries: np.ndarray,
    relevant: Sequence[set[int]],
    recall: float,
    *,
    at: int = RECALL_AT,
    progress: bool = False,
) -> Tuning:
    """The cheapest parameters with which ``index`` reaches a recall, or, if none do, those that reach most.

    Recall@``at`` is the mean over queries of the share of ``relevant`` rows among the ``at`` found. Cost is counted,
    not timed, so the choice repeats.

    Args:
        index: of FAISS; its parameters are changed.
        queries: float32 [n, dimension].
        relevant: of each query, as of `nearest`.
    """
    at = min(at, index.ntotal)
    knobs = _Knobs(index, at)
    best: tuple[float, Tuning] | None = None
    most: Tuning | None = None
    with tqdm(desc="tuning", unit="setting", disable=not progress) as bar:
        least = 0
        for breadth in knobs.breadths:
            position = least
            # Less refinement, or a narrower look at the centroids, needs as many probes or more: so walk along the
            # border of what reaches the recall.
            for refined in knobs.refinements:
                reached = False
                while position < len(knobs.probes) and not reached:
                    parameters = knobs.parameters(knobs.probes[position], refined, breadth)
                    cost = knobs.cost(parameters)
                    if best is not None and cost >= best[0]:
                        break
                    set_parameters(index, parameters)
                    measured = _recall(index.search(queries, at)[1], relevant, at)
                    tuning = Tuning(parameters, measured, at)
                    bar.update()
                    bar.set_postfix_str(f"recall@{at} {measured:.3f}")
                    if most is None or measured > most.recall:
                        most = tuning
                    if reached := measured >= recall:
                        best = cost, tuning
                        least = position if refined == knobs.refinements[0] else least
                    else:
                        position += 1
    assert most is not None
    return best[1] if best is not None else most


class _Knobs:
    """What can be set in an index, from little to much, and what it costs."""

    def __init__(self, index: Any, at: int) -> None:
        first = parts(index)[0]
        space = faiss.ParameterSpace()
        space.initialize(first)
        names = {space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())}
        self.at = at
        self.count, self.dimension = index.ntotal, index.d
        self.lists = faiss.try_extract_index_ivf(first)
        self.name = next((name for name in (PROBES, BREADTH) if name in names), None)
        self.probes: list[int | None] = [None]
        if self.name == PROBES:
            self.probes = [*_steps(1, self.lists.nlist - 1), self.lists.nlist]
        elif self.name == BREADTH:
            self.probes = [*_steps(16, 2048)]
        self.refinements: list[int | None] = [64, 32, 16, 8, 4, 2, 1] if REFINED in names else [None]
        self.breadths: list[int | None] = [4, 2, 1] if COARSE_BREADTH in names else [None]
        self.refined_bytes = first.refine_index.sa_code_size() if isinstance(first, faiss.IndexRefine) else 0

    def parameters(self, probes: int | None, refined: int | None, breadth: int | None) -> dict[str, float]:
        parameters: dict[str, float] = {}
        if self.name is not None and probes is not None:
            parameters[self.name] = probes
            if breadth is not None:
                parameters[COARSE_BREADTH] = breadth * probes
        if refined is not None:
            parameters[REFINED] = refined
        return parameters

    def cost(self, parameters: Mapping[str, float]) -> float:
        """Bytes read in searching one question, each weighed by what it takes to get it."""
        cost = ANYWHERE * self.refined_bytes * parameters.get(REFINED, 0) * self.at
        if self.lists is not None:
            cost += parameters[PROBES] * self.count / self.lists.nlist * self.lists.code_size
            cost += SEEN * parameters.get(COARSE_BREADTH, 0) * 4 * self.lists.d
        return cost + SEEN * parameters.get(BREADTH, 0) * 4 * self.dimension * ANYWHERE


def _steps(least: int, most: int) -> Iterator[int]:
    """Powers of two, and the numbers half way between them."""
    step = least
    while step <= most:
        yield step
        if step + step // 2 <= most and step > 1:
            yield step + step // 2
        step *= 2


def _recall(found: np.ndarray, relevant: Sequence[set[int]], at: int) -> float:
    return float(np.mean([len(rows & set(line.tolist())) / at for rows, line in zip(relevant, found, strict=True)]))
