"""Mixtures of experts: which experts a row has, products with the weights of these alone, and their sum.

A pair is a row with one of its experts: pair t * TOP_K + j is row t with the j-th of them. An expert's weights are
found through its number, which is read on the device: the host never knows it, and a captured step is replayed for any.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.linear_kernel import finished, store_product


@triton.jit
def route(
    logits_ptr,
    out_ptr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISED: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T,). logits: [T, EXPERTS] float32; out: [T, 2, TOP_K] float32: numbers of the experts, ascending; shares.

    The largest logit is taken TOP_K times, of equal ones the first; NaN is the least of all, so that whatever the
    logits are, TOP_K different experts are taken.
    """
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, B)
    logits = tl.load(logits_ptr + row * X_STRIDE + number, mask=number < EXPERTS, other=float("-inf"))
    share = tl.exp(logits - tl.max(logits, 0))
    share = tl.div_rn(share, tl.zeros((B,), tl.float32) + tl.sum(share, 0))
    ranked = tl.where(logits == logits, logits, float("-inf"))
    free = number < EXPERTS
    for _ in range(TOP_K):
        most = tl.max(tl.where(free, ranked, float("-inf")), 0)
        taken = tl.min(tl.where(free & (ranked == most), number, B), 0)
        free = free & (number != taken)
    chosen = (number < EXPERTS) & (free == 0)
    if NORMALISED:
        share = tl.div_rn(share, tl.zeros((B,), tl.float32) + tl.sum(tl.where(chosen, share, 0.0), 0))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    at = out_ptr + row * OUT_STRIDE + place
    tl.store(at, number.to(tl.float32), mask=chosen)
    tl.store(at + TOP_K, share, mask=chosen)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_shift", "pieces"])
def expert_linear(
    x_ptr,
    row_scale_ptr,
    words_ptr,
    high_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    slots_ptr,
    experts_ptr,
    tiles_ptr,
    pairs_ptr,
    num_pairs,
    N,
    x_stride,
    y_stride,
    num_columns,
    num_blocks,
    group_shift,
    pieces,
    TIMES: tl.constexpr,
    GROUPED: tl.constexpr,
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
    """y [pairs, N]: each pair's row of x times the weights of its expert. As `gptq_linear`, with the same bits.

    Grid (tiles of columns, tiles of pairs, parts of K). A tile of pairs is one of them, whose expert is in experts:
    [pairs] int32; or, GROUPED, entry (expert, first, count) of tiles: [., 3] int32, `count` of the pairs that are
    ordered by their experts, pairs: [pairs] int32. Weights are stacked; slots: [E] int32, the place of each expert in
    the stack, -1 for one of another stack. TIMES pairs share a row of x.
    """
    tile = tl.program_id(1)
    if GROUPED:
        expert = tl.load(tiles_ptr + tile * 3)
        first = tl.load(tiles_ptr + tile * 3 + 1)
        count = tl.load(tiles_ptr + tile * 3 + 2)
    else:
        expert = tl.load(experts_ptr + tile)
        first, count = tile, 1
    slot = tl.load(slots_ptr + expert).to(tl.int64)
    if (count > 0) & (slot >= 0):
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        place = tl.arange(0, BT)
        pairs = first + tl.minimum(place, count - 1)
        if GROUPED:
            pairs = tl.load(pairs_ptr + pairs)
        rows = pairs // TIMES
        weights = slot * num_blocks * num_columns * 16
        groups = slot * pieces * num_columns
        store_product(x_ptr + rows.to(tl.int64) * x_stride, row_scale_ptr + rows, words_ptr + weights,
                      high_ptr + weights, scales_ptr + groups, zeros_ptr + groups, bias_ptr + slot * num_columns,
                      y_ptr, pairs, place < count, columns, num_pairs, N, y_stride, num_columns, num_blocks,
                      group_shift, BITS, GROUP, EXACT, SCALED, HAS_BIAS, ASSEMBLY, BT, BN, SPLITS,
                      SPLIT_GRID)  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"])
def sum_expert_parts(
    parts_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    slots_ptr,
    experts_ptr,
    num_pairs,
    N,
    y_stride,
    num_columns,
    TIMES: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (tiles of columns, pairs): y = (0 + part 0 + part 1 + ...) * scale + bias, in the order of expert_linear."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    pair = tl.program_id(1)
    slot = tl.load(slots_ptr + tl.load(experts_ptr + pair)).to(tl.int64)
    if slot >= 0:
        here = columns < N
        total = tl.zeros((BN,), tl.float32)
        for part in range(SPLITS):
            at = (part * num_pairs + pair).to(tl.int64) * N
            total += tl.load(parts_ptr + at + columns, mask=here, other=0.0)
        row_scale = tl.zeros((1,), tl.float32)
        if SCALED:
            row_scale += tl.load(row_scale_ptr + pair // TIMES)
        bias = bias_ptr + slot * num_columns
        total = finished(total[:, None], row_scale, bias, columns, here, SCALED, HAS_BIAS)
        tl.store(y_ptr + pair.to(tl.int64) * y_stride + columns[:, None], total, mask=here[:, None])


@triton.jit
def combine(
    y_ptr,
    routes_ptr,
    out_ptr,
    ROUTES_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T, tiles of B). out = sum over the pairs of a row, in order, of share * y; y: [T * TOP_K, SIZE] float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros((B,), tl.float32)
    for j in range(TOP_K):
        share = tl.load(routes_ptr + row * ROUTES_STRIDE + TOP_K + j)
        total += share * tl.load(y_ptr + (row * TOP_K + j) * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(out_ptr + row * OUT_STRIDE + at, total, mask=at < SIZE)
