"""Causal attention of rows over the pages of their sequences.

    out_i = sum_j p_ij v_j / sum_j p_ij     p_ij = 2^(s_ij - m_i)     s_ij = (q_i log2(e) / sqrt(D)) k_j     j <= i

A sequence's keys are cut at multiples of CHUNK positions. The state of a row in a chunk, (top, total, acc) for the
maximum and the two sums, is computed from nothing, BLOCK keys at a time, and the states of chunks are merged in order.
That is the same tree of operations whether one program walks over all chunks (`attend_whole`) or each chunk has its own
(`attend_chunks`, then `merge_kernel.py`), for any number of rows: blocks and chunks in which a row sees nothing leave
its state as it is, bit for bit. The total is taken by the same matrix instructions as acc, because the order in which
`tl.sum` adds depends on how many rows and warps a program has. Compile without fusing multiplications and additions,
for the same reason.

Keys and values in codes (`formats_kernel.py`) are decoded in registers, a block at a time. With a recent window the
keys of a row have two PARTs, each with states of its own: the older ones in codes and the recent ones in float16. Where
the one ends and the other begins follows from the position of the row alone.

A tile has ROWS rows; row r is query r // G of its block, and of the G query heads of a key/value head it is r % G.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.formats_kernel import load_rows

NOTHING = tl.constexpr(-1.0e30)  # the maximum of no scores: finite, so that differences of two are
ALL, OLDER, RECENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the parts of a row's keys
_ONES = tl.constexpr(16)  # columns of ones that the sum is taken with: the narrowest product of all cards


@triton.jit
def nothing(ROWS: tl.constexpr):
    """(top, total) of rows that have seen no key."""
    return tl.full((ROWS,), NOTHING, tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def merged(top, total, acc, top2, total2, acc2):
    """The state of rows that have seen the keys of both states."""
    new_top = tl.maximum(top, top2)
    a, b = tl.exp2(top - new_top), tl.exp2(top2 - new_top)
    return new_top, total * a + total2 * b, acc * a[:, None] + acc2 * b[:, None]


@triton.jit
def seen_keys(pos, PART: tl.constexpr, WINDOW: tl.constexpr, WITHIN: tl.constexpr, PAGE: tl.constexpr):
    """(begin, end): the keys of a part that a row at `pos` sees. WITHIN: positions of the recent window."""
    begin, end = pos * 0, pos + 1
    if WINDOW > 0:
        begin = tl.maximum(pos - WINDOW + 1, 0)
    if PART != ALL:
        edge = tl.maximum(pos + 1 - WITHIN, 0) // PAGE * PAGE
        if PART == OLDER:
            end = edge
        else:
            begin = tl.maximum(begin, edge)
    return begin, end


@triton.jit
def _dot(a, b, acc, FP16_DOT: tl.constexpr):
    return tl.dot(a, b, acc) if FP16_DOT else tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _keys(
    head,
    place,
    here,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FP16: tl.constexpr,
):
    """[DP, BLOCK] keys of one block. place, here: [BLOCK]. Floats are loaded the way that products want them."""
    if BITS < 16:
        return tl.trans(load_rows(head, place[:, None], here[:, None], BLOCK, D, DP, PAGE, BITS, FP16))
    dim = tl.arange(0, DP)[:, None]
    floats = head.to(tl.pointer_type(tl.float32 if BITS == 32 else tl.float16))
    return tl.load(floats + (place[None, :] * D + dim), mask=here[None, :] & (dim < D), other=0.0).to(
        tl.float16 if FP16 else tl.float32
    )


@triton.jit
def _key_blocks(
    top,
    sums,
    acc,
    q,
    begin,
    end,
    pages_ptr,
    key_offset,
    value_offset,
    first,
    stop,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """The state after keys first..stop, block by block. Not MASKED: whole blocks whose keys all rows see.

    A row sees keys before its `end`, and, where it is BOUNDED, from its `begin` on.
    """
    multiplied = tl.float16 if FP16_DOT else tl.float32
    ones = tl.full((BLOCK, _ONES), 1.0, multiplied)
    r_key = tl.arange(0, BLOCK)
    for key in range(first, stop, BLOCK):
        page = tl.multiple_of(tl.load(pages_ptr + key // PAGE).to(tl.pointer_type(tl.uint8)), 16)
        place = key % PAGE + r_key
        here = key + r_key < stop if MASKED else r_key >= 0
        k = _keys(page + key_offset, place, here, D, DP, PAGE, BLOCK, K_BITS, FP16_DOT)  # [DP, BLOCK]
        v = load_rows(page + value_offset, place[:, None], here[:, None], BLOCK, D, DP, PAGE, V_BITS, FP16_DOT)
        scores = _dot(q, k, tl.zeros((ROWS, BLOCK), tl.float32), FP16_DOT)
        if MASKED:
            seen = (key + r_key)[None, :] < end[:, None]
            if BOUNDED:
                seen = seen & ((key + r_key)[None, :] >= begin[:, None])
            scores = tl.where(seen, scores, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        if MASKED:
            p = tl.where(seen, p, 0.0)
        alpha = tl.exp2(top - new_top)
        sums = _dot(p.to(multiplied), ones, sums * alpha[:, None], FP16_DOT)
        acc = _dot(p.to(multiplied), v, acc * alpha[:, None], FP16_DOT)
        top = new_top
    return top, sums, acc


@triton.jit
def _chunk_state(
    q,
    begin,
    end,
    all_see,
    pages_ptr,
    key_offset,
    value_offset,
    first,
    stop,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """State of ROWS queries q: [ROWS, DP] over keys first..stop of one chunk; first: of a block.

    begin, end: [ROWS] the keys that they see; all_see: the least end. Most blocks are seen whole and need no mask;
    where rows are bounded few are, and float32 products leave no registers for a second loop.
    """
    top, _ = nothing(ROWS)
    sums = tl.zeros((ROWS, _ONES), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    if FP16_DOT and not BOUNDED:
        whole = tl.minimum(stop, all_see // BLOCK * BLOCK)
        top, sums, acc = _key_blocks(
            top,
            sums,
            acc,
            q,
            begin,
            end,
            pages_ptr,
            key_offset,
            value_offset,
            first,
            whole,
            False,
            BOUNDED,
            ROWS,
            D,
            DP,
            PAGE,
            BLOCK,
            K_BITS,
            V_BITS,
            FP16_DOT,
        )
        first = tl.maximum(first, whole)
    top, sums, acc = _key_blocks(
        top,
        sums,
        acc,
        q,
        begin,
        end,
        pages_ptr,
        key_offset,
        value_offset,
        first,
        stop,
        True,
        BOUNDED,
        ROWS,
        D,
        DP,
        PAGE,
        BLOCK,
        K_BITS,
        V_BITS,
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


@triton.jit(do_not_specialize=["width", "instance", "most_rows"])
def attend_whole(
    q_ptr,
    out_ptr,
    states_ptr,
    pages_ptr,
    positions_ptr,
    blocks_ptr,
    width,
    instance,
    most_rows,
    qk_scale,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    WITHIN: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """Grid (blocks, HKV * tiles of a block). One program walks over all chunks of a part that its rows see.

    From chunk to chunk acc stays in `out`: another accumulator in registers would spill. Of ALL keys the result is the
    sum of values in [T, Hq, D]. Of one part of them it is a state as `attend_chunks` has it for one chunk.
    """
    span, first_row, num_rows, kv_head, packed, start = _tile(blocks_ptr, positions_ptr, HKV, G, ROWS)
    if packed < num_rows * G:
        row = (packed + tl.arange(0, ROWS)) // G
        heads = kv_head * G + (packed + tl.arange(0, ROWS)) % G
        here = row < num_rows
        q = _queries(q_ptr, first_row + row, heads, here, qk_scale, Q_STRIDE, D, DP, FP16_DOT)
        begin, end = seen_keys(start + row, PART, WINDOW, WITHIN, PAGE)
        first, all_see = seen_keys(start + packed // G, PART, WINDOW, WITHIN, PAGE)
        last_row = tl.minimum((packed + ROWS - 1) // G, num_rows - 1)
        _, stop = seen_keys(start + last_row, PART, WINDOW, WITHIN, PAGE)
        first = first // BLOCK * BLOCK
        top, total = nothing(ROWS)
        instance_bytes = HKV * (K_BYTES + V_BYTES)
        # Of a part in which the rows see nothing, one chunk without keys gives the state.
        for chunk in range(first // CHUNK, tl.maximum(tl.cdiv(stop, CHUNK), first // CHUNK + 1)):
            top2, total2, acc2 = _chunk_state(
                q,
                begin,
                end,
                all_see,
                pages_ptr + span * width,
                instance.to(tl.int64) * instance_bytes + kv_head * K_BYTES,
                instance.to(tl.int64) * instance_bytes + HKV * K_BYTES + kv_head * V_BYTES,
                tl.maximum(first, chunk * CHUNK),
                tl.minimum(stop, (chunk + 1) * CHUNK),
                WINDOW > 0 or PART == RECENT,
                ROWS,
                D,
                DP,
                PAGE,
                BLOCK,
                K_BITS,
                V_BITS,
                FP16_DOT,
            )
            # Read again: the addresses below would otherwise be held in registers while the keys go by.
            first_row = tl.load(blocks_ptr + tl.program_id(0) * 3 + 1, volatile=True)
            r_dim = tl.arange(0, DP)
            at = out_ptr + (first_row + row)[:, None] * OUT_STRIDE + heads[:, None] * D + r_dim[None, :]
            if PART != ALL:
                at = out_ptr + _slots(0, row, heads, most_rows, HKV, G)[:, None] * D + r_dim[None, :]
            whole = here[:, None] & (r_dim < D)[None, :]
            begun = (chunk + 0 * row > first // CHUNK)[:, None]  # by row, as a mask has to be
            acc = tl.load(at, mask=whole & begun, other=0.0)
            top, total, acc = merged(top, total, acc, top2, total2, acc2)
            if PART == ALL:
                last = (chunk + 1) * CHUNK >= stop
                acc = acc * tl.div_rn(1.0, tl.where(here & last, total, 1.0))[:, None]
            tl.store(at, acc, mask=whole)
            tl.debug_barrier()  # what one thread has written here, another may read in the next chunk
        if PART != ALL:
            slot = _slots(0, row, heads, most_rows, HKV, G)
            tl.store(states_ptr + slot * 2, top, mask=here)
            tl.store(states_ptr + slot * 2 + 1, total, mask=here)


@triton.jit
def _slots(chunk, row, heads, most_rows, HKV: tl.constexpr, G: tl.constexpr):
    """Where the states of rows of this block in a chunk have their place."""
    block = chunk * tl.num_programs(0) + tl.program_id(0)
    return (block.to(tl.int64) * most_rows + row) * (HKV * G) + heads


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
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    WITHIN: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    FP16_DOT: tl.constexpr,
):
    """Grid (blocks, HKV * tiles of a block, chunks), chunks counted from the first that the block's first row sees.

    states: [chunks, blocks, most_rows, Hq, 2] float32 (top, total); accs: [chunks, blocks, most_rows, Hq, D] float32.
    """
    span, first_row, num_rows, kv_head, packed, start = _tile(blocks_ptr, positions_ptr, HKV, G, ROWS)
    first_seen, _ = seen_keys(start, PART, WINDOW, WITHIN, PAGE)
    chunk = first_seen // CHUNK + tl.program_id(2)
    last_row = tl.minimum((packed + ROWS - 1) // G, num_rows - 1)
    _, stop = seen_keys(start + last_row, PART, WINDOW, WITHIN, PAGE)
    if (packed < num_rows * G) & (chunk * CHUNK < stop):
        row = (packed + tl.arange(0, ROWS)) // G
        heads = kv_head * G + (packed + tl.arange(0, ROWS)) % G
        here = row < num_rows
        q = _queries(q_ptr, first_row + row, heads, here, qk_scale, Q_STRIDE, D, DP, FP16_DOT)
        begin, end = seen_keys(start + row, PART, WINDOW, WITHIN, PAGE)
        first, all_see = seen_keys(start + packed // G, PART, WINDOW, WITHIN, PAGE)
        instance_bytes = HKV * (K_BYTES + V_BYTES)
        top, total, acc = _chunk_state(
            q,
            begin,
            end,
            all_see,
            pages_ptr + span * width,
            instance.to(tl.int64) * instance_bytes + kv_head * K_BYTES,
            instance.to(tl.int64) * instance_bytes + HKV * K_BYTES + kv_head * V_BYTES,
            tl.maximum(first // BLOCK * BLOCK, chunk * CHUNK),
            tl.minimum(stop, (chunk + 1) * CHUNK),
            WINDOW > 0 or PART == RECENT,
            ROWS,
            D,
            DP,
            PAGE,
            BLOCK,
            K_BITS,
            V_BITS,
            FP16_DOT,
        )
        slot = _slots(tl.program_id(2), row, heads, most_rows, HKV, G)
        r_dim = tl.arange(0, DP)
        tl.store(states_ptr + slot * 2, top, mask=here)
        tl.store(states_ptr + slot * 2 + 1, total, mask=here)
        tl.store(accs_ptr + slot[:, None] * D + r_dim[None, :], acc, mask=here[:, None] & (r_dim < D)[None, :])
