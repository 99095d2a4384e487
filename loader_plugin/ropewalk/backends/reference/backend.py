"""The operations in plain torch, on any device: the executable specification that other backends are compared with.

Written to be read, not to be fast. Quantised weights stay packed as stored and are dequantised anew in every call, so
memory is that of the checkpoint plus one dequantised linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ropewalk.backends.protocol import LowRankPart, RowChange, RowSpan
from ropewalk.backends.reference import layers, linear, pages
from ropewalk.backends.reference.experts import ReferenceExperts, pack_experts
from ropewalk.backends.reference.layers import ReferenceLayer, ReferenceStep
from ropewalk.backends.reference.linear import ReferenceLinear, ReferenceLowRank
from ropewalk.backends.reference.pages import ReferencePage, ReferencePool
from ropewalk.backends.shared import SinglePlace, check_move
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import Program
from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear


class ReferenceBackend(SinglePlace):
    """The protocol of `backends/protocol.py` in plain torch. `device` is any that torch knows."""

    name = "reference"

    def __init__(self, compute: str = "exact", device: torch.device | str = "cpu") -> None:
        self.compute = compute
        self.device = torch.device(device)

    @property
    def arithmetic(self) -> str:
        """What decides the bits of keys and values."""
        return f"{self.name} {self.compute} {self.device.type}"

    def computing(self, compute: str) -> ReferenceBackend | None:
        """Weights stay as stored, whatever is done with them."""
        return ReferenceBackend(compute, self.device) if compute in ("exact", "int8") else None

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> ReferenceLinear:
        """Move the parts to the device; nothing is rearranged."""
        return linear.pack(tuple(parts), self.device)

    def pack_experts(self, experts: Sequence[Expert]) -> ReferenceExperts:
        """Move the experts to the device; nothing is rearranged."""
        return pack_experts(experts, self.device)

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> ReferenceLowRank:
        """Move the matrices to the device."""
        return ReferenceLowRank(tuple(LowRankPart(p.a.to(self.device), p.b.to(self.device)) for p in parts))

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: ReferenceLowRank) -> None:
        """y += (x A^T) B^T for every part; x: [T, K], y: [T, N] float32."""
        y.add_(linear.low_rank_product(x, change))

    def linear(self, x: torch.Tensor, weight: ReferenceLinear, change: ReferenceLowRank | None = None) -> torch.Tensor:
        """y = x W + bias and the change; x: [T, K] float32 -> [T, N] float32."""
        y = linear.product(x, weight, self.compute)
        if change is not None:
            self.add_low_rank_(y, x, change)
        return y

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """table: [V, C], token_ids: [T] int64 -> [T, C] float32."""
        return table[token_ids].float()

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y; x, y: [T, C] float32."""
        x.add_(y, alpha=weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [..., C] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
        return layers.rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """x: [..., C] float32 -> (x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""
        return layers.layer_norm(x, weight, bias, eps)

    def new_pool(self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int) -> ReferencePool:
        """A pool of pages on the device."""
        return ReferencePool(num_kv_heads, head_dim, cache_format, num_bytes, self.device)

    def move_rows_(
        self,
        source: Sequence[ReferencePage],
        source_start: int,
        target: Sequence[ReferencePage],
        target_start: int,
        num_rows: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotations: Sequence[int | None],
    ) -> None:
        """Row by row; cos, sin: [tables, num_rows, R/2] float32."""
        check_move(source, source_start, target, target_start, num_rows, cos, sin, rotations)
        pages.move_rows_(source, source_start, target, target_start, num_rows, cos, sin, rotations)

    def compile_layer(
        self, program: Program, weights: Mapping[str, torch.Tensor | ReferenceLinear], norm_eps: float
    ) -> ReferenceLayer:
        """The program and its weights side by side: it is interpreted."""
        return ReferenceLayer(program, dict(weights), norm_eps)

    def begin_step(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]
    ) -> ReferenceStep:
        """x: [T, C] float32, cos, sin: [tables, T, R/2] float32."""
        return layers.begin_step(x, cos, sin, spans)

    def run_layer_(
        self, step: ReferenceStep, layer: ReferenceLayer, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        """Add one layer instance to the residual stream of the step."""
        layers.run_layer_(step, layer, instance, weight, changes, self.compute)

    def end_step_(self, step: ReferenceStep) -> None:
        """Nothing is put off."""
