"""Means, differences and recovered fractions with 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from genpoe_plugin.comparison.statistics import (
    DRAWS,
    Floats,
    bootstrap_means,
    expanded_tail,
    mean_interval,
    paired_bootstrap,
    t_interval,
)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def mean(column: Floats, *, share: bool) -> Interval:
    """Mean over questions: with Wilson's interval for shares between 0 and 1, with Student's for nats."""
    low, high = (mean_interval if share else t_interval)(column[:, None])
    return Interval(float(column.mean()), float(low[0]), float(high[0]))


@dataclass(frozen=True, eq=False)
class Paired:
    """Columns of scores over the same questions, [questions, columns], and ``draws`` bootstrap samples of them."""

    columns: Floats
    draws: int = DRAWS

    @cached_property
    def _resampled(self) -> Floats:
        return bootstrap_means(self.columns, self.draws)

    def difference(self, first: int, second: int) -> Interval:
        """Difference of the means of two columns."""
        found = paired_bootstrap(self.columns.mean(0), self._resampled, np.array([[first, second]]), len(self.columns))
        return Interval(float(found.difference[0]), float(found.low[0]), float(found.high[0]))

    def recovered(self, experts: int, without: int, prompt: int) -> Interval | None:
        """The recovered fraction ``(experts - without) / (prompt - without)`` of three columns' means.

        None if the interval of ``prompt - without`` contains 0, since the prompt may then gain nothing.
        """
        whole = self.difference(prompt, without)
        if whole.low <= 0 <= whole.high:
            return None
        means = self.columns.mean(0)
        resampled = self._resampled
        shares = (resampled[:, experts] - resampled[:, without]) / (resampled[:, prompt] - resampled[:, without])
        tail = expanded_tail(len(self.columns))
        low, high = np.quantile(shares, [tail, 1 - tail])
        value = (means[experts] - means[without]) / (means[prompt] - means[without])
        return Interval(float(value), float(low), float(high))
