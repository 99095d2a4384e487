"""Low-rank changes of a linear (LoRA), as tiles side by side in memory that is read once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ropewalk.base.errors import ShapeError
from ropewalk.native.arrays import Array, as_numpy, checked_shape
from ropewalk.native.core import _core
from ropewalk.native.runtime import Runtime


class Arena:
    """Room for many small matrices that are read one after the other, side by side in huge pages.

    On small pages a decoded token spends as long on looking up addresses as on reading (scripts/bench/adapters.py).
    A block is given back to the system when no array in it is used any more. Threads may place arrays at the same time:
    each takes its place alone, and fills it beside the others.
    """

    BLOCK_BYTES = 8 << 20
    LINE_BYTES = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the two below
        self._block = np.empty(0, np.uint8)
        self._used = 0

    def place(self, array: np.ndarray) -> np.ndarray:
        """A copy of a contiguous array that starts on a cache line; same shape and dtype."""
        place = self._take(-(-array.nbytes // self.LINE_BYTES) * self.LINE_BYTES)
        copy = place[: array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def _take(self, size: int) -> np.ndarray:
        """So many bytes, [size] uint8, that nobody else is given."""
        with self._lock:
            if self._used + size > self._block.size:
                self._block, self._used = _core.AlignedBytes(max(size, self.BLOCK_BYTES)).array(), 0
            place = self._block[self._used : self._used + size]
            self._used += size
        return place


class LowRank:
    """A low-rank change of the parts of a `Linear`: y += (x A^T) B^T.

    parts: (A [r, K], B [N, r]) of each part in float32; r may be 0. dtype: "f32", or "i8", a quarter of what is read:
    8-bit codes with a scale for each rank of A and each output of B (f32 where such a scale would not be finite).
    Products and sums are float32. arena: where the matrices go.

    Raises:
        ShapeError: no parts, none of a rank above 0, matrices that disagree about their sizes, or another dtype.
    """

    def __init__(self, parts: Sequence[tuple[Array, Array]], dtype: str = "f32", arena: Arena | None = None) -> None:
        parts = [(_float_matrix(a, "A"), _float_matrix(b, "B")) for a, b in parts]
        for a, b in parts:
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[1] != parts[0][0].shape[1]:
                raise ShapeError(f"A must be [r, K] and B [N, r], got {list(a.shape)} and {list(b.shape)}")
        if not any(a.shape[0] for a, _ in parts):
            raise ShapeError("a low-rank change needs a part of a rank above 0")
        held, dtype = _held(parts, dtype)
        arena = arena or Arena()
        a = torch.cat([a.values for a, _ in held])  # [R, K]
        scales = [a.scales for a, _ in held if a.scales is not None]
        panels = arena.place(_panels(a).numpy())  # read before the tiles, so placed before them
        panel_scales = _placed_scales(arena, torch.cat(scales) if scales else None, 4)
        tiles = [(b.values.shape[0], *_placed_tiles(arena, b)) for _, b in held]
        self.core = _core.LowRank(panels, panel_scales, a.shape[1], dtype, tiles)
        self.num_bytes: int = self.core.num_bytes

    def add_(self, runtime: Runtime, y: Array, x: Array) -> None:
        """Add the change alone to y: [T, N] float32, in place; x: [T, K] float32."""
        self.core.add(runtime.core, as_numpy(x), as_numpy(y))


def _float_matrix(matrix: Array, name: str) -> torch.Tensor:
    """The same memory as a tensor."""
    shape, array = checked_shape(matrix, name, 2), as_numpy(matrix)
    if array.dtype != np.float32:
        raise ShapeError(f"{name} has dtype {array.dtype}; accepted: float32")
    if not shape["AB".index(name) - 1]:
        raise ShapeError(f"{name} has shape {list(shape)}: there are no {'inputs' if name == 'A' else 'outputs'}")
    return torch.from_numpy(array)


class _Held(NamedTuple):
    """A matrix as float32, or as int8 codes with a float32 scale for each row."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def _held(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: str) -> tuple[list[tuple[_Held, _Held]], str]:
    """(A and B of each part as `dtype` has them, that dtype); in f32 where a scale of i8 would not be finite."""
    if dtype not in ("f32", "i8"):
        raise ShapeError(f"dtype of a low-rank change is {dtype!r}; accepted: 'f32', 'i8'")
    codes = [_codes(a, b) for a, b in parts] if dtype == "i8" else []
    if codes and all(bool(held.scales.isfinite().all()) for pair in codes for held in pair if held.scales is not None):
        return codes, dtype
    return [(_Held(a), _Held(b)) for a, b in parts], "f32"


def _codes(a: torch.Tensor, b: torch.Tensor) -> tuple[_Held, _Held]:
    """A [r, K] with scales [r] and B [N, r] with scales [N], with the product of A and B.

    How large a rank is in B goes into its scale of A, so that a small rank keeps its digits beside a large one.
    """
    if not a.shape[0]:
        return _Held(a.to(torch.int8), a.new_empty(0)), _Held(b.to(torch.int8), b.new_zeros(b.shape[0]))
    sizes = _largest(b, 0)  # [1, r]
    return _rows_in_codes(a, sizes.T), _rows_in_codes(b / sizes)


def _rows_in_codes(matrix: torch.Tensor, sizes: torch.Tensor | float = 1.0) -> _Held:
    """[n, m] float32 -> int8 within -127..127 and the scale of each row, times `sizes`: [n, 1]."""
    largest = _largest(matrix, 1)  # [n, 1]
    return _Held((matrix / largest * 127).round().to(torch.int8), (largest / 127 * sizes)[:, 0])


def _largest(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest magnitude along `dim`, which stays; above 0, to divide by."""
    return matrix.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _placed_scales(arena: Arena, scales: torch.Tensor | None, multiple: int) -> np.ndarray | None:
    """With zeros to a multiple."""
    if scales is None:
        return None
    return arena.place(torch.nn.functional.pad(scales, (0, -scales.shape[0] % multiple)).numpy())


def _placed_tiles(arena: Arena, b: _Held) -> tuple[np.ndarray | None, np.ndarray | None]:
    """B and its scales as the core takes them; nothing for a rank of 0."""
    if not b.values.shape[1]:
        return None, None
    return arena.place(_tiles(b.values).numpy()), _placed_scales(arena, b.scales, 16)


def _panels(a: torch.Tensor) -> torch.Tensor:
    """A [R, K] -> [ceil(R / 4), ceil(K / 16), 4, 16], zero past R and K."""
    padded = torch.nn.functional.pad(a, (0, -a.shape[1] % 16, 0, -a.shape[0] % 4))
    return padded.view(padded.shape[0] // 4, 4, -1, 16).transpose(1, 2).contiguous()


def _tiles(b: torch.Tensor) -> torch.Tensor:
    """B [N, r] -> [ceil(N / 16), r, 16], zero past N."""
    padded = torch.nn.functional.pad(b, (0, 0, 0, -b.shape[0] % 16))  # [16 * tiles, r]
    return padded.view(-1, 16, b.shape[1]).transpose(1, 2).contiguous()
