from __future__ import annotations

from itertools import product

import pytest

from genpoe_plugin.demo.table import Row, paired_p_value, render


def test_paired_p_value_equals_enumeration():
    """Every way in which nine undecided questions can fall, counted."""
    first, second = [True] * 7 + [False] * 2 + [True] * 5, [False] * 7 + [True] * 2 + [True] * 5
    splits = [sum(way) for way in product((0, 1), repeat=9)]
    expected = sum(abs(split - 4.5) >= 2.5 for split in splits) / len(splits)
    assert paired_p_value(first, second) == pytest.approx(expected)
    assert paired_p_value(second, first) == pytest.approx(expected)
    assert paired_p_value(first, first) == 1.0


def test_the_table_shows_percent_and_a_dash_where_nothing_was_retrieved():
    row = Row("closed_book", "none", 480, 0.05, 0.01, 0.1, 0.02, 123.4)
    line = render([row]).splitlines()[-1]
    assert "5.0 ± 1.0" in line
    assert line.split()[-5:] == ["-"] * 5
