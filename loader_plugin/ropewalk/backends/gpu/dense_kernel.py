"""Products of float32 activations with weights in float16, bfloat16 or float32: y = x W^T + bias.

    y^T = sum over parts of K, in order, of    W high(x)^T + W low(x)^T

Weights of 16 bits are exact in the 11 bits of tf32, and x is the sum of two numbers of so many bits to within 2^-21 of
it: tensor cores give nearly float32 at two instructions of half the rate of float16. float32 weights, and all in
"exact", are multiplied in float32. Weights are read once, as they are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.linear_kernel import finished


@triton.jit
def _part(
    x_rows,
    weight_rows,
    K,
    first,
    end,
    IEEE: tl.constexpr,
    EVEN: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """W x^T over the features first..end: [BN, BT]. x_rows: [BT], weight_rows: [BN] pointers to rows."""
    acc = tl.zeros((BN, BT), tl.float32)
    for start in range(first, end, BK):
        k = start + tl.arange(0, BK)
        if EVEN:
            w = tl.load(weight_rows[:, None] + k[None, :])  # [BN, BK]
            x = tl.load(x_rows[None, :] + k[:, None])  # [BK, BT]
        else:
            w = tl.load(weight_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
            x = tl.load(x_rows[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
        w = w.to(tl.float32)
        if IEEE:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # its first 11 bits
            acc = tl.dot(w, x - high, acc, input_precision="tf32")
            acc = tl.dot(w, high, acc, input_precision="tf32")
    return acc


@triton.jit(do_not_specialize=["T", "num_blocks"])
def dense_linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    T,
    N,
    K,
    x_stride,
    y_stride,
    num_blocks,
    IEEE: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
):
    """One tile of y [T, N]; with SPLIT_GRID, of the sums [SPLITS, T, N] of the parts of K, before the bias.

    num_blocks: of BK features, the last may be shorter. Rows and columns past the last repeat it: only K needs masks.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    weight_rows = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64) * K  # [BN]
    x_rows = x_ptr + tl.minimum(rows, T - 1).to(tl.int64) * x_stride  # [BT]
    here = (columns < N)[:, None] & (rows < T)[None, :]
    per_part = (num_blocks + SPLITS - 1) // SPLITS
    if SPLIT_GRID:
        part = tl.program_id(2)
        first, end = part * per_part, tl.minimum((part + 1) * per_part, num_blocks)
        total = _part(x_rows, weight_rows, K, first * BK, end * BK, IEEE, EVEN, BT, BN, BK)
        y_rows = y_ptr + (part * T + rows).to(tl.int64) * y_stride
    else:
        total = tl.zeros((BN, BT), tl.float32)
        for part in range(SPLITS):
            first, end = part * per_part, tl.minimum((part + 1) * per_part, num_blocks)
            total += _part(x_rows, weight_rows, K, first * BK, end * BK, IEEE, EVEN, BT, BN, BK)
        total = finished(total, 0.0, bias_ptr, columns, columns < N, False, HAS_BIAS)
        y_rows = y_ptr + rows.to(tl.int64) * y_stride
    tl.store(y_rows[None, :] + columns[:, None], total, mask=here)
