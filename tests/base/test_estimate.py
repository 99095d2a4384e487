"""base/estimate.py: against the mean and standard error of equal samples, and against drawn ones of unequal size."""

from __future__ import annotations

import numpy as np
import pytest

from ropewalk.base.estimate import estimate


def test_for_equal_samples_it_is_the_standard_error_of_their_means() -> None:
    values = np.random.default_rng(1).normal(3, 1, (12, 50))
    found = estimate(values.sum(1).tolist(), [50] * 12)
    assert found.mean == pytest.approx(values.mean()) and found.count == 600
    assert found.error == pytest.approx(values.mean(1).std(ddof=1) / np.sqrt(12))


def test_the_error_is_the_spread_of_the_mean_over_many_draws() -> None:
    draw = np.random.default_rng(2)
    found = []
    for _ in range(400):
        counts = draw.integers(5, 60, 40)
        # Values of a sample have something in common, as those of a stretch of text have.
        sums = [float((draw.normal(2, 1) + draw.normal(0, 1, count)).sum()) for count in counts]
        found.append(estimate(sums, counts.tolist()))
    spread = np.std([one.mean for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.1)


def test_one_sample_tells_no_error() -> None:
    assert estimate([6.0], [3]).mean == 2.0 and estimate([6.0], [3]).error is None
