"""Launches of what happens to a row by itself. See rows_kernel.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ropewalk.backends.gpu import rows_kernel as kernels
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, new_activations
from ropewalk.backends.gpu.views import check_rows, check_same_rows, checked_out
from ropewalk.base.errors import ShapeError

AS_WRITTEN = {"enable_fp_fusion": False}  # its default differs between versions of Triton
TILE_FLOATS = 1024  # of a program that adds or widens


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias; not `centred`: with 0 in place of the mean.

    weight, bias: [size] float32 for all heads, or [heads * size]; bias may be None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool


def norm_(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    """Every head by itself; x, out: [T, H, size] float32 views."""
    num_rows, heads, size = x.shape
    check_rows("norm: x", x)
    check_rows("norm: out", out, heads, size)
    check_same_rows("norm", x, out)
    _check_norm(norm, size, heads)
    if x.numel():
        block = triton.next_power_of_2(size)
        kernels.norm[(num_rows, heads)](
            x,
            norm.weight,
            norm.weight if norm.bias is None else norm.bias,
            out,
            norm.eps,
            X_STRIDE=x.stride(0),
            OUT_STRIDE=out.stride(0),
            WEIGHT_STRIDE=size if norm.weight.numel() > size else 0,
            SIZE=size,
            CENTRED=norm.centred,
            HAS_BIAS=norm.bias is not None,
            B=block,
            num_warps=warps_of(block),
            **AS_WRITTEN,
        )


def norm_activations(x: torch.Tensor, norm: Norm, order: FeatureOrder, out_float32: torch.Tensor | None) -> Activations:
    """The norm of x: [T, C] float32 as a linear reads it, and as it is in out_float32: [T, C], contiguous, if given."""
    num_rows, size = x.shape
    check_rows("norm_activations: x", x, order.in_features)
    _check_norm(norm, size, 1)
    made = new_activations(num_rows, order, x.device)
    out = checked_out("norm_activations", out_float32, num_rows, size)
    if num_rows:
        block, block_width = triton.next_power_of_2(size), triton.next_power_of_2(order.width)
        kernels.norm_activations[(num_rows,)](
            x,
            norm.weight,
            norm.weight if norm.bias is None else norm.bias,
            order.order,
            made.values,
            made.scale,
            out,
            norm.eps,
            X_STRIDE=x.stride(0),
            SIZE=size,
            WIDTH=order.width,
            CENTRED=norm.centred,
            HAS_BIAS=norm.bias is not None,
            HAS_ORDER=order.order is not None,
            SCALED=order.scaled,
            WRITES_FLOAT32=out is not None,
            B=block,
            BW=block_width,
            num_warps=warps_of(block),
            **AS_WRITTEN,
        )
    return made


def add_residual_(x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
    """x += weight * y; x: [T, C] float32, contiguous; y: [T, C] float32 view."""
    num_rows, size = x.shape
    check_rows("add_residual: y", y, size)
    check_same_rows("add_residual", x, y)
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ShapeError(f"add_residual: x must be contiguous float32, got {x.dtype} with strides {list(x.stride())}")
    if x.numel():
        block = min(TILE_FLOATS, triton.next_power_of_2(size))
        kernels.add_residual[(num_rows, triton.cdiv(size, block))](
            x, y, weight, y.stride(0), size, block, num_warps=4, **AS_WRITTEN
        )


def embed(table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows of the table: [V, C] float16, bfloat16 or float32, at token_ids: [T] int64 -> [T, C] float32."""
    if table.ndim != 2 or not table.is_contiguous() or token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ShapeError(
            f"embed: table {list(table.shape)} must be contiguous [V, C] and token_ids [T] int64, got "
            f"{token_ids.dtype} {list(token_ids.shape)}"
        )
    num_rows, size = token_ids.shape[0], table.shape[1]
    out = torch.empty(num_rows, size, dtype=torch.float32, device=table.device)
    if out.numel():
        block = min(TILE_FLOATS, triton.next_power_of_2(size))
        kernels.embed[(num_rows, triton.cdiv(size, block))](
            table, token_ids.contiguous(), out, size, block, num_warps=4, **AS_WRITTEN
        )
    return out


def warps_of(block: int) -> int:
    """Warps for a row of that many columns: 16 columns a thread at the most, in 1 to 16 warps."""
    return max(1, min(16, block // 512))


def _check_norm(norm: Norm, size: int, heads: int) -> None:
    for name, given in (("weight", norm.weight), ("bias", norm.bias)):
        if given is None:
            continue
        fits = given.numel() in (size, heads * size) and given.numel() == norm.weight.numel()
        if not fits or given.dtype != torch.float32 or not given.is_contiguous():
            raise ShapeError(
                f"norm: {name} must be contiguous float32 [{size}], got {given.dtype} {list(given.shape)} for "
                f"{heads} {'head' if heads == 1 else 'heads'}"
            )
