"""Keys and values of one layer, and chunked attention over them."""

from __future__ import annotations

import math

from ropewalk.base.errors import ShapeError
from ropewalk.native.arrays import Array, as_numpy, checked_shape, new_result
from ropewalk.native.core import _core
from ropewalk.native.runtime import Runtime


class KvCache:
    """Keys and values of one layer for chunked causal attention.

    dtype: "f16" (stored rounded to nearest even), "f32", or codes: "q8", "q6" or "q4", of so many bits with a float16
    scale for each block of 32 dims; "q8_q4" for keys and values apart. Memory is set aside at once and touched as it
    fills. It holds the positions 0..length. Appending at an earlier position forgets what followed it.
    """

    def __init__(self, runtime: Runtime, num_kv_heads: int, head_dim: int, capacity: int, dtype: str = "f16") -> None:
        self._runtime = runtime
        self._cache = _core.KvCache(num_kv_heads, head_dim, capacity, dtype)
        self._head_dim = head_dim
        self.capacity: int = capacity
        self.num_bytes: int = self._cache.num_bytes

    @property
    def length(self) -> int:
        """The positions that it holds: 0 at first, then the end of what was appended last."""
        return self._cache.length

    def append_(self, k: Array, v: Array, start: int) -> None:
        """Write k, v: [T, Hkv, D] float32 to positions start..start+T; start is at most `length`."""
        self._check_range(start, checked_shape(k, "k", 3)[0])
        _core.append(self._runtime.core, self._cache, as_numpy(k), as_numpy(v), start)

    def attend(
        self,
        q: Array,
        start: int,
        window: int | None = None,
        compute: str = "int8",
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Array:
        """Attention of queries at positions start..start+T over the keys 0..start+T, at most `length`.

        q: [T, Hq, D] float32. Query t sees keys j <= start + t, and with a window only j > start + t - window: the
        bottom-right aligned causal mask. Scores are products times `scale` (None: 1/sqrt(D)), then with a soft cap c
        c * tanh(score / c). Returns [T, Hq * D] float32.

        compute: "exact" computes in float32, coded keys and values are decoded. "int8" rounds queries over codes to 8
        bits per block of 32 dims and weights to 15 bits per page of 64 keys, and sums integers within each; over "f16"
        it rounds all four factors to bf16 where the processor multiplies such pairs ("avx512bf16"), and sums in
        float32. "f32" has one way.
        """
        num_rows, num_heads, head_dim = checked_shape(q, "q", 3)
        self._check_range(start, num_rows)
        if window is not None and window < 1:
            raise ShapeError(f"window is {window}; accepted: None or at least 1")
        out = new_result(self._runtime, q, (num_rows, num_heads * head_dim))
        scale = 1.0 / math.sqrt(self._head_dim) if scale is None else scale
        if softcap is not None and not softcap > 0:
            raise ShapeError(f"softcap is {softcap}; accepted: None or above 0")
        seen = (start, window or 0, scale, softcap or 0.0, compute)
        _core.attend(self._runtime.core, as_numpy(q), self._cache, *seen, as_numpy(out))
        return out

    def _check_range(self, start: int, num_rows: int) -> None:
        if start < 0 or start + num_rows > self.capacity:  # the core's capacity is rounded up
            raise ShapeError(f"positions {start} to {start + num_rows} do not fit a cache of {self.capacity}")
