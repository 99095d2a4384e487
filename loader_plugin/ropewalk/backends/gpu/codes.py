"""GPTQ codes as the kernels read them: rows in groups of one size, two rows sixteen bits apart in a word.

Kernels see uniform groups only. The rows of a file, sorted by group, are padded so that every group is a whole number
of pieces of one size; a piece has the scales and zero points of its group, and a padding row meets an activation of 0.

A block holds 512 / bits rows of a column in 16 words of 32 bits; sub-block i is 32 rows of it. For 4 bits:

    word r of a block    bit 31 ......... 16   15 ........... 0
    of 128 rows          i=3 i=2 i=1 i=0       i=3 i=2 i=1 i=0        row 32 i + 2 r + 1 | row 32 i + 2 r

One mask gives the codes of two rows as the mantissas of two float16 numbers, side by side as the matrix instructions
take them. 3 bits are the low two in words of 2 bits, and the highest in 16 words of 16 bits more:

    high word r          bit 15    bit 14 ........ bit 3     bit 2     bit 1     bit 0
    of 256 rows          i=7 odd   i=7 even        i=1 odd   i=1 even  i=0 odd   i=0 even      row 32 i + 2 r + odd

5, 6 and 7 bits are held in 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ropewalk.gptq.linear import GptqLinear

BLOCK_ROWS = {2: 256, 3: 256, 4: 128, 8: 64}
SUB_BLOCK = 32
PIECES = tuple(SUB_BLOCK << i for i in range(6))  # rows of a piece of a group: 32 to 1024


def held_bits(bits: int) -> int:
    """The width in which kernels read codes of so many bits."""
    return bits if bits in BLOCK_ROWS else 8


@dataclass(frozen=True, slots=True, eq=False)
class UniformRows:
    """The rows of a linear in groups of one size.

    source: [Kp] int64, the original row of each, -1 for padding. groups: [Kp / piece] int64, the group of the file that
    each piece belongs to. piece: rows of a piece; Kp where all rows have the same scales.
    """

    source: torch.Tensor
    groups: torch.Tensor
    piece: int

    @property
    def width(self) -> int:
        """Kp, the number of rows with padding."""
        return self.source.numel()

    @property
    def is_plain(self) -> bool:
        """True if these are the rows of the file, with padding only behind them."""
        num_rows = int((self.source >= 0).sum())
        return torch.equal(self.source[:num_rows], torch.arange(num_rows))


def uniform_rows(linear: GptqLinear) -> UniformRows:
    """The sorted rows of a linear, cut into pieces of the size that needs the least padding."""
    block = BLOCK_ROWS[held_bits(linear.bits)]
    sizes = linear.group_starts.diff().cpu()  # [G]
    if int((sizes > 0).sum()) == 1:
        piece = _up(linear.in_features, block)
    else:
        piece = min(PIECES, key=lambda each: (_up(int(_padded(sizes, each).sum()), block), -each))
    padded = _padded(sizes, piece)  # [G]
    width = _up(int(padded.sum()), block)
    numbers = torch.arange(len(sizes))
    moved = padded.cumsum(0) - padded - linear.group_starts[:-1].cpu()  # how far padding moves the rows of each group
    to = torch.arange(linear.in_features) + torch.repeat_interleave(moved, sizes)  # [K]
    source = torch.full((width,), -1)
    source[to] = torch.arange(linear.in_features) if linear.order is None else linear.order.cpu().long()
    groups = torch.repeat_interleave(numbers, padded // piece)
    tail = width // piece - len(groups) if piece < width else 0  # pieces that only fill the last block
    return UniformRows(source, torch.cat([groups, groups[-1:].expand(tail)]), piece)


def pack_words(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The words of codes [Kp, N] uint8, and the high words of 3-bit codes.

    bits: 2, 3, 4 or 8; Kp is a multiple of the rows of a block. Returns [blocks, N, 16] int32 and int16, contiguous.
    """
    width = 2 if bits == 3 else bits
    low = codes & 3 if bits == 3 else codes
    words = _interleaved(low, BLOCK_ROWS[bits], torch.int32, lambda i, odd: width * i + 16 * odd)
    if bits != 3:
        return words, None
    return words, _interleaved(codes >> 2, BLOCK_ROWS[3], torch.int16, lambda i, odd: 2 * i + odd)


def _interleaved(codes: torch.Tensor, block: int, dtype: torch.dtype, shift: Callable[[int, int], int]) -> torch.Tensor:
    """Row 32 i + 2 r + odd of a block goes to bit shift(i, odd) of word r."""
    num_rows, num_columns = codes.shape
    pairs = codes.view(num_rows // block, block // SUB_BLOCK, 16, 2, num_columns)  # [blocks, subs, 16, 2, N]
    words = torch.zeros(num_rows // block, 16, num_columns, dtype=dtype, device=codes.device)
    for i in range(block // SUB_BLOCK):
        for odd in (0, 1):
            words |= pairs[:, i, :, odd].to(dtype) << shift(i, odd)
    return words.transpose(1, 2).contiguous()  # [blocks, N, 16]


def _padded(sizes: torch.Tensor, piece: int) -> torch.Tensor:
    return -(-sizes // piece) * piece


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
