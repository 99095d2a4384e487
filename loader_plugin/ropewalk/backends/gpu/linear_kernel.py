"""Products of activations with GPTQ weights: y = x W + bias, on tensor cores or in float32.

    y^T = sum over parts of K, in order, of    sum over groups of    scale(group) * ((code - zero)^T x^T)

A row of y depends on its own row of x and on constants of the weights: the tree of sums is the same where every part of
K is a program of its own (few rows) and where one program takes them one after the other (many rows).

The transposed form makes the weights the first operand of the matrix instructions: on Hopper they come from registers,
where they were unpacked, and a batch of one row needs no more of them than one of sixteen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ropewalk.backends.gpu import tiles


@triton.jit
def _integers(words, high, offset, i: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """code - zero of sub-block i of a block as float16 [BN, 32]: codes are put into mantissas, nothing is converted.

    words: [BN, 16] int32, high: the same of the highest bits of 3-bit codes (see codes.py). offset: [BN] float16,
    -1024 - zero. A code at bit p of 0x6400 is 1024 + 2^p code; that times 2^-p, minus 1024 2^-p + zero, is one fused
    operation, and exact. So only every eighth bit needs a shift.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    SHIFT: tl.constexpr = WIDTH * i // 8 * 8
    P: tl.constexpr = WIDTH * i % 8
    word = 0x64006400
    if BITS == 3:
        word = ((high << 2 if i < 4 else high >> 6) & (0x00040004 << P)) | word
    word = ((words >> SHIFT) & (((1 << WIDTH) - 1) * 0x00010001 << P)) | word
    step = tl.full((1, 1), 1.0 / (1 << P), tl.float16)
    offset = (offset + (1024.0 - 1024.0 / (1 << P)) if P else offset)[:, None]
    if ASSEMBLY:  # two of them in one instruction, which the compiler does not find
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .b32 t, m, z; mov.b32 m, {$3, $3}; mov.b32 z, {$4, $4}; "
            "fma.rn.f16x2 t, $2, m, z; mov.b32 {$0, $1}, t; }",
            "=h,=h,r,h,h",
            [word, step, offset],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        even = word.to(tl.int16).to(tl.float16, bitcast=True) * step + offset
        odd = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True) * step + offset
    return tl.join(even, odd).reshape(words.shape[0], 32)


@triton.jit
def _part(
    x_rows,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    columns,
    num_columns,
    group_shift,
    first,
    end,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """W^T x^T over the blocks first..end of K: [BN, BT] float32. x_rows: [BT] pointers to rows of x."""
    SUBS: tl.constexpr = 8 if BITS == 3 else 16 // BITS  # sub-blocks of 32 rows in a block
    GROUPS: tl.constexpr = SUBS * 32 // GROUP  # in a block; at least one
    words_of_column = tl.arange(0, 16)
    rows_of_sub = tl.arange(0, 32)
    acc = tl.zeros((BN, BT), tl.float32)
    for block in range(first, end):
        at = (block * num_columns + columns[:, None]) * 16 + words_of_column[None, :]
        words = tl.load(words_ptr + at)  # [BN, 16]
        high = words
        if BITS == 3:
            high = tl.load(high_ptr + at).to(tl.int32)
            high = (high & 0x5555) | ((high & 0xAAAA) << 15)  # of even rows at bit 2 i, of odd rows at bit 16 + 2 i
        group = (block >> group_shift) * GROUPS
        part = tl.zeros((BN, BT), tl.float32)
        for i in tl.static_range(SUBS):
            if (i * 32) % GROUP == 0:
                at_group = (group + i * 32 // GROUP) * num_columns + columns
                scale = tl.load(scales_ptr + at_group).to(tl.float32)  # [BN]
                zero = tl.load(zeros_ptr + at_group).to(tl.int16)  # [BN]
                offset = (zero | -0x1C00).to(tl.float16, bitcast=True)  # 0xE400 | zero: -1024 - zero
            x = tl.load(x_rows[None, :] + ((block * SUBS + i) * 32 + rows_of_sub)[:, None])  # [32, BT]
            w = _integers(words, high, offset, i, BITS, ASSEMBLY)  # [BN, 32]
            part = tl.dot(w.to(tl.float32), x, part, input_precision="ieee") if EXACT else tl.dot(w, x, part)
            if (i * 32 + 32) % GROUP == 0:
                acc += part * scale[:, None]
                part = tl.zeros((BN, BT), tl.float32)
    return acc


@triton.jit
def finished(total, row_scale, bias_ptr, columns, here, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sum of all parts, [BN, BT], times the scales of the rows, plus the biases of the columns."""
    if SCALED:
        total = total * row_scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=here, other=0.0)[:, None]
    return total


@triton.jit(do_not_specialize=["T", "num_blocks", "group_shift"])
def gptq_linear(
    x_ptr,
    row_scale_ptr,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    T,
    N,
    x_stride,
    y_stride,
    num_columns,
    num_blocks,
    group_shift,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
):
    """One tile of y [T, N]; with SPLIT_GRID, of the sums [SPLITS, T, N] of the parts of K, before scale and bias.

    num_columns: N with padding. Rows past T repeat the last one: no load needs a mask.
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    x_rows = x_ptr + tl.minimum(rows, T - 1).to(tl.int64) * x_stride  # [BT]
    store_product(x_rows, row_scale_ptr + rows, words_ptr, high_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr, rows,
                  rows < T, columns, T, N, y_stride, num_columns, num_blocks, group_shift, BITS, GROUP, EXACT, SCALED,
                  HAS_BIAS, ASSEMBLY, BT, BN, SPLITS, SPLIT_GRID)  # fmt: skip


@triton.jit
def store_product(
    x_rows,
    row_scales,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    rows,
    rows_here,
    columns,
    T,
    N,
    y_stride,
    num_columns,
    num_blocks,
    group_shift,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EXACT: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
):
    """The tile of y, or of the sums of a part of K, of some `columns`: [BN] and `rows`: [BT] where `rows_here`.

    x_rows: [BT] pointers to the rows of x; row_scales: [BT] pointers to their scales.
    """
    here = (columns < N)[:, None] & rows_here[None, :]
    per_part = (num_blocks + SPLITS - 1) // SPLITS
    if SPLIT_GRID:
        part = tl.program_id(2)
        first, end = part * per_part, tl.minimum((part + 1) * per_part, num_blocks)
        total = _part(x_rows, words_ptr, high_ptr, scales_ptr, zeros_ptr, columns, num_columns, group_shift, first, end,
                      BITS, GROUP, EXACT, ASSEMBLY, BT, BN)  # fmt: skip
        y_rows = y_ptr + (part * T + rows).to(tl.int64) * y_stride
    else:
        total = tl.zeros((BN, BT), tl.float32)
        for part in range(SPLITS):
            first, end = part * per_part, tl.minimum((part + 1) * per_part, num_blocks)
            total += _part(x_rows, words_ptr, high_ptr, scales_ptr, zeros_ptr, columns, num_columns, group_shift,
                           first, end, BITS, GROUP, EXACT, ASSEMBLY, BT, BN)  # fmt: skip
        row_scale = tl.zeros((BT,), tl.float32)
        if SCALED:
            row_scale = tl.load(row_scales, mask=rows_here, other=0.0)
        total = finished(total, row_scale, bias_ptr, columns, columns < N, SCALED, HAS_BIAS)
        y_rows = y_ptr + rows.to(tl.int64) * y_stride
    tl.store(y_rows[None, :] + columns[:, None], total, mask=here)


@triton.jit(do_not_specialize=["T"])
def sum_parts(
    parts_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    T,
    N,
    y_stride,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
):
    """y = (0 + part 0 + part 1 + ...) * scale + bias of one row, in the order of gptq_linear."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1)
    here = columns < N
    total = tl.zeros((BN,), tl.float32)
    for part in range(SPLITS):
        at = (part * T + row).to(tl.int64) * N
        total += tl.load(parts_ptr + at + columns, mask=here, other=0.0)
    row_scale = tl.zeros((1,), tl.float32)
    if SCALED:
        row_scale += tl.load(row_scale_ptr + row)
    total = finished(total[:, None], row_scale, bias_ptr, columns, here, SCALED, HAS_BIAS)
    tl.store(y_ptr + row.to(tl.int64) * y_stride + columns[:, None], total, mask=here[:, None])


def add_parts_(parts: torch.Tensor, row_scale: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """y = (sum of parts) * row_scale + bias. parts: [SPLITS, T, N], row_scale: [T], bias: [N] or longer, y: [T, N]."""
    splits, num_rows, num_columns = parts.shape
    sum_parts[(triton.cdiv(num_columns, tiles.SUM_COLUMNS), num_rows)](
        parts,
        parts if row_scale is None else row_scale,
        parts if bias is None else bias,
        y,
        num_rows,
        num_columns,
        y.stride(0),
        SCALED=row_scale is not None,
        HAS_BIAS=bias is not None,
        SPLITS=splits,
        BN=tiles.SUM_COLUMNS,
        num_warps=tiles.SUM_WARPS,
        enable_fp_fusion=True,
    )
