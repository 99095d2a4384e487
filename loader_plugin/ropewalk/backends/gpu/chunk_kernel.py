"""The state of rows over a chunk of keys, BLOCK keys at a time, and two states as one. See `attention_kernel.py`.

top = max of scores s       total = sum of 2^(s - top)       acc = sum of 2^(s - top) v
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
def _capped(scores, SOFTCAP: tl.constexpr):
    """c tanh(s / c) of scores s, which are in units of log2(e), as c tanh is: tanh(x) = 1 - 2 / (1 + e^2x)."""
    return (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / SOFTCAP)))) * (SOFTCAP * 1.4426950408889634)


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
    SOFTCAP: tl.constexpr,
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

    A row sees keys before its `end`, and, where it is BOUNDED, from its `begin` on. SOFTCAP: of scores, 0 for none.
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
        if SOFTCAP > 0:
            scores = _capped(scores, SOFTCAP)
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
def chunk_state(
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
    SOFTCAP: tl.constexpr,
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
    for MASKED in tl.static_range(2):
        if MASKED == 1 or (FP16_DOT and not BOUNDED):
            until = stop if MASKED == 1 else tl.minimum(stop, all_see // BLOCK * BLOCK)
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
                until,
                MASKED == 1,
                BOUNDED,
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
            first = tl.maximum(first, until)
    return top, tl.max(sums, 1), acc  # all columns of sums are alike
