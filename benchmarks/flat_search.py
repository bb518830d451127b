"""``python -m benchmarks.flat_search default|ours FOLDER``: exact search in a subprocess.

``default`` is FAISS with its default settings and an ``IndexFlatIP``; ``ours`` is the retriever over a Flat index,
including the passages' texts. Both print the median time in milliseconds per question and the rows found. FOLDER has
the vectors in ``shards``, our index in ``index``, and ``queries.npy``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

K, BATCH, BATCHES = 20, 64, 5

Search = Callable[[np.ndarray], list[list[int]]]


def default_search(folder: Path) -> Search:
    import faiss  # not through genpoe_plugin, which changes its settings

    index = None
    for path in sorted((folder / "shards").glob("shard-*.npy")):
        vectors = np.load(path).astype(np.float32)
        index = index or faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
    assert index is not None
    return lambda queries: index.search(queries, K)[1].tolist()


def our_search(folder: Path) -> Search:
    from benchmarks.clustered_vectors import NumberedQuestions
    from genpoe_plugin.retrieval.dense import DenseRetriever
    from genpoe_plugin.retrieval.index import PassageIndex

    index = PassageIndex.load(folder / "index")

    def search(queries: np.ndarray) -> list[list[int]]:
        encoder = NumberedQuestions(index.encoder_name, queries)
        found = DenseRetriever(index, encoder).retrieve(encoder.questions, K)
        return [[int(entry.passage.id) for entry in passages] for passages in found]

    return search


def main(name: str, folder: Path) -> None:
    search = {"default": default_search, "ours": our_search}[name](folder)
    queries = np.load(folder / "queries.npy")
    rows, times = [], []
    for start in range(0, BATCH * (1 + BATCHES), BATCH):
        begin = time.perf_counter()
        rows += search(queries[start : start + BATCH])
        times.append(time.perf_counter() - begin)
    # The first batch is warm-up.
    print(json.dumps({"ms": 1000 * statistics.median(times[1:]) / BATCH, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
