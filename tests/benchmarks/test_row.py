"""Files of benchmarks: numbers and truth values of any library become JSON's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.row import Row, write


@pytest.mark.parametrize("value", [2, 2.5, np.float32(2.5), np.float64(2.5), np.int64(2)])
@pytest.mark.parametrize(("target", "holds"), [(None, None), (">= 2", True), ("<= 1.5", False)])
def test_a_row_is_written_whatever_library_measured_it(value, target, holds, tmp_path):
    write([Row("compare.seconds", value, "s", target)], tmp_path / "rows.json")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row == {"name": "compare.seconds", "value": float(value), "unit": "s", "target": target, "holds": holds}
