"""Launches of what happens to a row by itself. See rows_kernel.py."""

from __future__ import annotations

import torch
import triton

from ropewalk.backends.gpu import rows_kernel as kernels
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, new_activations
from ropewalk.backends.gpu.views import check_rows
from ropewalk.base.errors import ShapeError

AS_WRITTEN = {"enable_fp_fusion": False}  # its default differs between versions of Triton
TILE_FLOATS = 1024  # of a program that adds or widens
GATE_FLOATS = 4096  # columns that the gate takes at a time


def rms_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; x, out: [T, H, size] float32 views; weight: [size] float32."""
    num_rows, heads, size = x.shape
    check_rows("rms_norm: x", x)
    check_rows("rms_norm: out", out, heads, size)
    _check_rows_alike("rms_norm", x, out)
    _check_weight(weight, size)
    if x.numel():
        block = triton.next_power_of_2(size)
        kernels.rms_norm[(num_rows, heads)](
            x, weight, out, eps, x.stride(0), out.stride(0), size, block, num_warps=_warps(block), **AS_WRITTEN
        )


def norm_activations(
    x: torch.Tensor, weight: torch.Tensor, eps: float, order: FeatureOrder, out_float32: torch.Tensor | None
) -> Activations:
    """The norm of x: [T, C] float32 as a linear reads it, and as it is in out_float32: [T, C], contiguous, if given."""
    num_rows, size = x.shape
    check_rows("norm_activations: x", x, order.in_features)
    _check_weight(weight, size)
    made = new_activations(num_rows, order, x.device)
    out = _float32_out("norm_activations", out_float32, num_rows, size)
    if num_rows:
        block, block_width = triton.next_power_of_2(size), triton.next_power_of_2(order.width)
        kernels.norm_activations[(num_rows,)](
            x,
            weight,
            order.order,
            made.values,
            made.scale,
            out,
            eps,
            X_STRIDE=x.stride(0),
            SIZE=size,
            WIDTH=order.width,
            HAS_ORDER=order.order is not None,
            SCALED=order.scaled,
            WRITES_FLOAT32=out is not None,
            B=block,
            BW=block_width,
            num_warps=_warps(block),
            **AS_WRITTEN,
        )
    return made


def silu_activations(gate_up: torch.Tensor, order: FeatureOrder, out_float32: torch.Tensor | None) -> Activations:
    """silu(gate) * up of gate_up: [T, 2 * I] float32 as a linear reads it, and as it is in out_float32: [T, I]."""
    num_rows, size = gate_up.shape[0], order.in_features
    check_rows("silu_activations: gate_up", gate_up, 2 * size)
    made = new_activations(num_rows, order, gate_up.device)
    out = _float32_out("silu_activations", out_float32, num_rows, size)
    if num_rows:
        block = min(GATE_FLOATS, triton.next_power_of_2(order.width))
        kernels.silu_activations[(num_rows,)](
            gate_up,
            order.order,
            made.values,
            made.scale,
            out,
            X_STRIDE=gate_up.stride(0),
            SIZE=size,
            WIDTH=order.width,
            HAS_ORDER=order.order is not None,
            SCALED=order.scaled,
            WRITES_FLOAT32=out is not None,
            B=block,
            num_warps=_warps(block),
            **AS_WRITTEN,
        )
    return made


def add_residual_(x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
    """x += weight * y; x: [T, C] float32, contiguous; y: [T, C] float32 view."""
    num_rows, size = x.shape
    check_rows("add_residual: y", y, size)
    _check_rows_alike("add_residual", x, y)
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


def _float32_out(name: str, out: torch.Tensor | None, num_rows: int, size: int) -> torch.Tensor | None:
    if out is not None and (out.shape != (num_rows, size) or not out.is_contiguous() or out.dtype != torch.float32):
        raise ShapeError(
            f"{name}: out_float32 must be contiguous float32 [{num_rows}, {size}], got {out.dtype} {list(out.shape)}"
        )
    return out


def _check_weight(weight: torch.Tensor, size: int) -> None:
    if weight.shape != (size,) or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ShapeError(f"norm: weight must be contiguous float32 [{size}], got {weight.dtype} {list(weight.shape)}")


def _check_rows_alike(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    if x.shape[0] != y.shape[0]:
        raise ShapeError(f"{name}: {x.shape[0]} and {y.shape[0]} rows")


def _warps(block: int) -> int:
    """Warps for a row of that many columns: 16 columns a thread at the most, in 1 to 16 warps."""
    return max(1, min(16, block // 512))
