"""Low-rank changes of linears that read the same input: y += (x A^T) B^T in float32, all parts in two products.

The first product is that of a dense linear whose weights are the rows of all A. The second runs over tiles of columns,
none of which lies in two parts; a table says which ranks each of them takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton import cdiv

from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.dense import multiply_
from ropewalk.backends.gpu.low_rank_kernel import add_product
from ropewalk.backends.protocol import LowRankPart
from ropewalk.base.errors import ShapeError


@dataclass(frozen=True, slots=True, eq=False)
class GpuLowRank:
    """a: [R, K] float32, the ranks of all parts one after the other. b: [N, r] float32, r the largest rank of a part.

    tiles: [num_tiles, 4] int32: first column, end of columns, first row of A and how many, of one part.
    """

    a: torch.Tensor
    b: torch.Tensor
    tiles: torch.Tensor
    splits: int

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices and of the table."""
        return self.a.nbytes + self.b.nbytes + self.tiles.nbytes


def pack(parts: Sequence[LowRankPart], device: torch.device) -> GpuLowRank:
    """Lay out the change of linears that were packed together; at least one part has a rank above 0."""
    ranks = [part.a.shape[0] for part in parts]
    a = torch.cat([part.a.to(device, torch.float32) for part in parts])  # [R, K]
    b = torch.zeros(sum(part.b.shape[0] for part in parts), max(ranks), device=device)  # [N, r]
    table: list[list[int]] = []
    first = 0
    for number, part in enumerate(parts):
        end, rank = first + part.b.shape[0], ranks[number]
        b[first:end, :rank] = part.b.to(device)
        if rank:
            starts = range(first, end, tiles.LOW_RANK_COLUMNS)
            table += [[at, min(at + tiles.LOW_RANK_COLUMNS, end), sum(ranks[:number]), rank] for at in starts]
        first = end
    blocks = cdiv(a.shape[1], tiles.DENSE_FEATURES)
    placed = torch.tensor(table, dtype=torch.int32, device=device)
    return GpuLowRank(a, b, placed, tiles.splits(blocks, a.shape[0]))


def add_(y: torch.Tensor, x: torch.Tensor, change: GpuLowRank, first: int, end: int) -> None:
    """y += (x A^T) B^T in rows first..end.

    x: [T, K] float32 in the original order of features, y: [T, N] float32; columns contiguous, rows may lie apart.

    Raises:
        ShapeError: x or y has another shape or dtype, or columns that lie apart.
    """
    num_features, num_columns = change.a.shape[1], change.b.shape[0]
    for name, tensor, width in (("x", x, num_features), ("y", y, num_columns)):
        if tensor.shape != (x.shape[0], width) or tensor.dtype != torch.float32 or tensor.stride(1) != 1:
            raise ShapeError(
                f"low rank: {name} must be [T, {width}] float32 with contiguous columns, "
                f"got {list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )
    num_rows = end - first
    if num_rows <= 0:
        return
    inner = torch.empty(num_rows, change.a.shape[0], device=y.device)  # [rows, R]
    multiply_(x[first:end], change.a, None, inner, change.splits, ieee=True)
    out, (num_tiles, _) = y[first:end], change.tiles.shape
    add_product[(num_tiles, cdiv(num_rows, tiles.LOW_RANK_ROWS))](
        inner,
        change.b,
        change.tiles,
        out,
        num_rows,
        inner.stride(0),
        change.b.stride(0),
        out.stride(0),
        BT=tiles.LOW_RANK_ROWS,
        BN=tiles.LOW_RANK_COLUMNS,
        num_warps=tiles.LOW_RANK_WARPS,
        enable_fp_fusion=True,
    )
