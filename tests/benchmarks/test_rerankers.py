from __future__ import annotations

import numpy as np

from benchmarks import rerankers
from benchmarks.options import Options


def test_rows_of_small_models(monkeypatch) -> None:
    monkeypatch.setattr(rerankers, "PASSAGES", 10)
    rows = {row.name: row.value for row in rerankers.measure(Options(quick=True))}
    for name in ("decoder", "cross_encoder"):
        assert rows[f"rerankers.{name}.pairs_per_second"] > 0 and rows[f"rerankers.{name}.speedup"] > 0


def test_lengths_are_those_of_paragraphs() -> None:
    lengths = [len(passage.split()) for _, passage in rerankers.random_pairs(10)]
    assert len(lengths) == 1000 and 70 < np.median(lengths) < 90
    assert min(lengths) >= 8 and np.quantile(lengths, 0.9) > 2 * np.median(lengths)
