"""Rows of pages moved to other positions, their keys turned on the way: what re-scaling and shifting a cache do.

Rows ascend, and a row may be written where a later one was read: one program has a head of an instance and takes all
rows, ROWS at a time. It has read them all before it writes the first, and written the last before it reads on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.formats_kernel import hadamard, load_rows, store_rows
from ropewalk.backends.gpu.heads_kernel import partner_of, rotated_whole


@triton.jit
def _heads(table_ptr, position, here, offset, PAGE: tl.constexpr):
    """Pointers [ROWS, 1] to a head in the pages of some positions: [ROWS, 1]."""
    page = tl.load(table_ptr + position // PAGE, mask=here, other=0)
    return (page + offset).to(tl.pointer_type(tl.uint8))


@triton.jit
def _copied(
    source,
    target,
    place,
    target_place,
    here,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Rows of a head in any format, byte by byte."""
    P: tl.constexpr = (D + 31) // 32 * 32
    if BITS >= 16:
        _copy(source, target, place, target_place, here, 0, D * BITS // 8, DP * BITS // 8)
    else:
        LOW: tl.constexpr = 1 if BITS == 8 else 2  # dims of a byte of the first piece
        _copy(source, target, place, target_place, here, 0, P // LOW, DP // LOW)
        if BITS == 6:
            _copy(source, target, place, target_place, here, PAGE * P // 2, P // 4, DP // 4)
        _copy(source, target, place, target_place, here, PAGE * P * BITS // 8, P // 16, DP // 16)


@triton.jit
def _copy(source, target, place, target_place, here, FIRST: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """SIZE bytes of each row in one piece of a head, which begins at FIRST."""
    byte = tl.arange(0, COLUMNS)[None, :]
    whole = here & (byte < SIZE)
    found = tl.load(source + (FIRST + place * SIZE + byte), mask=whole, other=0)
    tl.debug_barrier()
    tl.store(target + (FIRST + target_place * SIZE + byte), found, mask=whole)


@triton.jit(do_not_specialize=["source_start", "target_start", "num_rows"])
def move_rows(
    source_ptr,
    target_ptr,
    rotations_ptr,
    cos_ptr,
    sin_ptr,
    source_start,
    target_start,
    num_rows,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    H_KEYS: tl.constexpr,
    H_VALUES: tl.constexpr,
    ROOT: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
):
    """Grid (instances, HKV, 2): keys, then values. source, target: addresses of the pages from position 0 on.

    rotations: [instances] int64, the table of cos, sin: [tables, num_rows, HALF] float32 by which keys are read, turned
    and rounded anew; -1 where their bytes are copied, as those of values are.
    """
    head = tl.program_id(1)
    table = tl.load(rotations_ptr + tl.program_id(0))
    offset = tl.program_id(0).to(tl.int64) * (HKV * (K_BYTES + V_BYTES))
    dim = tl.arange(0, DP)[None, :]
    is_value = tl.program_id(2) == 1
    is_copied = is_value | (table < 0)
    copied_offset = offset + tl.where(is_value, HKV * K_BYTES + head * V_BYTES, head * K_BYTES)
    for first in range(0, num_rows, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        here = row < num_rows
        place, target_place = (source_start + row) % PAGE, (target_start + row) % PAGE
        if is_copied:
            source = _heads(source_ptr, source_start + row, here, copied_offset, PAGE)
            target = _heads(target_ptr, target_start + row, here, copied_offset, PAGE)
            if K_BITS == V_BITS:  # noqa: SIM114 - this is known when it is compiled, the next is not
                _copied(source, target, place, target_place, here, D, DP, PAGE, V_BITS)
            elif is_value:
                _copied(source, target, place, target_place, here, D, DP, PAGE, V_BITS)
            else:
                _copied(source, target, place, target_place, here, D, DP, PAGE, K_BITS)
        else:
            source = _heads(source_ptr, source_start + row, here, offset + head * K_BYTES, PAGE)
            target = _heads(target_ptr, target_start + row, here, offset + head * K_BYTES, PAGE)
            k = load_rows(source, place, here, ROWS, D, DP, PAGE, K_BITS, False)
            if H_KEYS > 1:
                k = hadamard(k, DP, H_KEYS, ROOT)
            if HALF > 0:
                partner = tl.gather(k, partner_of(dim, HALF).broadcast_to(k.shape), 1)
                at = (table * num_rows + tl.where(here, row, 0)) * HALF
                k = rotated_whole(k, partner, dim, cos_ptr + at, sin_ptr + at, HALF)
            if H_KEYS > 1:
                k = hadamard(k, DP, H_KEYS, ROOT)
            tl.debug_barrier()
            store_rows(target, target_place, here, tl.where(dim < D, k, 0.0), ROWS, D, DP, PAGE, K_BITS)
        tl.debug_barrier()
