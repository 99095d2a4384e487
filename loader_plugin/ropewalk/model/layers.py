"""One decoder layer, written as its equation, over the operations of a backend.

    x <- x + w * Attention(RMSNorm(x))
    x <- x + w * (silu(gate) * up) Down      with gate, up = RMSNorm(x) GateUp

A `PackedLayer` is weights; a `LayerInstance` (config/instances.py) is one use of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ropewalk.adapters.low_rank import UNCHANGED, LayerChange
from ropewalk.backends.protocol import Backend, KvStore, PackedLinear
from ropewalk.config.model import ModelConfig
from ropewalk.weights.read import LayerWeights

# Rows of a chunk that go through a layer together. Fresh memory costs as much as computing its contents, and the inner
# activations are wide (2 * I floats a row: 90 MB for 2048 rows of a 1.1B model). A block of this size stays in memory
# that the allocator reuses at once, and partly in cache.
BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """Weights of one decoder layer in the layout of a backend, with the facts about its heads.

    Norms are [C] or [D] float32. `qkv` maps C to (Hq + 2 * Hkv) * D, `o` Hq * D to C, `gate_up` C to 2 * I and `down` I
    to C.
    """

    attn_norm: torch.Tensor
    qkv: PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    window: int | None

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights and norms."""
        norms = (norm for norm in (self.attn_norm, self.q_norm, self.k_norm, self.mlp_norm) if norm is not None)
        linears = (self.qkv, self.o, self.gate_up, self.down)
        return sum(norm.numel() * 4 for norm in norms) + sum(linear.num_bytes for linear in linears)


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin of the rows of one chunk, [T, R/2] float32 each, attention scale folded in."""

    cos: torch.Tensor
    sin: torch.Tensor


def pack_layer(backend: Backend, config: ModelConfig, index: int, weights: LayerWeights) -> PackedLayer:
    """Hand the weights of decoder layer `index` to the backend."""
    device = backend.device
    return PackedLayer(
        attn_norm=weights.attn_norm.to(device),
        qkv=backend.pack([weights.q, weights.k, weights.v]),
        q_norm=None if weights.q_norm is None else weights.q_norm.to(device),
        k_norm=None if weights.k_norm is None else weights.k_norm.to(device),
        o=backend.pack([weights.o]),
        mlp_norm=weights.mlp_norm.to(device),
        gate_up=backend.pack([weights.gate, weights.up]),
        down=backend.pack([weights.down]),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        window=config.sliding_windows[index],
    )


def run_layer_(
    x: torch.Tensor,
    backend: Backend,
    layer: PackedLayer,
    kv: KvStore,
    rotation: Rotation,
    start: int,
    weight: float,
    change: LayerChange = UNCHANGED,
) -> None:
    """Add one decoder layer to the residual stream x: [T, C] float32, positions start..start+T, in place.

    Keys and values of these positions are written to `kv`. `weight` multiplies what the layer adds. `change` is what
    the adapters of the request add to its linears.
    """
    for first in range(0, x.shape[0], BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        angles = Rotation(rotation.cos[rows], rotation.sin[rows])  # [rows, R/2] each
        _run_block_(x[rows], backend, layer, kv, angles, start + first, weight, change)


def _run_block_(
    x: torch.Tensor,
    backend: Backend,
    layer: PackedLayer,
    kv: KvStore,
    rotation: Rotation,
    start: int,
    weight: float,
    change: LayerChange,
) -> None:
    """As `run_layer_`, on rows that are computed together."""
    normed = backend.rms_norm(x, layer.attn_norm, layer.norm_eps)  # [T, C]
    backend.add_(x, _attention(normed, backend, layer, kv, rotation, start, change), weight)
    normed = backend.rms_norm(x, layer.mlp_norm, layer.norm_eps)  # [T, C]
    backend.add_(x, _mlp(normed, backend, layer, change), weight)


def _attention(
    x: torch.Tensor,
    backend: Backend,
    layer: PackedLayer,
    kv: KvStore,
    rotation: Rotation,
    start: int,
    change: LayerChange,
) -> torch.Tensor:
    """x: [T, C], normalised -> [T, C]."""
    num_rows, num_heads, num_kv_heads = x.shape[0], layer.num_heads, layer.num_kv_heads
    fused = backend.linear(x, layer.qkv, change.qkv).view(num_rows, -1, layer.head_dim)  # [T, Hq + 2 * Hkv, D]
    q, k, v = fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1)  # [T, Hq, D], [T, Hkv, D], [T, Hkv, D]
    if layer.q_norm is not None:
        q = backend.rms_norm(q, layer.q_norm, layer.norm_eps)  # [T, Hq, D]
    if layer.k_norm is not None:
        k = backend.rms_norm(k, layer.k_norm, layer.norm_eps)  # [T, Hkv, D]
    backend.rotate_(q, rotation.cos, rotation.sin)
    backend.rotate_(k, rotation.cos, rotation.sin)
    backend.append_(kv, k, v, start)
    return backend.linear(backend.attend(q, kv, start, layer.window), layer.o, change.o)  # [T, C]


def _mlp(x: torch.Tensor, backend: Backend, layer: PackedLayer, change: LayerChange) -> torch.Tensor:
    """x: [T, C], normalised -> [T, C]."""
    gate_up = backend.linear(x, layer.gate_up, change.gate_up)  # [T, 2 * I]
    return backend.linear(backend.silu_mul(gate_up), layer.down, change.down)
