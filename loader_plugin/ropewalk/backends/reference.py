"""The operations in plain torch, on any device: the executable specification that other backends are compared with.

Written to be read, not to be fast. Quantised weights stay packed as stored and are dequantised anew in every call, so
memory is that of the checkpoint plus one dequantised linear. In "int8" mode the arithmetic of the integer kernels is
done in float32, where it is exact: a block's sum of 32 products is at most 32 * 127 * 255 < 2^24.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.protocol import LowRankPart
from ropewalk.base.errors import ShapeError
from ropewalk.gptq.linear import DenseLinear, GptqLinear

INT8_BLOCK = 32  # input features that share one activation scale (kernels: one 256-bit register of bytes)
SCRATCH_BYTES = 1 << 26  # bound for scores of one block of queries, and for one block of converted dense rows


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """Linear layers as read from the checkpoint, on the device of the backend."""

    parts: tuple[GptqLinear | DenseLinear, ...]
    in_features: int
    out_features: int

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors of all parts."""
        return sum(tensor.numel() * tensor.element_size() for part in self.parts for tensor in _tensors(part).values())


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceLowRank:
    """A low-rank change as given, on the device of the backend."""

    parts: tuple[LowRankPart, ...]

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices."""
        return sum(4 * (part.a.numel() + part.b.numel()) for part in self.parts)


@dataclass(slots=True, eq=False)
class ReferenceKv:
    """Keys and values of one layer instance. k, v: [Hkv, capacity, D] float16 or float32, row-major.

    length: the positions that it holds; an append forgets what followed it.
    """

    k: torch.Tensor
    v: torch.Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        """The number of positions that it has room for."""
        return self.k.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.k.numel() * self.k.element_size()


class ReferenceBackend:
    """The protocol of `backends/protocol.py` in plain torch. `device` is any that torch knows."""

    name = "reference"

    def __init__(self, compute: str = "exact", device: torch.device | str = "cpu") -> None:
        self.compute = compute
        self.device = torch.device(device)

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> ReferenceLinear:
        """Move the parts to the device; nothing is rearranged."""
        if not parts:
            raise ShapeError("pack: at least one linear layer is needed, none was given")
        features = {part.name: _in_features(part) for part in parts}
        if len(set(features.values())) != 1:
            raise ShapeError(f"pack: layers over the same input must agree about its features, got {features}")
        moved = tuple(_moved(part, self.device) for part in parts)
        return ReferenceLinear(moved, _in_features(parts[0]), sum(_out_features(part) for part in parts))

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> ReferenceLowRank:
        """Move the matrices to the device."""
        return ReferenceLowRank(tuple(LowRankPart(p.a.to(self.device), p.b.to(self.device)) for p in parts))

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: ReferenceLowRank) -> None:
        """y += (x A^T) B^T for every part; x: [T, K], y: [T, N] float32."""
        y.add_(torch.cat([(x @ part.a.T) @ part.b.T for part in change.parts], dim=1))  # [T, N]

    def linear(self, x: torch.Tensor, weight: ReferenceLinear, change: ReferenceLowRank | None = None) -> torch.Tensor:
        """y = x W + bias and the change; x: [T, K] float32 -> [T, N] float32."""
        if x.ndim != 2 or x.shape[1] != weight.in_features:
            raise ShapeError(f"linear: x must be [T, {weight.in_features}], got {list(x.shape)}")
        y = torch.cat([self._part(x, part) for part in weight.parts], dim=1)  # [T, N]
        if change is not None:
            self.add_low_rank_(y, x, change)
        return y

    def _part(self, x: torch.Tensor, part: GptqLinear | DenseLinear) -> torch.Tensor:
        if isinstance(part, DenseLinear):
            y = _dense_product(x, part.weight)
        elif self.compute == "int8":
            y = _int8_product(x, part)
        else:
            y = x @ part.dequantise()
        return y if part.bias is None else y + part.bias

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """table: [V, C], token_ids: [T] int64 -> [T, C] float32."""
        return table[token_ids].float()

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y; x, y: [T, C] float32."""
        x.add_(y, alpha=weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [..., C] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """x: [T, H, D], cos, sin: [T, R/2]; pairs (i, i + R/2) are rotated in place."""
        half = cos.shape[1]
        if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or 2 * half > x.shape[2]:
            raise ShapeError(f"rotate: tables {list(cos.shape)} and {list(sin.shape)} do not fit x {list(x.shape)}")
        cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, R/2]
        first, second = x[..., :half], x[..., half : 2 * half]
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)  # [T, H, R]
        x[..., : 2 * half] = rotated

    def new_kv(self, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> ReferenceKv:
        """Uninitialised room for `capacity` positions."""
        shape = (num_kv_heads, capacity, head_dim)
        return ReferenceKv(*(torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2)))

    def append_(self, kv: ReferenceKv, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """k, v: [T, Hkv, D] float32, written to positions start..start+T and rounded to the dtype of the store."""
        num_kv_heads, capacity, head_dim = kv.k.shape
        num_rows = k.shape[0]
        end = start + num_rows
        if k.shape != v.shape or k.shape[1:] != (num_kv_heads, head_dim) or start < 0 or end > capacity:
            raise ShapeError(
                f"append: k {list(k.shape)}, v {list(v.shape)} at {start} do not fit a store of {capacity} positions, "
                f"{num_kv_heads} heads of {head_dim}"
            )
        if start > kv.length:
            raise ShapeError(f"append: positions {start} to {end} would leave a gap in a store that holds {kv.length}")
        kv.k[:, start:end] = k.transpose(0, 1)  # [Hkv, T, D]
        kv.v[:, start:end] = v.transpose(0, 1)  # [Hkv, T, D]
        kv.length = end if num_rows else kv.length

    def attend(self, q: torch.Tensor, kv: ReferenceKv, start: int, window: int | None) -> torch.Tensor:
        """q: [T, Hq, D] at positions start..start+T, keys 0..start+T of the store -> [T, Hq * D] float32."""
        num_queries, num_heads, head_dim = q.shape
        num_kv_heads, capacity, kv_head_dim = kv.k.shape
        end = start + num_queries
        if head_dim != kv_head_dim or num_heads % num_kv_heads or start < 0 or end > capacity:
            raise ShapeError(
                f"attend: q {list(q.shape)} at {start} does not fit a store of {capacity} positions, "
                f"{num_kv_heads} heads of {kv_head_dim}"
            )
        if end > kv.length:
            raise ShapeError(f"attend: q at {start} to {end} sees keys that were not appended: there are {kv.length}")
        out = torch.empty(num_queries, num_heads * head_dim, device=q.device)
        rows = max(1, SCRATCH_BYTES // (4 * num_heads * end))
        for first in range(0, num_queries, rows):
            last = min(first + rows, num_queries)
            out[first:last] = _attend_block(q[first:last], kv, start + first, window)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [T, 2 * I] -> silu(first half) * second half, [T, I]."""
        gate, up = gate_up.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up


def _attend_block(q: torch.Tensor, kv: ReferenceKv, start: int, window: int | None) -> torch.Tensor:
    """Masked softmax over all keys that a block of queries can see. q: [T, Hq, D] -> [T, Hq * D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, end = kv.k.shape[0], start + num_queries
    low = 0 if window is None else max(0, start - window + 1)
    k, v = kv.k[:, low:end].float(), kv.v[:, low:end].float()  # [Hkv, S, D]
    query_pos = torch.arange(start, end, device=q.device)[:, None]  # [T, 1]
    key_pos = torch.arange(low, end, device=q.device)[None, :]  # [1, S]
    hidden = key_pos > query_pos
    if window is not None:
        hidden |= key_pos <= query_pos - window
    groups = q.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [Hkv, Hq/Hkv, T, D]
    scores = groups @ k.transpose(1, 2)[:, None] * head_dim**-0.5  # [Hkv, Hq/Hkv, T, S]
    probabilities = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    return (probabilities @ v[:, None]).permute(2, 0, 1, 3).reshape(num_queries, num_heads * head_dim)


def _dense_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [T, K] float32, weight: [N, K] of any float dtype, widened to float32 in blocks of rows -> [T, N]."""
    num_outputs, num_inputs = weight.shape
    out = torch.empty(x.shape[0], num_outputs, device=x.device)
    rows = max(1, SCRATCH_BYTES // (4 * num_inputs))
    for first in range(0, num_outputs, rows):
        out[:, first : first + rows] = x @ weight[first : first + rows].float().T
    return out


def _int8_product(x: torch.Tensor, part: GptqLinear) -> torch.Tensor:
    """y = sum over blocks of s * scale * (sum q * code - zero * sum q), with s = max|x| / 127 and q = rint(x / s).

    x: [T, K] float32 -> [T, N] float32, blocks added in order. Blocks of 32 input features never straddle a group.
    """
    codes = part.codes()  # [K, N] uint8, original row order
    out = torch.zeros(x.shape[0], part.out_features, device=x.device)
    for group, rows in _int8_blocks(part):
        block = x[:, rows]  # [T, 32]
        scale = block.abs().amax(1, keepdim=True) / 127  # [T, 1]
        quantised = (block / torch.where(scale > 0, scale, 1.0)).round().clamp(-127, 127)  # [T, 32]
        centred = quantised @ codes[rows].float() - part.zeros[group].float() * quantised.sum(1, keepdim=True)
        out += scale * part.scales[group].float() * centred  # [T, N]
    return out


def _int8_blocks(part: GptqLinear) -> list[tuple[int, torch.Tensor]]:
    """(group, indices of at most 32 original rows) for every block of every group."""
    starts = part.group_starts.tolist()
    rows = torch.arange(part.in_features, device=part.qweight.device)
    order = rows if part.order is None else part.order.long()
    return [
        (group, order[first : min(first + INT8_BLOCK, end)])
        for group, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True))
        for first in range(begin, end, INT8_BLOCK)
    ]


def _in_features(part: GptqLinear | DenseLinear) -> int:
    return part.weight.shape[1] if isinstance(part, DenseLinear) else part.in_features


def _out_features(part: GptqLinear | DenseLinear) -> int:
    return part.weight.shape[0] if isinstance(part, DenseLinear) else part.out_features


def _tensors(part: GptqLinear | DenseLinear) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _moved(part: GptqLinear | DenseLinear, device: torch.device) -> GptqLinear | DenseLinear:
    return dataclasses.replace(part, **{name: tensor.to(device) for name, tensor in _tensors(part).items()})
