"""What happens to a row by itself: norms, the residual stream, embeddings.

    norm:    y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias        the root mean square norm: mean = 0

A row is one program's, or several programs have parts of it that need nothing of each other. Activations are written in
the order of features of their linear and scaled as `prepare` of activations.py scales them. Gates are in
feed_forward_kernel.py, heads in heads_kernel.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ropewalk.backends.gpu.activations_kernel import gathered, row_scales


@triton.jit
def _statistics(x, here, eps, SIZE: tl.constexpr, CENTRED: tl.constexpr):
    """(mean, factor) of the values of a row that are here: it is normalised as (x - mean) * factor."""
    mean = 0.0
    if CENTRED:
        mean = tl.sum(x, 0) / SIZE
        x = tl.where(here, x - mean, 0.0)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / SIZE + eps))


@triton.jit
def _normed(x, mean, factor, weight_ptr, bias_ptr, at, here, CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The values of a row that are here, of the features `at`; 0 elsewhere."""
    if CENTRED:
        x = x - mean
    y = x * factor * tl.load(weight_ptr + at, mask=here, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at, mask=here, other=0.0)
    return y


@triton.jit
def norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    B: tl.constexpr,
):
    """Grid (T, H). x, out: [T, H, SIZE] float32; weight, bias: [SIZE] float32, or [H, SIZE] with WEIGHT_STRIDE SIZE."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, B)
    here = at < SIZE
    x = tl.load(x_ptr + row * X_STRIDE + head * SIZE + at, mask=here, other=0.0)
    mean, factor = _statistics(x, here, eps, SIZE, CENTRED)
    y = _normed(x, mean, factor, weight_ptr, bias_ptr, head * WEIGHT_STRIDE + at, here, CENTRED, HAS_BIAS)
    tl.store(out_ptr + row * OUT_STRIDE + head * SIZE + at, y, mask=here)


@triton.jit
def norm_activations(
    x_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
    values_ptr,
    scale_ptr,
    out_ptr,
    eps,
    X_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    here = at < SIZE
    x = tl.load(x_ptr + at, mask=here, other=0.0)
    mean, norm_factor = _statistics(x, here, eps, SIZE, CENTRED)
    y = _normed(x, mean, norm_factor, weight_ptr, bias_ptr, at, here, CENTRED, HAS_BIAS)
    if WRITES_FLOAT32:
        tl.store(out_ptr + row * SIZE + at, y, mask=here)
    factor = 1.0
    if SCALED:
        factor, scale = row_scales(tl.max(tl.abs(y), 0))
        tl.store(scale_ptr + row, scale)
    place = tl.arange(0, BW)
    feature = gathered(order_ptr, place, WIDTH, SIZE, HAS_ORDER)
    x = tl.load(x_ptr + feature, mask=feature >= 0, other=0.0)
    y = _normed(x, mean, norm_factor, weight_ptr, bias_ptr, feature, feature >= 0, CENTRED, HAS_BIAS) * factor
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
