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
# FAISS's names of search parameters.
PROBES, BREADTH, COARSE_BREADTH, REFINED = "nprobe", "efSearch", "quantizer_efSearch", "k_factor_rf"
# Cost of random access relative to sequential access, by measurement: 0.6 to 0.9 ns per byte for a vector that is
# refined, 0.1 ns per byte for the next vector of a list.
RANDOM_ACCESS = 8
GRAPH_COMPARISONS = 20  # vectors that a graph search compares per unit of its breadth


@dataclass(frozen=True, slots=True)
class Tuning:
    """Search parameters and their measured recall.

    Attributes:
        parameters: names and values in FAISS's ``ParameterSpace``.
        recall: measured recall@``at``.
        at: number of results for the recall.
    """

    parameters: dict[str, float]
    recall: float
    at: int


def query_vectors(shards: Shards, number: int = QUERIES) -> np.ndarray:
    """Artificial queries, float32 ``[number, dimension]``: perturbed passage vectors; fewer for small corpora.

    Each passage vector is moved by half the typical distance of two passages, along the difference of two other
    passages. Isotropic noise would hardly change which vectors are nearest.
    """
    number = min(number, shards.count)
    passages, some, others = (
        gathered(shards, sampled_rows(shards.count, number, SEED + i))[np.random.default_rng(i).permutation(number)]
        for i in range(3)
    )
    return passages + np.float32(NOISE / math.sqrt(2)) * (some - others)


def nearest(shards: Shards, queries: np.ndarray, at: int = RECALL_AT, *, progress: bool = False) -> list[set[int]]:
    """The best ``at`` rows of each query by exact search, and rows that tie with the last of them."""
    # Imported here, because `faiss_setup` must load FAISS first.
    from faiss.contrib.exhaustive_search import knn_ground_truth

    at = min(at, shards.count)
    with tqdm(desc="exact search", total=shards.count, unit="passage", disable=not progress) as bar:

        def counted() -> Iterator[np.ndarray]:
            for chunk in chunks(shards, 0, shards.count, CHUNK):
                yield chunk
                bar.update(len(chunk))

        further = min(2 * at, shards.count)
        scores, rows = knn_ground_truth(queries, counted(), further, faiss.METRIC_INNER_PRODUCT)
    return [
        set(query_rows[query_scores >= query_scores[at - 1]].tolist())
        for query_scores, query_rows in zip(scores, rows, strict=True)
    ]


def tune(
    index: Any,
    queries: np.ndarray,
    relevant: Sequence[set[int]],
    recall: float,
    *,
    at: int = RECALL_AT,
    progress: bool = False,
) -> Tuning:
    """Find the cheapest search parameters that reach a target recall, or else those with the highest recall.

    Recall@``at`` is the mean over queries of the number of relevant rows among the ``at`` results, divided by ``at``.
    Cost is computed and not timed, so the choice is reproducible.

    Args:
        index: a FAISS index; its parameters are changed.
        queries: query vectors, float32 ``[n, dimension]``.
        relevant: the relevant rows of each query, from `nearest`.
        recall: target recall.
        at: number of results for the recall.
        progress: whether to show a progress bar.
    """
    at = min(at, index.ntotal)
    space = _SearchSpace(index, at)
    best: tuple[float, Tuning] | None = None
    most: Tuning | None = None
    with tqdm(desc="tuning", unit="setting", disable=not progress) as bar:
        least = 0
        for breadth in space.breadths:
            position = least
            # With less refinement, or a narrower search for centroids, as many probes or more are needed. So the search
            # follows the border of the settings that reach the recall.
            for refined in space.refinements:
                reached = False
                while position < len(space.probes) and not reached:
                    parameters = space.parameters(space.probes[position], refined, breadth)
                    cost = space.cost(parameters)
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
                        least = position if refined == space.refinements[0] else least
                    else:
                        position += 1
    assert most is not None
    return best[1] if best is not None else most


class _SearchSpace:
    """The search parameters of an index: their values (probes ascending, the others descending) and their cost."""

    def __init__(self, index: Any, at: int) -> None:
        first = parts(index)[0]
        known = faiss.ParameterSpace()
        known.initialize(first)
        names = {known.parameter_ranges.at(i).name for i in range(known.parameter_ranges.size())}
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
        """Values as FAISS parameters; None leaves a parameter out."""
        parameters: dict[str, float] = {}
        if self.name is not None and probes is not None:
            parameters[self.name] = probes
            if breadth is not None:
                parameters[COARSE_BREADTH] = breadth * probes
        if refined is not None:
            parameters[REFINED] = refined
        return parameters

    def cost(self, parameters: Mapping[str, float]) -> float:
        """Bytes read per query, weighted by the time to access them."""
        cost = RANDOM_ACCESS * self.refined_bytes * parameters.get(REFINED, 0) * self.at
        if self.lists is not None:
            cost += parameters[PROBES] * self.count / self.lists.nlist * self.lists.code_size
            cost += GRAPH_COMPARISONS * parameters.get(COARSE_BREADTH, 0) * 4 * self.lists.d
        return cost + GRAPH_COMPARISONS * parameters.get(BREADTH, 0) * 4 * self.dimension * RANDOM_ACCESS


def _steps(least: int, most: int) -> Iterator[int]:
    """Powers of two and the numbers halfway between them, from ``least`` to ``most``."""
    step = least
    while step <= most:
        yield step
        if step + step // 2 <= most and step > 1:
            yield step + step // 2
        step *= 2


def _recall(results: np.ndarray, relevant: Sequence[set[int]], at: int) -> float:
    return float(np.mean([len(rows & set(line.tolist())) / at for rows, line in zip(relevant, results, strict=True)]))
