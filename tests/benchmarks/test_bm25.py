from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import bm25
from benchmarks.options import Options


def test_rows_of_a_small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "QUICK", 300)
    rows = {row.name: row.value for row in bm25.measure(Options(quick=True, out=tmp_path))}
    assert rows["bm25.passages"] == 300
    files = sum((tmp_path / "bm25" / name).stat().st_size for name in bm25.FILES)
    assert rows["bm25.bytes_per_passage"] == files / 300
    assert rows["bm25.time_ratio_to_bm25s"] == rows["bm25.search"] / rows["bm25.bm25s_search"] > 0
    assert rows["bm25.build_seconds"] > 0 and rows["bm25.build_peak_gb"] > 0.05


def test_words_follow_zipfs_law() -> None:
    counts = Counter(word for text in bm25.texts(2000, 100, seed=0) for word in text.split())
    assert counts["w0"] / counts["w9"] == pytest.approx(10, rel=0.1)
    assert counts["w9"] / counts["w99"] == pytest.approx(10, rel=0.2)
