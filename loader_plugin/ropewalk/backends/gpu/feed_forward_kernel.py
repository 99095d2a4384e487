"""The functions between the linears of a feed-forward block, row by row.

silu:       x / (1 + exp(-x))
gelu:       x (1 + erf(x / sqrt(2))) / 2
gelu tanh:  x (1 + tanh(u)) / 2 = x / (1 + exp(-2u))        u = sqrt(2 / pi) (x + 0.044715 x^3)
gate:       f(gate) * up
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.activations_kernel import gathered, order_of_row, row_scales

SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))
    if ACTIVATION == GELU_TANH:
        return x / (1.0 + tl.exp((x + 0.044715 * x * x * x) * -_TWICE_ROOT))
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _inner(row_ptr, feature, here, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """f(x) of some features of a row, or f(gate) * up, where gate is its first half."""
    y = _activated(tl.load(row_ptr + feature, mask=here, other=0.0), ACTIVATION)
    if GATED:
        y = y * tl.load(row_ptr + SIZE + feature, mask=here, other=0.0)
    return y


@triton.jit
def inner_activations(
    x_ptr,
    order_ptr,
    experts_ptr,
    values_ptr,
    scale_ptr,
    out_ptr,
    X_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    SCALED: tl.constexpr,
    WRITES_FLOAT32: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T,). x: [T, SIZE], or [T, 2 * SIZE] where GATED; values: [T, WIDTH]; scale: [T]; out: [T, SIZE] if wanted.

    experts: [T] int32 the expert whose order a row is written in, BY_EXPERT. Twice over the row: the scale is known
    only at its end, and what was read is still near.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * X_STRIDE
    factor = 1.0
    if SCALED or WRITES_FLOAT32:
        most = tl.zeros((B,), tl.float32)
        for first in range(0, SIZE, B):
            at = first + tl.arange(0, B)
            y = _inner(x_ptr, at, at < SIZE, SIZE, ACTIVATION, GATED)
            most = tl.maximum(most, tl.abs(y))
            if WRITES_FLOAT32:
                tl.store(out_ptr + row * SIZE + at, y, mask=at < SIZE)
        if SCALED:
            factor, scale = row_scales(tl.max(most, 0))
            tl.store(scale_ptr + row, scale)
    order_ptr = order_of_row(order_ptr, experts_ptr, row, WIDTH, BY_EXPERT)
    for first in range(0, WIDTH, B):
        place = first + tl.arange(0, B)
        feature = gathered(order_ptr, place, WIDTH, SIZE, HAS_ORDER)
        y = _inner(x_ptr, feature, feature >= 0, SIZE, ACTIVATION, GATED) * factor
        tl.store(values_ptr + row * WIDTH + place, y.to(values_ptr.dtype.element_ty), mask=place < WIDTH)


@triton.jit
def sigmoid_mul(
    x_ptr,
    gate_ptr,
    out_ptr,
    X_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T, tiles of B). out = x / (1 + exp(-gate)); x, out: [T, SIZE], gate: [T, 1] float32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    gate = tl.load(gate_ptr + row * GATE_STRIDE)
    x = tl.load(x_ptr + row * X_STRIDE + at, mask=at < SIZE)
    tl.store(out_ptr + row * OUT_STRIDE + at, x / (1.0 + tl.exp(-gate)), mask=at < SIZE)
