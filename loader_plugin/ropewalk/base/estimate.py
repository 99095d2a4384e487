"""A mean over samples of unequal size, and how far it may be off.

    mean = sum of all values / their number
    standard error = sqrt( n / (n - 1) * sum over samples (s - mean c)^2 ) / sum of c

for n samples with the sums s of c values each (the ratio estimator; Cochran, Sampling Techniques, 3rd ed., eq. 6.13).
Neighbouring tokens are not independent, so a sample is a stretch of text, not a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `count` values. error: its standard error; None if there is one sample alone."""

    mean: float
    error: float | None
    count: int


def estimate(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The mean of the values whose sums are given by sample; at least one sample, none of them empty."""
    total, count, num_samples = math.fsum(sums), sum(counts), len(sums)
    mean = total / count
    if num_samples < 2:
        return Estimate(mean, None, count)
    squares = math.fsum((part - mean * size) ** 2 for part, size in zip(sums, counts, strict=True))
    return Estimate(mean, math.sqrt(num_samples / (num_samples - 1) * squares) / count, count)
