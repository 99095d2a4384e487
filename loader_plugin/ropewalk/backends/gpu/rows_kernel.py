"""What happens to a row by itself: norms, the gate, the residual stream, embeddings, rotation, and keys kept in pages.

    norm:    y = x / sqrt(mean(x^2) + eps) * weight
    gate:    y = gate / (1 + exp(-gate)) * up
    rotate:  x_i  <-  x_i cos_i - x_{i+R/2} sin_i        x_{i+R/2}  <-  x_{i+R/2} cos_i + x_i sin_i

A row is one program's, or several programs have parts of it that need nothing of each other. Activations are written in
the order of features of their linear and scaled as `prepare` of activations.py scales them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.activations_kernel import row_scales


@triton.jit
def _gathered(order_ptr, place, WIDTH: tl.constexpr, FEATURES: tl.constexpr, HAS_ORDER: tl.constexpr):
    """The feature of each place, -1 beyond the features."""
    if HAS_ORDER:
        return tl.load(order_ptr + place, mask=place < WIDTH, other=-1)
    return tl.where(place < FEATURES, place, -1)


@triton.jit
def rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    eps,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T, H). x, out: [T, H, SIZE] float32; weight: [SIZE] float32."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, B)
    here = at < SIZE
    x = tl.load(x_ptr + row * X_STRIDE + head * SIZE + at, mask=here, other=0.0)
    share = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / SIZE + eps))
    y = x * share * tl.load(weight_ptr + at, mask=here, other=0.0)
    tl.store(out_ptr + row * OUT_STRIDE + head * SIZE + at, y, mask=here)


@triton.jit
def norm_activations(
    x_ptr,
    weight_ptr,
    order_ptr,
    values_ptr,
    scale_ptr,
    out_ptr,
    eps,
    X_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    WRITES_FLOAT32: tl.constexpr,
    B: tl.constexpr,
    BW: tl.constexpr,
):
    """Grid (T,). x: [T, SIZE] float32; values: [T, WIDTH]; scale: [T] float32; out: [T, SIZE] float32 if wanted."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * X_STRIDE
    at = tl.arange(0, B)
    x = tl.load(x_ptr + at, mask=at < SIZE, other=0.0)
    share = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / SIZE + eps))
    y = x * share * tl.load(weight_ptr + at, mask=at < SIZE, other=0.0)
    if WRITES_FLOAT32:
        tl.store(out_ptr + row * SIZE + at, y, mask=at < SIZE)
    factor = 1.0
    if SCALED:
        factor, scale = row_scales(tl.max(tl.abs(y), 0))
        tl.store(scale_ptr + row, scale)
    place = tl.arange(0, BW)
    feature = _gathered(order_ptr, place, WIDTH, SIZE, HAS_ORDER)
    x = tl.load(x_ptr + feature, mask=feature >= 0, other=0.0)
    y = x * share * tl.load(weight_ptr + feature, mask=feature >= 0, other=0.0) * factor
    tl.store(values_ptr + row * WIDTH + place, y.to(values_ptr.dtype.element_ty), mask=place < WIDTH)


@triton.jit
def _silu_mul(row_ptr, feature, here, SIZE: tl.constexpr):
    """silu(gate) * up of some features of a row: gate is its first half."""
    gate = tl.load(row_ptr + feature, mask=here, other=0.0)
    up = tl.load(row_ptr + SIZE + feature, mask=here, other=0.0)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def silu_activations(
    x_ptr,
    order_ptr,
    values_ptr,
    scale_ptr,
    out_ptr,
    X_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    WRITES_FLOAT32: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T,). x: [T, 2 * SIZE] float32; values: [T, WIDTH]; scale: [T] float32; out: [T, SIZE] float32 if wanted.

    Twice over the row: the scale is known only at its end, and what was read is still near.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * X_STRIDE
    factor = 1.0
    if SCALED or WRITES_FLOAT32:
        most = tl.zeros((B,), tl.float32)
        for first in range(0, SIZE, B):
            at = first + tl.arange(0, B)
            y = _silu_mul(x_ptr, at, at < SIZE, SIZE)
            most = tl.maximum(most, tl.abs(y))
            if WRITES_FLOAT32:
                tl.store(out_ptr + row * SIZE + at, y, mask=at < SIZE)
        if SCALED:
            factor, scale = row_scales(tl.max(most, 0))
            tl.store(scale_ptr + row, scale)
    for first in range(0, WIDTH, B):
        place = first + tl.arange(0, B)
        feature = _gathered(order_ptr, place, WIDTH, SIZE, HAS_ORDER)
        y = _silu_mul(x_ptr, feature, feature >= 0, SIZE) * factor
        tl.store(values_ptr + row * WIDTH + place, y.to(values_ptr.dtype.element_ty), mask=place < WIDTH)


@triton.jit
def add_residual(x_ptr, y_ptr, weight, Y_STRIDE: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """Grid (T, tiles of B). x: [T, SIZE], y: [T, SIZE] with Y_STRIDE floats from row to row; x += weight * y."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    x = tl.load(x_ptr + row * SIZE + at, mask=at < SIZE)
    y = tl.load(y_ptr + row * Y_STRIDE + at, mask=at < SIZE)
    tl.store(x_ptr + row * SIZE + at, x + weight * y, mask=at < SIZE)


@triton.jit
def embed(table_ptr, ids_ptr, out_ptr, SIZE: tl.constexpr, B: tl.constexpr):
    """Grid (T, tiles of B). table: [V, SIZE]; ids: [T] int64; out: [T, SIZE] float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    token = tl.load(ids_ptr + row)
    values = tl.load(table_ptr + token * SIZE + at, mask=at < SIZE)
    tl.store(out_ptr + row * SIZE + at, values.to(tl.float32), mask=at < SIZE)


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


@triton.jit(do_not_specialize=["width", "instance"])
def rotate_append(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    pages_ptr,
    positions_ptr,
    spans_ptr,
    width,
    instance,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    HALF: tl.constexpr,
    HB: tl.constexpr,
    PAGE: tl.constexpr,
    FP16_PAGES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (T, tiles of TILE query heads, then those of key/value heads): queries rotated in place, keys into pages.

    q: [T, HQ, D], k, v: [T, HKV, D] float32; cos, sin: [T, HALF] float32. HQ = 0: no queries; HALF = 0: no rotation.
    """
    row = tl.program_id(0).to(tl.int64)
    q_tiles = (HQ + TILE - 1) // TILE
    tile = tl.program_id(1)
    i = tl.arange(0, HB)[None, :]
    if HALF > 0:
        cos = tl.load(cos_ptr + row * HALF + i, mask=i < HALF, other=0.0)
        sin = tl.load(sin_ptr + row * HALF + i, mask=i < HALF, other=0.0)
    if tile < q_tiles:
        q_head = (tile * TILE + tl.arange(0, TILE))[:, None]
        q_here = (q_head < HQ) & (i < HALF)
        q_at = row * Q_STRIDE + q_head * D + i
        q_a, q_b = _rotated(q_ptr, q_at, q_here, cos, sin, HALF)
        tl.store(q_ptr + q_at, q_a, mask=q_here)
        tl.store(q_ptr + q_at + HALF, q_b, mask=q_here)
    else:
        head = ((tile - q_tiles) * TILE + tl.arange(0, TILE))[:, None]
        pos = tl.load(positions_ptr + row)
        page = tl.load(pages_ptr + tl.load(spans_ptr + row) * width + pos // PAGE)
        kept = tl.multiple_of(page.to(tl.pointer_type(tl.float16 if FP16_PAGES else tl.float32)), 16)
        kept += instance.to(tl.int64) * (2 * HKV * PAGE * D) + head * (PAGE * D) + (pos % PAGE) * D
        if HALF > 0:
            turned = (head < HKV) & (i < HALF)
            a, b = _rotated(k_ptr, row * K_STRIDE + head * D + i, turned, cos, sin, HALF)
            tl.store(kept + i, a.to(kept.dtype.element_ty), mask=turned)
            tl.store(kept + i + HALF, b.to(kept.dtype.element_ty), mask=turned)
        dim = tl.arange(0, DP)[None, :]
        here = (head < HKV) & (dim < D)
        if 2 * HALF < D:
            rest = here & (dim >= 2 * HALF)
            k = tl.load(k_ptr + row * K_STRIDE + head * D + dim, mask=rest, other=0.0)
            tl.store(kept + dim, k.to(kept.dtype.element_ty), mask=rest)
        v = tl.load(v_ptr + row * V_STRIDE + head * D + dim, mask=here, other=0.0)
        tl.store(kept + HKV * PAGE * D + dim, v.to(kept.dtype.element_ty), mask=here)
