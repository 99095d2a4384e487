"""The one tolerance: an error against float64 is at most twice that of the plain computation in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

FACTOR = 2
ROUNDING = float(
    np.finfo(np.float32).eps
)  # of the values: what is left where the plain computation happens to be exact


@dataclass(frozen=True)
class Size:
    """How large the elements of an array are: a drift shows in the root mean square, a single wrong one in the most."""

    rms: float
    most: float


def size_of(array: Any) -> Size:
    values = np.asarray(array, dtype=np.float64)
    return Size(float(np.sqrt(np.mean(np.square(values)))), float(np.abs(values).max())) if values.size else Size(0, 0)


def error_of(result: Any, exact: Any) -> Size:
    return size_of(np.asarray(result, dtype=np.float64) - np.asarray(exact, dtype=np.float64))


def assert_as_accurate(result: Any, exact: Any, plain: Any) -> None:
    """exact: float64. plain: the same mathematics by numpy or torch in the dtype of `result`."""
    assert np.shape(result) == np.shape(exact) == np.shape(plain)
    assert_error(error_of(result, exact), error_of(plain, exact), size_of(exact))


def assert_error(error: Size, plain: Size, values: Size, factor: float = FACTOR) -> None:
    """Root mean squares and maxima are both compared; what is not finite is never within."""
    for name in ("rms", "most"):
        found, expected, scale = (getattr(size, name) for size in (error, plain, values))
        allowed = factor * expected + ROUNDING * scale
        assert found <= allowed, f"{name} error {found:.3g}, plain {expected:.3g}, values {scale:.3g}"
