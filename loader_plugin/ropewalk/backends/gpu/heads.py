"""Launches of what happens to heads. See heads_kernel.py."""

from __future__ import annotations

import torch
import triton

from ropewalk.backends.gpu import heads_kernel as kernels
from ropewalk.backends.gpu.rows import AS_WRITTEN
from ropewalk.backends.gpu.step import GpuStep
from ropewalk.backends.gpu.views import check_rows
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import hadamard_size

TILE_HEADS = 8  # heads of a program


def rotate_(step: GpuStep, x: torch.Tensor, table: int = 0) -> None:
    """Rotate x: [T, H, D] float32 view in place by the angles of its rows; dims from R on stay."""
    num_rows, heads, head_dim = x.shape
    half = _check_rotated(step, "x", x, table)
    if x.numel() and half:
        kernels.rotate[(num_rows, triton.cdiv(heads, TILE_HEADS))](
            x,
            step.cos[table],
            step.sin[table],
            X_STRIDE=x.stride(0),
            HEADS=heads,
            D=head_dim,
            HALF=half,
            HB=triton.next_power_of_2(half),
            TILE=TILE_HEADS,
            num_warps=4,
            **AS_WRITTEN,
        )


def turn_(x: torch.Tensor, out: torch.Tensor) -> None:
    """out = H x, every head by the Hadamard matrix of its size (see config/cache_format.py); they may be the same.

    x, out: [T, heads, D] float32 views.
    """
    num_rows, heads, head_dim = x.shape
    check_rows("turn: x", x)
    check_rows("turn: out", out, heads, head_dim)
    size = hadamard_size(head_dim)
    if x.numel():
        kernels.turn[(num_rows, triton.cdiv(heads, TILE_HEADS))](
            x,
            out,
            X_STRIDE=x.stride(0),
            OUT_STRIDE=out.stride(0),
            HEADS=heads,
            D=head_dim,
            DP=triton.next_power_of_2(head_dim),
            H=size,
            ROOT=size**-0.5,
            TILE=TILE_HEADS,
            num_warps=4,
            **AS_WRITTEN,
        )


def append_(step: GpuStep, k: torch.Tensor, v: torch.Tensor, instance: int) -> None:
    """Write k and v, [T, Hkv, D] float32 views, to the pages of the rows, in the formats of these."""
    _append(step, None, k, v, instance, 0, 0)


def rotate_append_(
    step: GpuStep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, instance: int, table: int = 0
) -> None:
    """Rotate q: [T, Hq, D] in place; write k: [T, Hkv, D], rotated, and v to the pages. The view k stays as it is."""
    half = _check_rotated(step, "q", q, table)
    _check_rotated(step, "k", k, table)
    _append(step, q, k, v, instance, half, table)


def _append(
    step: GpuStep, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, instance: int, half: int, table: int
) -> None:
    num_rows, kv_heads, head_dim = k.shape
    if step.num_rows == 0 == num_rows:
        return
    layout = step.layout
    fits = (kv_heads, head_dim) == (layout.num_kv_heads, layout.head_dim)
    if k.shape != v.shape or not fits or not 0 <= instance < step.num_instances:
        raise ShapeError(
            f"append: k {list(k.shape)}, v {list(v.shape)} and instance {instance} do not fit pages of "
            f"{step.num_instances} instances, {layout.num_kv_heads} heads of {layout.head_dim}"
        )
    for name, view in (("k", k), ("v", v)):
        check_rows(f"append: {name}", view)
        _check_num_rows(step, f"append: {name}", view)
    heads = 0 if q is None or half == 0 else q.shape[1]
    kernels.rotate_append[(num_rows, triton.cdiv(heads, TILE_HEADS) + triton.cdiv(kv_heads, TILE_HEADS))](
        k if q is None else q,
        k,
        v,
        step.cos[table],
        step.sin[table],
        step.pages,
        step.recent,
        step.positions,
        step.span_of_row,
        step.pages.shape[1],
        instance,
        Q_STRIDE=0 if q is None else q.stride(0),
        K_STRIDE=k.stride(0),
        V_STRIDE=v.stride(0),
        HQ=heads,
        HALF=half,
        HB=triton.next_power_of_2(max(half, 1)),
        HAS_RECENT=step.recent is not None,
        TILE=TILE_HEADS,
        num_warps=4,
        **layout.turns,
        **layout.constants,
        **AS_WRITTEN,
    )


def _check_num_rows(step: GpuStep, name: str, view: torch.Tensor) -> None:
    if view.shape[0] != step.num_rows:
        raise ShapeError(f"{name} has {view.shape[0]} rows, the step {step.num_rows}")


def _check_rotated(step: GpuStep, name: str, x: torch.Tensor, table: int) -> int:
    """R/2."""
    half = step.cos.shape[2]
    if 2 * half > x.shape[2] or not 0 <= table < step.cos.shape[0]:
        raise ShapeError(f"rotate: tables {list(step.cos.shape)} and table {table} do not fit {name} {list(x.shape)}")
    check_rows(f"rotate: {name}", x)
    _check_num_rows(step, f"rotate: {name}", x)
    return half
