"""Causal attention of rows over the pages of their sequences.

    out_i = sum_j p_ij v_j / sum_j p_ij     p_ij = 2^(s_ij - m_i)     s_ij = (q_i log2(e) / sqrt(D)) k_j     j <= i

A sequence's keys are cut at multiples of CHUNK positions. The state of a row in a chunk, (top, total, acc) for the
maximum and the two sums, is computed from nothing, BLOCK keys at a time, and the states of chunks are merged in order.
That is the same tree of operations whether one program walks over all chunks (`attend_whole`) or each chunk has its own
(`attend_chunks`, then `merge_chunks`), for any number of rows: blocks and chunks in which a row sees nothing leave its
state as it is, bit for bit. The total is taken by the same matrix instructions as acc, because the order in which
`tl.sum` adds depends on how many rows and warps a program has. Compile without fusing multiplications and additions,
for the same reason.

A tile has ROWS rows; row r is query r // G of its block, and of the G query heads of a key/value head it is r % G.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-1.0e30)  # the maximum of no scores: finite, so that differences of two are
_ONES = tl.constexpr(16)  # columns of ones that the sum is taken with: the narrowest product of all cards


@triton.jit
def _nothing(ROWS: tl.constexpr):
    """(top, total) of rows that have seen no key."""
    return tl.full((ROWS,), _NOTHING, tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def _merged(top, total, acc, top2, total2, acc2):
    """The state of rows that have seen the keys of both states."""
    new_top = tl.maximum(top, top2)
    a, b = tl.exp2(top - new_top), tl.exp2(top2 - new_top)
    return new_top, total * a + total2 * b, acc * a[:, None] + acc2 * b[:, None]


@triton.jit
def _dot(a, b, acc, FP16_DOT: tl.constexpr):
    return tl.dot(a, b, acc) if FP16_DOT else tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _key_blocks(
    top,
    sums,
    acc,
    q,
    pos,
    pages_ptr,
    head_offset,
    value_offset,
    first,
    stop,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP16_PAGES: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """The state after keys first..stop, block by block. Not MASKED: whole blocks whose keys all rows see."""
    stored = tl.float16 if FP16_PAGES else tl.float32
    multiplied = tl.float16 if FP16_DOT else tl.float32
    ones = tl.full((BLOCK, _ONES), 1.0, multiplied)
    r_key = tl.arange(0, BLOCK)
    r_dim = tl.arange(0, DP)
    at = r_key * D
    for key in range(first, stop, BLOCK):
        page = tl.multiple_of(tl.load(pages_ptr + key // PAGE).to(tl.pointer_type(stored)), 16)
        keys = page + (head_offset + key % PAGE * D)
        k_here, v_here = (r_dim < D)[:, None], (r_dim < D)[None, :]
        if MASKED:
            here = key + r_key < stop
            k_here, v_here = k_here & here[None, :], v_here & here[:, None]
        k = tl.load(keys + (at[None, :] + r_dim[:, None]), mask=k_here, other=0.0).to(multiplied)  # [DP, BLOCK]
        v = tl.load(keys + value_offset + (at[:, None] + r_dim[None, :]), mask=v_here, other=0.0)  # [BLOCK, DP]
        scores = _dot(q, k, tl.zeros((ROWS, BLOCK), tl.float32), FP16_DOT)
        if MASKED:
            seen = (key + r_key)[None, :] <= pos[:, None]
            if WINDOW > 0:
                seen = seen & ((key + r_key)[None, :] > pos[:, None] - WINDOW)
            scores = tl.where(seen, scores, _NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        alpha = tl.exp2(top - new_top)
        sums = _dot(p.to(multiplied), ones, sums * alpha[:, None], FP16_DOT)
        acc = _dot(p.to(multiplied), v.to(multiplied), acc * alpha[:, None], FP16_DOT)
        top = new_top
    return top, sums, acc


@triton.jit
def _chunk_state(
    q,
    pos,
    low,
    pages_ptr,
    head_offset,
    value_offset,
    first,
    stop,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP16_PAGES: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """State of ROWS queries q: [ROWS, DP] over keys first..stop of one chunk; first: of a block.

    pos: [ROWS] their positions; low: the least of them. Most blocks are seen whole and need no mask; with a window few
    are, and float32 products leave no registers for a second loop.
    """
    top, _ = _nothing(ROWS)
    sums = tl.zeros((ROWS, _ONES), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    if WINDOW == 0 and FP16_DOT:
        whole = tl.minimum(stop, (low + 1) // BLOCK * BLOCK)
        top, sums, acc = _key_blocks(
            top,
            sums,
            acc,
            q,
            pos,
            pages_ptr,
            head_offset,
            value_offset,
            first,
            whole,
            False,
            WINDOW,
            ROWS,
            D,
            DP,
            PAGE,
            BLOCK,
            FP16_PAGES,
            FP16_DOT,
        )
        first = tl.maximum(first, whole)
    top, sums, acc = _key_blocks(
        top,
        sums,
        acc,
        q,
        pos,
        pages_ptr,
        head_offset,
        value_offset,
        first,
        stop,
        True,
        WINDOW,
        ROWS,
        D,
        DP,
        PAGE,
        BLOCK,
        FP16_PAGES,
        FP16_DOT,
    )
    return top, tl.max(sums, 1), acc  # all columns of sums are alike


@triton.jit
def _tile(blocks_ptr, positions_ptr, HKV: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """What a program works on: span, first row of its block in the step, rows of the block, key/value head, first of
    the tile's rows among the G times as many of the block, position of the block's first row.
    """
    block = tl.program_id(0)
    span = tl.load(blocks_ptr + block * 3)
    first_row = tl.load(blocks_ptr + block * 3 + 1)
    num_rows = tl.load(blocks_ptr + block * 3 + 2).to(tl.int32)
    kv_head = tl.program_id(1) % HKV
    packed = (tl.program_id(1) // HKV) * ROWS
    start = tl.load(positions_ptr + first_row).to(tl.int32)
    return span, first_row, num_rows, kv_head, packed, start


@triton.jit
def _queries(
    q_ptr,
    q_rows,
    heads,
    here,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """[ROWS, DP] scaled queries; zeros in rows that are not here and beyond D."""
    r_dim = tl.arange(0, DP)
    at = q_ptr + q_rows[:, None] * Q_STRIDE + heads[:, None] * D + r_dim[None, :]
    q = tl.load(at, mask=here[:, None] & (r_dim < D)[None, :], other=0.0) * qk_scale
    return q.to(tl.float16) if FP16_DOT else q


@triton.jit(do_not_specialize=["width", "instance"])
def attend_whole(
    q_ptr,
    out_ptr,
    pages_ptr,
    positions_ptr,
    blocks_ptr,
    width,
    instance,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP16_PAGES: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """Grid (blocks, HKV * tiles of a block). One program walks over all chunks that its rows see.

    From chunk to chunk acc stays in `out`: another accumulator in registers would spill.
    """
    span, first_row, num_rows, kv_head, packed, start = _tile(blocks_ptr, positions_ptr, HKV, G, ROWS)
    if packed < num_rows * G:
        row = (packed + tl.arange(0, ROWS)) // G
        heads = kv_head * G + (packed + tl.arange(0, ROWS)) % G
        here = row < num_rows
        q = _queries(q_ptr, first_row + row, heads, here, qk_scale, Q_STRIDE, D, DP, FP16_DOT)
        low = start + packed // G
        stop = start + tl.minimum((packed + ROWS - 1) // G, num_rows - 1) + 1
        first = tl.maximum(low - WINDOW + 1, 0) // BLOCK * BLOCK if WINDOW > 0 else 0
        top, total = _nothing(ROWS)
        for chunk in range(first // CHUNK, tl.cdiv(stop, CHUNK)):
            top2, total2, acc2 = _chunk_state(
                q,
                start + row,
                low,
                pages_ptr + span * width,
                (instance.to(tl.int64) * 2 * HKV + kv_head) * PAGE * D,
                HKV * PAGE * D,
                tl.maximum(first, chunk * CHUNK),
                tl.minimum(stop, (chunk + 1) * CHUNK),
                WINDOW,
                ROWS,
                D,
                DP,
                PAGE,
                BLOCK,
                FP16_PAGES,
                FP16_DOT,
            )
            # Read again: the addresses below would otherwise be held in registers while the keys go by.
            first_row = tl.load(blocks_ptr + tl.program_id(0) * 3 + 1, volatile=True)
            r_dim = tl.arange(0, DP)
            at = out_ptr + (first_row + row)[:, None] * OUT_STRIDE + heads[:, None] * D + r_dim[None, :]
            whole = here[:, None] & (r_dim < D)[None, :]
            begun = (chunk + 0 * row > first // CHUNK)[:, None]  # by row, as a mask has to be
            acc = tl.load(at, mask=whole & begun, other=0.0)
            top, total, acc = _merged(top, total, acc, top2, total2, acc2)
            last = (chunk + 1) * CHUNK >= stop
            share = tl.div_rn(1.0, tl.where(here & last, total, 1.0))
            tl.store(at, acc * share[:, None], mask=whole)
            tl.debug_barrier()  # what one thread has written here, another may read in the next chunk


@triton.jit(do_not_specialize=["width", "instance", "most_rows"])
def attend_chunks(
    q_ptr,
    states_ptr,
    accs_ptr,
    pages_ptr,
    positions_ptr,
    blocks_ptr,
    width,
    instance,
    most_rows,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP16_PAGES: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """Grid (blocks, HKV * tiles of a block, chunks), chunks counted from the first that the block's first row sees.

    states: [chunks, blocks, most_rows, Hq, 2] float32 (top, total); accs: [chunks, blocks, most_rows, Hq, D] float32.
    """
    span, first_row, num_rows, kv_head, packed, start = _tile(blocks_ptr, positions_ptr, HKV, G, ROWS)
    first_chunk = tl.maximum(start - WINDOW + 1, 0) // CHUNK if WINDOW > 0 else 0
    chunk = first_chunk + tl.program_id(2)
    stop = start + tl.minimum((packed + ROWS - 1) // G, num_rows - 1) + 1
    if (packed < num_rows * G) & (chunk * CHUNK < stop):
        row = (packed + tl.arange(0, ROWS)) // G
        heads = kv_head * G + (packed + tl.arange(0, ROWS)) % G
        here = row < num_rows
        q = _queries(q_ptr, first_row + row, heads, here, qk_scale, Q_STRIDE, D, DP, FP16_DOT)
        first = tl.maximum(start + packed // G - WINDOW + 1, 0) // BLOCK * BLOCK if WINDOW > 0 else 0
        top, total, acc = _chunk_state(
            q,
            start + row,
            start + packed // G,
            pages_ptr + span * width,
            (instance.to(tl.int64) * 2 * HKV + kv_head) * PAGE * D,
            HKV * PAGE * D,
            tl.maximum(first, chunk * CHUNK),
            tl.minimum(stop, (chunk + 1) * CHUNK),
            WINDOW,
            ROWS,
            D,
            DP,
            PAGE,
            BLOCK,
            FP16_PAGES,
            FP16_DOT,
        )
        block = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        slot = (block * most_rows + row) * (HKV * G) + heads
        r_dim = tl.arange(0, DP)
        tl.store(states_ptr + slot * 2, top, mask=here)
        tl.store(states_ptr + slot * 2 + 1, total, mask=here)
        tl.store(accs_ptr + slot[:, None] * D + r_dim[None, :], acc, mask=here[:, None] & (r_dim < D)[None, :])


@triton.jit(do_not_specialize=["most_rows"])
def merge_chunks(
    states_ptr,
    accs_ptr,
    out_ptr,
    positions_ptr,
    blocks_ptr,
    most_rows,
    OUT_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (blocks, most_rows, HEADS): the states of the chunks that a row sees, merged in order.

    AT_ONCE states are loaded together: they come from far, and merging them takes but a few instructions.
    """
    block, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(blocks_ptr + block * 3 + 1)
    num_rows = tl.load(blocks_ptr + block * 3 + 2)
    if row < num_rows:
        start = tl.load(positions_ptr + first_row).to(tl.int32)
        base = tl.maximum(start - WINDOW + 1, 0) // CHUNK if WINDOW > 0 else 0
        first = tl.maximum(start + row - WINDOW + 1, 0) // CHUNK if WINDOW > 0 else 0
        stop = (start + row) // CHUNK + 1
        r_chunk = tl.arange(0, AT_ONCE)
        r_dim = tl.arange(0, DP)
        top = tl.full((1,), _NOTHING, tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((1, DP), tl.float32)
        for chunk in range(first, stop, AT_ONCE):
            here = chunk + r_chunk < stop
            place = (chunk + r_chunk - base).to(tl.int64) * tl.num_programs(0) + block
            slot = (place * most_rows + row) * HEADS + head
            tops = tl.load(states_ptr + slot * 2, mask=here, other=_NOTHING)
            totals = tl.load(states_ptr + slot * 2 + 1, mask=here, other=0.0)
            whole = here[:, None] & (r_dim < D)[None, :]
            accs = tl.load(accs_ptr + slot[:, None] * D + r_dim[None, :], mask=whole, other=0.0)
            for i in tl.static_range(AT_ONCE):
                this = r_chunk == i  # taken out by sums of it and of zeros, which are exact
                top2 = tl.sum(tl.where(this, tops, 0.0), 0)
                total2 = tl.sum(tl.where(this, totals, 0.0), 0)
                acc2 = tl.sum(tl.where(this[:, None], accs, 0.0), 0)
                top, total, acc = _merged(top, total, acc, top2, total2, acc2[None, :])
        at = out_ptr + (first_row + row) * OUT_STRIDE + head * D + r_dim
        share = tl.div_rn(1.0, total)
        tl.store(at[None, :], acc * share[:, None], mask=(r_dim < D)[None, :])
