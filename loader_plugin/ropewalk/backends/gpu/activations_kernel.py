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
def prepare_kernel(
    x_ptr,
    order_ptr,
    values_ptr,
    scale_ptr,
    x_stride,
    in_features,
    width,
    HAS_ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: its largest value, then its features in the order of the linear."""
    row = tl.program_id(0).to(tl.int64)
    at = x_ptr + row * x_stride
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
        feature = tl.load(order_ptr + i, mask=here, other=-1) if HAS_ORDER else tl.where(i < in_features, i, -1)
        x = tl.load(at + feature, mask=feature >= 0, other=0.0) * factor
        tl.store(values_ptr + row * width + i, x.to(values_ptr.dtype.element_ty), mask=here)


def prepare_rows(x: torch.Tensor, order: torch.Tensor | None, values: torch.Tensor, scale: torch.Tensor | None) -> None:
    """x: [T, K] float32 -> values [T, Kp], and scale [T] if there is one."""
    prepare_kernel[(x.shape[0],)](
        x,
        x if order is None else order,
        values,
        values if scale is None else scale,
        x.stride(0),
        x.shape[1],
        values.shape[1],
        HAS_ORDER=order is not None,
        SCALED=scale is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
