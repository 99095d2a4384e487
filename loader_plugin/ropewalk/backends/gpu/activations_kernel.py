"""Rows put in the order of features of a linear, and scaled to fit float16: what every producer of activations does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # features at a time: with 8 warps, 8 to a thread


@triton.jit
def row_scales(largest):
    """(factor, scale): powers of two, factor * scale = 1, that bring max|x| of a row to 8192 .. 16384.

    largest: max|x| in float32. Rows of zeros and of numbers below 2^-113 get 2^126; rows with infinities get a factor
    that leaves every finite number finite.
    """
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 14)  # 127 + floor(log2 largest)
    factor = ((267 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(13 - floor(log2 largest))
    scale = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
    return factor, scale


@triton.jit
def gathered(order_ptr, place, width, in_features, HAS_ORDER: tl.constexpr):
    """The feature of each place, -1 beyond the features."""
    if HAS_ORDER:
        return tl.load(order_ptr + place, mask=place < width, other=-1)
    return tl.where(place < in_features, place, -1)


@triton.jit
def order_of_row(order_ptr, experts_ptr, row, width, BY_EXPERT: tl.constexpr):
    """Where the order of a row begins: one for all, or that of its expert. order: [width] or [E, width] int32."""
    if BY_EXPERT:
        order_ptr += tl.load(experts_ptr + row).to(tl.int64) * width
    return order_ptr


@triton.jit
def prepare_kernel(
    x_ptr,
    order_ptr,
    experts_ptr,
    values_ptr,
    scale_ptr,
    x_stride,
    in_features,
    width,
    TIMES: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: its largest value, then its features in the order of the linear. Rows of x come TIMES each."""
    row = tl.program_id(0).to(tl.int64)
    at = x_ptr + row // TIMES * x_stride
    order_ptr = order_of_row(order_ptr, experts_ptr, row, width, BY_EXPERT)
    factor = 1.0
    if SCALED:
        most = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, in_features, BLOCK):
            i = first + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.abs(tl.load(at + i, mask=i < in_features, other=0.0)))
        factor, scale = row_scales(tl.max(most, 0))
        tl.store(scale_ptr + row, scale)
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = i < width
        feature = gathered(order_ptr, i, width, in_features, HAS_ORDER)
        x = tl.load(at + feature, mask=feature >= 0, other=0.0) * factor
        tl.store(values_ptr + row * width + i, x.to(values_ptr.dtype.element_ty), mask=here)


def prepare_rows(
    x: torch.Tensor,
    order: torch.Tensor | None,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    experts: torch.Tensor | None = None,
) -> None:
    """x: [T, K] float32 -> values [T, Kp], and scale [T] if there is one.

    experts: [pairs] int32, of every row as many as it has experts; values and scale then have a row for each of them,
    in its row of order: [E, Kp].
    """
    num_rows = values.shape[0]
    prepare_kernel[(num_rows,)](
        x,
        x if order is None else order,
        x if experts is None else experts,
        values,
        values if scale is None else scale,
        x.stride(0),
        x.shape[1],
        values.shape[1],
        TIMES=num_rows // x.shape[0],
        HAS_ORDER=order is not None,
        BY_EXPERT=experts is not None,
        SCALED=scale is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
