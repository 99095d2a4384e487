"""The second product of low-rank changes: y += h B^T, every tile of columns with the ranks of its own part."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def add_product(h_ptr, b_ptr, tiles_ptr, y_ptr, T, h_stride, b_stride, y_stride, BT: tl.constexpr, BN: tl.constexpr):
    """One tile of y [T, N]. h: [T, R], b: [N, r] float32. tiles: [num_tiles, 4], as in `GpuLowRank`."""
    BR: tl.constexpr = 16  # ranks at a time
    entry = tiles_ptr + tl.program_id(0) * 4
    first, end = tl.load(entry), tl.load(entry + 1)
    first_rank, num_ranks = tl.load(entry + 2), tl.load(entry + 3)
    columns = first + tl.arange(0, BN)
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    b_rows = b_ptr + tl.minimum(columns, end - 1).to(tl.int64) * b_stride  # [BN]
    h_rows = h_ptr + tl.minimum(rows, T - 1).to(tl.int64) * h_stride + first_rank  # [BT]
    acc = tl.zeros((BN, BT), tl.float32)
    for start in range(0, num_ranks, BR):
        rank = start + tl.arange(0, BR)
        there = rank < num_ranks
        b = tl.load(b_rows[:, None] + rank[None, :], mask=there[None, :], other=0.0)  # [BN, BR]
        h = tl.load(h_rows[None, :] + rank[:, None], mask=there[:, None], other=0.0)  # [BR, BT]
        acc = tl.dot(b, h, acc, input_precision="ieee")
    here = (columns < end)[:, None] & (rows < T)[None, :]
    at = y_ptr + (rows.to(tl.int64) * y_stride)[None, :] + columns[:, None]
    tl.store(at, tl.load(at, mask=here, other=0.0) + acc, mask=here)
