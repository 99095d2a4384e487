"""Causal attention of rows over the pages of their sequences.

    out_i = sum_j p_ij v_j / sum_j p_ij     p_ij = 2^(s_ij - m_i)     s_ij = (q_i log2(e) scale) k_j     j <= i

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

from ropewalk.backends.gpu.chunk_kernel import ALL, RECENT, chunk_state, merged, nothing, seen_keys


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
    SOFTCAP: tl.constexpr,
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
            top2, total2, acc2 = chunk_state(
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
                SOFTCAP,
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
    SOFTCAP: tl.constexpr,
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
        top, total, acc = chunk_state(
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
            SOFTCAP,
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
