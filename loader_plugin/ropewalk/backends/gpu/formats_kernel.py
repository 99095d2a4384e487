"""Rows of heads as pages hold them, in every format of config/cache_format.py: read into registers, and written.

A head of a page; BITS is 32 or 16 for floats, 8, 6 or 4 for codes; P is D in whole blocks of 32:

    32, 16    [64, D] floats
     8        [64, P] codes                                                           | [64, P/32] scales float16
     6        [64, P/2] low four bits, two dims a byte | [64, P/4] high two, four     | scales
     4        [64, P/2] two dims a byte                                               | scales

The first dim of a byte has its lowest bits. Rows of a page follow each other in each of these pieces, so a tile of keys
is read in whole lines of memory.

head: pointers to uint8, where the head begins; place: the row of the page; here: which rows there are. Each is a scalar
or [ROWS, 1]. Tiles are [ROWS, DP], DP a power of two, at least 32 for codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK = tl.constexpr(32)  # numbers that share a scale
_ROUNDER = tl.constexpr(8388608.0)  # 2^23: what is added to it is rounded to an integer, half to even


@triton.jit
def load_rows(
    head,
    place,
    here,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    FP16: tl.constexpr,
):
    """[ROWS, DP] float16 or float32; what rows that are not here have, and dims from D on, means nothing."""
    dim = tl.arange(0, DP)[None, :]
    if BITS >= 16:
        floats = head.to(tl.pointer_type(tl.float32 if BITS == 32 else tl.float16))
        return tl.load(floats + (place * D + dim), mask=here & (dim < D), other=0.0).to(
            tl.float16 if FP16 else tl.float32
        )
    P: tl.constexpr = (D + _BLOCK - 1) // _BLOCK * _BLOCK
    codes = _codes(head, place, here, ROWS, P, DP, PAGE, BITS)
    # Nothing changes, but without it Triton decodes keys after they went to the warps that multiply: each all of them.
    codes = tl.where(dim < DP, codes, 0)
    block = tl.arange(0, DP // _BLOCK)[None, :]
    scales = (head + PAGE * P * BITS // 8).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + (place * (P // _BLOCK) + block), mask=here & (block < P // _BLOCK), other=0.0)
    return decoded(codes, scale, ROWS, DP, BITS, FP16)


@triton.jit
def _codes(
    head, place, here, ROWS: tl.constexpr, P: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr
):
    """[ROWS, DP] uint8."""
    if BITS == 8:
        dim = tl.arange(0, DP)[None, :]
        return tl.load(head + (place * P + dim), mask=here & (dim < P), other=0)
    pair = tl.arange(0, DP // 2)[None, :]
    low = tl.load(head + (place * (P // 2) + pair), mask=here & (pair < P // 2), other=0)
    codes = tl.join(low & 15, low >> 4).reshape(ROWS, DP)
    if BITS == 6:
        four = tl.arange(0, DP // 4)[None, :]
        high = tl.load(head + (PAGE * P // 2 + place * (P // 4) + four), mask=here & (four < P // 4), other=0)
        even, odd = tl.join(high & 3, (high >> 4) & 3), tl.join((high >> 2) & 3, high >> 6)
        codes = codes | (tl.join(even, odd).reshape(ROWS, DP) << 4)
    return codes


@triton.jit
def decoded(codes, scale, ROWS: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, FP16: tl.constexpr):
    """scale * (code - zero), rounded once. codes: [ROWS, DP] uint8; scale: [ROWS, DP/32] float16.

    For float16 codes are put into mantissas, nothing is converted: 2 code + 1 in the last bits of 0x6000, which is 512,
    is 512 + code + 1/2, of which 512 + 1/2 + zero is an exact float16 as well.
    """
    ZERO: tl.constexpr = ((1 << BITS) - 1) / 2
    if FP16:
        whole = ((codes.to(tl.uint16) << 1) | 0x6001).to(tl.float16, bitcast=True) - (512.5 + ZERO)
    else:
        whole = codes.to(tl.float32) - ZERO
    values = whole.reshape(ROWS, DP // _BLOCK, _BLOCK) * scale.to(whole.dtype)[:, :, None]
    return values.reshape(ROWS, DP)


@triton.jit
def store_rows(
    head,
    place,
    here,
    x,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Write x: [ROWS, DP] float32, zeros from D on; for codes, rotated where the format says so."""
    dim = tl.arange(0, DP)[None, :]
    if BITS >= 16:
        floats = head.to(tl.pointer_type(tl.float32 if BITS == 32 else tl.float16))
        tl.store(floats + (place * D + dim), x.to(floats.dtype.element_ty), mask=here & (dim < D))
    else:
        P: tl.constexpr = (D + _BLOCK - 1) // _BLOCK * _BLOCK
        codes, scale = encoded(x, ROWS, DP, BITS)
        block = tl.arange(0, DP // _BLOCK)[None, :]
        scales = (head + PAGE * P * BITS // 8).to(tl.pointer_type(tl.float16))
        tl.store(scales + (place * (P // _BLOCK) + block), scale, mask=here & (block < P // _BLOCK))
        if BITS == 8:
            tl.store(head + (place * P + dim), codes, mask=here & (dim < P))
        else:
            pair = tl.arange(0, DP // 2)[None, :]
            first, second = tl.split((codes & 15).reshape(ROWS, DP // 2, 2))
            tl.store(head + (place * (P // 2) + pair), first | (second << 4), mask=here & (pair < P // 2))
        if BITS == 6:
            four = tl.arange(0, DP // 4)[None, :]
            even, odd = tl.split((codes >> 4).reshape(ROWS, DP // 4, 2, 2))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            high = first | (second << 2) | (third << 4) | (fourth << 6)
            tl.store(head + (PAGE * P // 2 + place * (P // 4) + four), high, mask=here & (four < P // 4))


@triton.jit
def encoded(x, ROWS: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Codes [ROWS, DP] uint8 and scales [ROWS, DP/32] float16 of x: [ROWS, DP] float32.

    scale = max|x| / zero, code = clamp(round(x / scale + zero)). Where anything of a block is not finite its scale is
    NaN; of a block of zeros it is 0.
    """
    ZERO: tl.constexpr = ((1 << BITS) - 1) / 2
    blocks = x.reshape(ROWS, DP // _BLOCK, _BLOCK)
    scale = (tl.div_rn(tl.max(tl.abs(blocks), 2), ZERO) + tl.sum(blocks * 0.0, 2)).to(tl.float16)
    step = scale.to(tl.float32)[:, :, None]
    code = tl.where(step > 0, tl.div_rn(blocks, tl.where(step > 0, step, 1.0)) + ZERO, 0.0)
    code = tl.where(code > 0, code, 0.0)  # so is NaN, which is no integer
    code = tl.where(code < 2 * ZERO, code, 2 * ZERO)
    code = (code + _ROUNDER) - _ROUNDER
    return code.to(tl.uint8).reshape(ROWS, DP), scale


@triton.jit
def hadamard(x, DP: tl.constexpr, SIZE: tl.constexpr, ROOT: tl.constexpr):
    """x: [ROWS, DP] float32 times H in pieces of SIZE, a power of two. ROOT: 1 / sqrt(SIZE). Its own inverse.

    Butterflies (a, b) -> (a + b, a - b) over strides 1, 2, 4, ... SIZE / 2, each dim with its partner, then times ROOT.
    """
    dim = tl.arange(0, DP)[None, :]
    for i in tl.static_range(10):
        if (1 << i) < SIZE:
            partner = tl.gather(x, (dim ^ (1 << i)).broadcast_to(x.shape), 1)
            x = tl.where((dim & (1 << i)) == 0, x + partner, partner - x)
    return x * ROOT
