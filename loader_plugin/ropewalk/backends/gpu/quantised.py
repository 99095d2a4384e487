"""Quantised columns that one kernel computes: their packed weights, and the launches of a product with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton import cdiv
from triton.runtime.interpreter import InterpretedFunction

from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.activations import Activations
from ropewalk.backends.gpu.codes import BLOCK_ROWS, UniformRows, held_bits, pack_words
from ropewalk.backends.gpu.linear_kernel import add_parts_, gptq_linear
from ropewalk.gptq.bits import unpack_rows
from ropewalk.gptq.linear import GptqLinear

ONE_GROUP = 30  # blocks are shifted down by so many bits to give their group: all to group 0
# PTX, which neither the interpreter nor other makers' cards read.
ASSEMBLY = torch.version.hip is None and not isinstance(gptq_linear, InterpretedFunction)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedSegment:
    """Linears of equal bits, groups and order of features, side by side; their columns padded to N'.

    words: [blocks, N', 16] int32; high: the same in int16 for 3 bits (codes.py). scales: [pieces, N'] float16 or
    float32. zeros: [pieces, N'] uint8. bias: [N'] float32. group: rows with the same scales, at most those of a block;
    group_shift: how many blocks have the same, as a power of two.
    """

    bits: int
    words: torch.Tensor
    high: torch.Tensor | None
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None
    num_columns: int
    group: int
    group_shift: int
    splits: int

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = (self.words, self.high, self.scales, self.zeros, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def multiply_(self, x: Activations, y: torch.Tensor) -> None:
        """y = x W + bias; y: [T, N] float32, columns contiguous."""
        num_rows, padded = x.values.shape[0], self.words.shape[1]
        if not num_rows:
            return
        exact = x.values.dtype == torch.float32
        tile = tiles.linear_tile(num_rows, padded, self.bits, self.group, exact, tiles.generation(y.device))
        split = self.splits > 1 and num_rows <= tiles.SPLIT_ROWS
        out = y if not split else torch.empty(self.splits, num_rows, self.num_columns, device=y.device)
        scale = x.values if x.scale is None else x.scale
        bias = y if self.bias is None else self.bias
        grid = (cdiv(padded, tile.columns), cdiv(num_rows, tile.rows), self.splits if split else 1)
        gptq_linear[grid](
            x.values,
            scale,
            self.words,
            self.words if self.high is None else self.high,
            self.scales,
            self.zeros,
            bias,
            out,
            num_rows,
            self.num_columns,
            x.values.stride(0),
            out.stride(-2),
            padded,
            self.words.shape[0],
            self.group_shift,
            BITS=self.bits,
            GROUP=self.group,
            EXACT=exact,
            SCALED=x.scale is not None,
            HAS_BIAS=self.bias is not None,
            ASSEMBLY=ASSEMBLY,
            BT=tile.rows,
            BN=tile.columns,
            SPLITS=self.splits,
            SPLIT_GRID=split,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        if split:
            add_parts_(out, x.scale, self.bias, y)


def pack_segment(parts: Sequence[GptqLinear], rows: UniformRows, device: torch.device) -> QuantisedSegment:
    """Lay out linears that have the same rows; unpacking and packing happen on the device, a part after the other."""
    bits = held_bits(parts[0].bits)
    num_columns = sum(part.out_features for part in parts)
    padding = -num_columns % tiles.COLUMNS
    packed = [_words(part, rows, bits, device) for part in parts]
    words = _side_by_side([words for words, _ in packed], padding)
    high = _side_by_side([high for _, high in packed], padding) if bits == 3 else None
    groups = rows.groups.to(device)
    scales = [part.scales.to(device)[groups] for part in parts]  # [pieces, N] each
    zeros = [part.zeros.to(device)[groups] for part in parts]
    block = BLOCK_ROWS[bits]
    return QuantisedSegment(
        bits=bits,
        words=words,
        high=high,
        scales=_side_by_side(scales, padding),
        zeros=_side_by_side(zeros, padding),
        bias=_biases(parts, padding, device),
        num_columns=num_columns,
        group=min(rows.piece, block),
        group_shift=ONE_GROUP if rows.piece == rows.width else max(0, (rows.piece // block).bit_length() - 1),
        splits=tiles.splits(words.shape[0], words.shape[1]),
    )


def _words(
    part: GptqLinear, rows: UniformRows, bits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    codes = unpack_rows(part.qweight.to(device), part.bits, part.planar)  # [K, N] uint8, original order of the rows
    return pack_words(codes[rows.source.clamp(min=0).to(device)], bits)  # padding rows meet activations of 0


def _side_by_side(tensors: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    """Concatenated along the columns (dimension 1), with columns of zeros behind them."""
    first = tensors[0]
    zeros = first.new_zeros(first.shape[0], padding, *first.shape[2:])
    together = [*tensors, zeros] if padding else list(tensors)
    return torch.cat(together, dim=1).contiguous() if len(together) > 1 else first.contiguous()


def _biases(parts: Sequence[GptqLinear], padding: int, device: torch.device) -> torch.Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    given = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    return torch.cat([*given, torch.zeros(padding)]).to(device)
