"""The CPU backend: the operations of backends/protocol.py on the compiled core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ropewalk import native
from ropewalk.base.errors import ShapeError
from ropewalk.gptq.linear import GptqLinear

if TYPE_CHECKING:
    from ropewalk.backends.protocol import LowRankPart
    from ropewalk.gptq.linear import DenseLinear

KV_TYPES = {torch.float16: "f16", torch.float32: "f32"}


class CpuBackend:
    """Kernels of one instruction set on a fixed number of threads.

    compute: "exact" or "int8" (see `native.Linear`). isa, threads: see `native.Runtime`.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(self, compute: str, isa: str | None = None, threads: int | None = None) -> None:
        self.compute = compute
        self.runtime = native.Runtime(isa, threads)
        self._arena = native.Arena()

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> native.Linear:
        """Repack GPTQ parts into tiles; dense parts are used in place."""
        return native.Linear(self.runtime, [self._pack_part(part) for part in parts])

    def _pack_part(self, part: GptqLinear | DenseLinear) -> object:
        if not isinstance(part, GptqLinear):
            return native.dense_linear(part.weight, part.bias)
        try:
            return native.pack_gptq(
                self.runtime,
                part.qweight,
                bits=part.bits,
                planar=part.planar,
                in_features=part.in_features,
                scales=part.scales,
                zeros=part.zeros,
                group_starts=part.group_starts,
                order=part.order,
                bias=part.bias,
            )
        except ShapeError as error:
            raise ShapeError(f"{part.name}: {error}") from error

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> native.LowRank:
        """Matrices in 8 bits in "int8", where activations are rounded to 8 bits as well; as given in "exact"."""
        dtype = "i8" if self.compute == "int8" else "f32"
        return native.LowRank([(part.a, part.b) for part in parts], dtype, self._arena)

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: native.LowRank) -> None:
        """y += (x A^T) B^T."""
        change.add_(self.runtime, y, x)

    def linear(self, x: torch.Tensor, weight: native.Linear, change: native.LowRank | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        return weight(x, self.compute, change)

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, widened to float32."""
        return native.embed(self.runtime, native.dense_linear(table), token_ids)

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y."""
        native.add_(self.runtime, x, y, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension."""
        return native.rms_norm(self.runtime, x, weight, eps)

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate heads in place."""
        native.rotate_(self.runtime, x, cos, sin)

    def new_kv(self, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> native.KvCache:
        """Room for one layer instance."""
        return native.KvCache(self.runtime, num_kv_heads, head_dim, capacity, KV_TYPES[dtype])

    def append_(self, kv: native.KvCache, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Write keys and values to positions start..start+T."""
        kv.append_(k, v, start)

    def attend(self, q: torch.Tensor, kv: native.KvCache, start: int, window: int | None) -> torch.Tensor:
        """Causal attention over the positions 0..start+T."""
        return kv.attend(q, start, window)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        return native.silu_mul(self.runtime, gate_up)
