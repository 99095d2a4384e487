"""What Triton's interpreter needs so that results depend on a row alone, as they do on a card.

It multiplies tiles with numpy, whose libraries add the products of an element in an order that depends on the shape of
the tile, on the place in it, and on the processor. Summed in float64, products of float16 numbers are exact, and the
order is not seen; those of float32 numbers nearly are, as one in some 2^28 sums lies where float64 could round it to
either side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter

_numpy_dot = interpreter.InterpreterBuilder.create_dot


def sum_products_exactly() -> None:
    """From now on; asked for by the backend where kernels are interpreted. Nothing changes on cards."""
    interpreter.InterpreterBuilder.create_dot = _dot


def _dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
    """a: [M, K], b: [K, N] float16 or float32, d: [M, N] float32 -> a b + d."""
    if d.data.dtype != np.float32 or {a.data.dtype, b.data.dtype} - {np.dtype(np.float16), np.dtype(np.float32)}:
        return _numpy_dot(self, a, b, d, *settings)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities times zero, and sums beyond float32
        sums = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)
