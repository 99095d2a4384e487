"""Linear layers in plain torch: packed as stored, dequantised anew in every call.

In "int8" mode the arithmetic of the integer kernels is done in float32, where it is exact: a block's sum of 32 products
is at most 32 * 127 * 255 < 2^24.
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
SCRATCH_BYTES = 1 << 26  # bound for one block of converted dense rows


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


def pack(parts: Sequence[GptqLinear | DenseLinear], device: torch.device) -> ReferenceLinear:
    """Move the parts to the device; nothing is rearranged."""
    if not parts:
        raise ShapeError("pack: at least one linear layer is needed, none was given")
    features = {part.name: _in_features(part) for part in parts}
    if len(set(features.values())) != 1:
        raise ShapeError(f"pack: layers over the same input must agree about its features, got {features}")
    moved = tuple(_moved(part, device) for part in parts)
    return ReferenceLinear(moved, _in_features(parts[0]), sum(_out_features(part) for part in parts))


def product(x: torch.Tensor, weight: ReferenceLinear, compute: str) -> torch.Tensor:
    """y = x W + bias; x: [T, K] float32 -> [T, N] float32."""
    if x.ndim != 2 or x.shape[1] != weight.in_features:
        raise ShapeError(f"linear: x must be [T, {weight.in_features}], got {list(x.shape)}")
    return torch.cat([_part_product(x, part, compute) for part in weight.parts], dim=1)  # [T, N]


def low_rank_product(x: torch.Tensor, change: ReferenceLowRank) -> torch.Tensor:
    """(x A^T) B^T for every part; x: [T, K] float32 -> [T, N] float32."""
    return torch.cat([(x @ part.a.T) @ part.b.T for part in change.parts], dim=1)  # [T, N]


def _part_product(x: torch.Tensor, part: GptqLinear | DenseLinear, compute: str) -> torch.Tensor:
    if isinstance(part, DenseLinear):
        y = _dense_product(x, part.weight)
    elif compute == "int8" and part.rounds_inputs:
        y = _int8_product(x, part)
    else:
        y = x @ part.dequantise()
    return y if part.bias is None else y + part.bias


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
