"""Launches of what happens to a row by itself. See rows_kernel.py."""

from __future__ import annotations

import torch
import triton

from ropewalk.backends.gpu import rows_kernel as kernels
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, new_activations
from ropewalk.backends.gpu.step import GpuStep
from ropewalk.backends.gpu.views import check_rows
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.base.errors import ShapeError

AS_WRITTEN = {"enable_fp_fusion": False}  # its default differs between versions of Triton
TILE_HEADS = 8  # heads of a program that rotates
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


def rotate_(step: GpuStep, x: torch.Tensor) -> None:
    """Rotate x: [T, H, D] float32 view in place by the angles of its rows; dims from R on stay."""
    num_rows, heads, head_dim = x.shape
    half = _check_rotated(step, "x", x)
    if x.numel() and half:
        kernels.rotate[(num_rows, triton.cdiv(heads, TILE_HEADS))](
            x,
            step.cos,
            step.sin,
            X_STRIDE=x.stride(0),
            HEADS=heads,
            D=head_dim,
            HALF=half,
            HB=triton.next_power_of_2(half),
            TILE=TILE_HEADS,
            num_warps=4,
            **AS_WRITTEN,
        )


def append_(step: GpuStep, k: torch.Tensor, v: torch.Tensor, instance: int) -> None:
    """Write k and v, [T, Hkv, D] float32 views, to the pages of the rows, rounded to their dtype."""
    _append(step, None, k, v, instance, 0)


def rotate_append_(step: GpuStep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, instance: int) -> None:
    """Rotate q: [T, Hq, D] in place; write k: [T, Hkv, D], rotated, and v to the pages. The view k stays as it is."""
    half = _check_rotated(step, "q", q)
    _check_rotated(step, "k", k)
    _append(step, q, k, v, instance, half)


def _append(step: GpuStep, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, instance: int, half: int) -> None:
    num_rows, kv_heads, head_dim = k.shape
    if step.num_rows == 0 == num_rows:
        return
    if k.shape != v.shape or (kv_heads, head_dim) != step.page_shape or not 0 <= instance < step.num_instances:
        raise ShapeError(
            f"append: k {list(k.shape)}, v {list(v.shape)} and instance {instance} do not fit pages of "
            f"{step.num_instances} instances, {step.page_shape[0]} heads of {step.page_shape[1]}"
        )
    for name, view in (("k", k), ("v", v)):
        check_rows(f"append: {name}", view)
        _check_num_rows(step, f"append: {name}", view)
    heads = 0 if q is None or half == 0 else q.shape[1]
    kernels.rotate_append[(num_rows, triton.cdiv(heads, TILE_HEADS) + triton.cdiv(kv_heads, TILE_HEADS))](
        k if q is None else q,
        k,
        v,
        step.cos,
        step.sin,
        step.pages,
        step.positions,
        step.span_of_row,
        step.pages.shape[1],
        instance,
        Q_STRIDE=0 if q is None else q.stride(0),
        K_STRIDE=k.stride(0),
        V_STRIDE=v.stride(0),
        HQ=heads,
        HKV=kv_heads,
        D=head_dim,
        DP=triton.next_power_of_2(head_dim),
        HALF=half,
        HB=triton.next_power_of_2(max(half, 1)),
        PAGE=PAGE_TOKENS,
        FP16_PAGES=step.page_dtype == torch.float16,
        TILE=TILE_HEADS,
        num_warps=4,
        **AS_WRITTEN,
    )


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


def _check_num_rows(step: GpuStep, name: str, view: torch.Tensor) -> None:
    if view.shape[0] != step.num_rows:
        raise ShapeError(f"{name} has {view.shape[0]} rows, the step {step.num_rows}")


def _check_rotated(step: GpuStep, name: str, x: torch.Tensor) -> int:
    """R/2."""
    half = step.cos.shape[1]
    if 2 * half > x.shape[2]:
        raise ShapeError(f"rotate: tables {list(step.cos.shape)} do not fit {name} {list(x.shape)}")
    check_rows(f"rotate: {name}", x)
    _check_num_rows(step, f"rotate: {name}", x)
    return half


def _warps(block: int) -> int:
    """Warps for a row of that many columns: 16 columns a thread at the most, in 1 to 16 warps."""
    return max(1, min(16, block // 512))
