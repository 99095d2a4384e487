"""What happens to a row by itself: norms, the gate, the residual stream, embeddings. Heads: `heads_kernel.py`.

    norm:    y = x / sqrt(mean(x^2) + eps) * weight
    gate:    y = gate / (1 + exp(-gate)) * up

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
