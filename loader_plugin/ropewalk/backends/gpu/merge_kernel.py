"""The states of chunks (see `attention_kernel.py`) merged in order into the result of a row.

result = ((chunk 0 + chunk 1) + chunk 2) + ...                             where a row's keys are of one kind
result = H (older 0 + older 1 + ...) + (recent 0 + recent 1 + ...)         with a recent window; H: `hadamard`
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.chunk_kernel import ALL, NOTHING, OLDER, RECENT, merged, seen_keys
from ropewalk.backends.gpu.formats_kernel import hadamard


@triton.jit
def _merged_states(
    states_ptr,
    accs_ptr,
    start,
    row,
    head,
    most_rows,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    WITHIN: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """(top, total, acc), [1] and [1, DP], of a row over a part of its keys. IS_WHOLE: one state has all chunks."""
    base, _ = seen_keys(start, PART, WINDOW, WITHIN, PAGE)
    first, end = seen_keys(start + row, PART, WINDOW, WITHIN, PAGE)
    base, first, stop = base // CHUNK, first // CHUNK, tl.cdiv(end, CHUNK)
    if IS_WHOLE:
        base, first, stop = 0 * base, 0 * first, 0 * stop + 1
    r_chunk = tl.arange(0, AT_ONCE)
    r_dim = tl.arange(0, DP)
    top = tl.full((1,), NOTHING, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, DP), tl.float32)
    for chunk in range(first, stop, AT_ONCE):
        here = chunk + r_chunk < stop
        place = (chunk + r_chunk - base).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        slot = (place * most_rows + row) * HEADS + head
        tops = tl.load(states_ptr + slot * 2, mask=here, other=NOTHING)
        totals = tl.load(states_ptr + slot * 2 + 1, mask=here, other=0.0)
        whole = here[:, None] & (r_dim < D)[None, :]
        accs = tl.load(accs_ptr + slot[:, None] * D + r_dim[None, :], mask=whole, other=0.0)
        for i in tl.static_range(AT_ONCE):
            this = r_chunk == i  # taken out by sums of it and of zeros, which are exact
            top2 = tl.sum(tl.where(this, tops, 0.0), 0)
            total2 = tl.sum(tl.where(this, totals, 0.0), 0)
            acc2 = tl.sum(tl.where(this[:, None], accs, 0.0), 0)
            top, total, acc = merged(top, total, acc, top2, total2, acc2[None, :])
    return top, total, acc


@triton.jit(do_not_specialize=["most_rows", "older_states"])
def merge_chunks(
    states_ptr,
    accs_ptr,
    out_ptr,
    positions_ptr,
    blocks_ptr,
    most_rows,
    older_states,
    OUT_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    WITHIN: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    H: tl.constexpr,
    ROOT: tl.constexpr,
):
    """Grid (blocks, most_rows, HEADS): the states of the chunks that a row sees, merged in order.

    states: [chunks, blocks, most_rows, HEADS, 2] float32 (top, total); accs: [..., D] float32. With a recent window the
    first `older_states` of them, counted in rows and heads, are of older keys; H: the size of the matrix that their
    values are turned back by, 1 for none. AT_ONCE states are loaded together: they come from far, and merging them
    takes but a few instructions.
    """
    block, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(blocks_ptr + block * 3 + 1)
    num_rows = tl.load(blocks_ptr + block * 3 + 2)
    if row < num_rows:
        start = tl.load(positions_ptr + first_row).to(tl.int32)
        top, total, acc = _merged_states(
            states_ptr,
            accs_ptr,
            start,
            row,
            head,
            most_rows,
            OLDER if WITHIN > 0 else ALL,
            WINDOW,
            WITHIN,
            HEADS,
            D,
            DP,
            CHUNK,
            PAGE,
            AT_ONCE,
            IS_WHOLE,
        )
        if WITHIN > 0:
            if H > 1:
                acc = hadamard(acc, DP, H, ROOT)
            top2, total2, acc2 = _merged_states(
                states_ptr + older_states.to(tl.int64) * 2,
                accs_ptr + older_states.to(tl.int64) * D,
                start,
                row,
                head,
                most_rows,
                RECENT,
                WINDOW,
                WITHIN,
                HEADS,
                D,
                DP,
                CHUNK,
                PAGE,
                AT_ONCE,
                IS_WHOLE,
            )
            top, total, acc = merged(top, total, acc, top2, total2, acc2)
        r_dim = tl.arange(0, DP)
        at = out_ptr + (first_row + row) * OUT_STRIDE + head * D + r_dim
        share = tl.div_rn(1.0, total)
        tl.store(at[None, :], acc * share[:, None], mask=(r_dim < D)[None, :])
