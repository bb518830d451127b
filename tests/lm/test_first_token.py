"""The time to the first token, with a clock that a test moves."""

from __future__ import annotations

import pytest
import torch

from genpoe_plugin.lm import first_token
from genpoe_plugin.lm.first_token import FirstTokenClock


def test_it_is_the_mean_over_the_rows_of_all_batches(monkeypatch):
    now = 0.0
    monkeypatch.setattr(first_token.time, "perf_counter", lambda: now)
    clock = FirstTokenClock()
    assert clock.mean is None
    for rows, waited in ((4, 3.0), (1, 8.0)):
        clock.start()
        now += waited
        scores = torch.randn(rows, 7)
        before = scores.clone()
        for _ in range(3):  # later tokens do not count
            assert torch.equal(clock(torch.zeros(rows, 2, dtype=torch.long), scores), before)
            now += 100
    assert clock.mean == pytest.approx((4 * 3.0 + 8.0) / 5)
