"""What happens to heads: rotation by position, rotation by a Hadamard matrix, and keys and values kept in pages.

rotate:    x_i  <-  x_i cos_i - x_{i+R/2} sin_i        x_{i+R/2}  <-  x_{i+R/2} cos_i + x_i sin_i
hadamard:  x    <-  H x
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.formats_kernel import hadamard, store_rows


@triton.jit
def _rotated(x_ptr, at, here, cos, sin, HALF: tl.constexpr):
    """Both halves of the rotated dims at `at`."""
    a = tl.load(x_ptr + at, mask=here, other=0.0)
    b = tl.load(x_ptr + at + HALF, mask=here, other=0.0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    X_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HB: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (T, tiles of TILE heads). x: [T, HEADS, D] float32, in place; cos, sin: [T, HALF] float32."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    i = tl.arange(0, HB)[None, :]
    here = (head < HEADS) & (i < HALF)
    cos = tl.load(cos_ptr + row * HALF + i, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * HALF + i, mask=i < HALF, other=0.0)
    at = row * X_STRIDE + head * D + i
    a, b = _rotated(x_ptr, at, here, cos, sin, HALF)
    tl.store(x_ptr + at, a, mask=here)
    tl.store(x_ptr + at + HALF, b, mask=here)


@triton.jit
def turn(
    x_ptr,
    out_ptr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    ROOT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (T, tiles of TILE heads). out = H x in pieces of H dims; x, out: [T, HEADS, D] float32, may be the same."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    dim = tl.arange(0, DP)[None, :]
    here = (head < HEADS) & (dim < D)
    x = tl.load(x_ptr + row * X_STRIDE + head * D + dim, mask=here, other=0.0)
    tl.store(out_ptr + row * OUT_STRIDE + head * D + dim, hadamard(x, DP, H, ROOT), mask=here)


@triton.jit
def rotated_whole(x, partner, dim, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """x: [ROWS, DP] by position; partner: in each of the first 2 HALF dims, the dim that it is rotated with.

    cos_ptr, sin_ptr: to the angles of each row, a scalar or [ROWS, 1].
    """
    turned = dim < 2 * HALF
    cos = tl.load(cos_ptr + dim % HALF, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + dim % HALF, mask=turned, other=0.0)
    with_partner = tl.where(dim < HALF, x * cos - partner * sin, x * cos + partner * sin)
    return tl.where(turned, with_partner, x)


@triton.jit
def partner_of(dim, HALF: tl.constexpr):
    """The dim that each of the rotated dims is rotated with; of others themselves."""
    return tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))


@triton.jit(do_not_specialize=["width", "instance"])
def rotate_append(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    pages_ptr,
    recent_ptr,
    positions_ptr,
    spans_ptr,
    width,
    instance,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HQ: tl.constexpr,
    HALF: tl.constexpr,
    HB: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    H_KEYS: tl.constexpr,
    H_VALUES: tl.constexpr,
    ROOT: tl.constexpr,
    TILE: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
):
    """Grid (T, tiles of TILE query heads, then those of key/value heads): queries rotated in place, keys into pages.

    q: [T, HQ, D], k, v: [T, HKV, D] float32; cos, sin: [T, HALF] float32. HQ = 0: no queries; HALF = 0: no rotation.
    H_KEYS, H_VALUES: sizes of the Hadamard matrices that come before codes, 1 for none. HAS_RECENT: also into the pages
    of recent positions, in float16.
    """
    row = tl.program_id(0).to(tl.int64)
    q_tiles = (HQ + TILE - 1) // TILE
    tile = tl.program_id(1)
    if tile < q_tiles:
        i = tl.arange(0, HB)[None, :]
        cos = tl.load(cos_ptr + row * HALF + i, mask=i < HALF, other=0.0)
        sin = tl.load(sin_ptr + row * HALF + i, mask=i < HALF, other=0.0)
        q_head = (tile * TILE + tl.arange(0, TILE))[:, None]
        q_here = (q_head < HQ) & (i < HALF)
        q_at = row * Q_STRIDE + q_head * D + i
        q_a, q_b = _rotated(q_ptr, q_at, q_here, cos, sin, HALF)
        tl.store(q_ptr + q_at, q_a, mask=q_here)
        tl.store(q_ptr + q_at + HALF, q_b, mask=q_here)
    else:
        head = ((tile - q_tiles) * TILE + tl.arange(0, TILE))[:, None]
        dim = tl.arange(0, DP)[None, :]
        here = (head < HKV) & (dim < D)
        at = row * K_STRIDE + head * D
        k = tl.load(k_ptr + at + dim, mask=here, other=0.0)
        if HALF > 0:
            partner = tl.load(k_ptr + at + partner_of(dim, HALF), mask=here, other=0.0)
            k = rotated_whole(k, partner, dim, cos_ptr + row * HALF, sin_ptr + row * HALF, HALF)
        v = tl.load(v_ptr + row * V_STRIDE + head * D + dim, mask=here, other=0.0)
        pos = tl.load(positions_ptr + row)
        entry = tl.load(spans_ptr + row) * width + pos // PAGE
        if HAS_RECENT:
            recent = _page(recent_ptr + entry, instance, HKV * PAGE * D * 4)
            half_bytes: tl.constexpr = PAGE * D * 2  # of a head in float16
            store_rows(recent + head * half_bytes, pos % PAGE, head < HKV, k, TILE, D, DP, PAGE, 16)
            store_rows(recent + (HKV + head) * half_bytes, pos % PAGE, head < HKV, v, TILE, D, DP, PAGE, 16)
        page = _page(pages_ptr + entry, instance, HKV * (K_BYTES + V_BYTES))
        if H_KEYS > 1:
            k = hadamard(k, DP, H_KEYS, ROOT)
        if H_VALUES > 1:
            v = hadamard(v, DP, H_VALUES, ROOT)
        store_rows(page + head * K_BYTES, pos % PAGE, head < HKV, k, TILE, D, DP, PAGE, K_BITS)
        store_rows(page + HKV * K_BYTES + head * V_BYTES, pos % PAGE, head < HKV, v, TILE, D, DP, PAGE, V_BITS)


@triton.jit
def _page(address_ptr, instance, INSTANCE_BYTES: tl.constexpr):
    """Pointer to what a page has of an instance."""
    page = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(tl.uint8)), 16)
    return page + instance.to(tl.int64) * INSTANCE_BYTES
