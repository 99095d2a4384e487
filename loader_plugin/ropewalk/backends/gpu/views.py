"""What kernels take of torch tensors: float32 rows whose values lie next to each other."""

from __future__ import annotations

import torch

from ropewalk.base.errors import ShapeError


def check_rows(name: str, view: torch.Tensor, *shape: int) -> None:
    """view: [T, ...], of this shape behind T, which is not looked at.

    Raises:
        ShapeError: another shape, not float32, or the values of a row do not follow each other.
    """
    found = tuple(view.shape[1:])
    if view.ndim < 2 or (shape and found != shape):
        raise ShapeError(f"{name} must be [T, {', '.join(map(str, shape)) or '...'}], got {list(view.shape)}")
    if view.dtype != torch.float32 or (view.shape[0] and not view[0].is_contiguous()):
        raise ShapeError(
            f"{name} must be float32 with the {list(found)} values of a row next to each other, got {view.dtype} "
            f"with strides {list(view.stride())}"
        )


def check_same_rows(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raises:
    ShapeError: x and y have not as many rows.
    """
    if x.shape[0] != y.shape[0]:
        raise ShapeError(f"{name}: {x.shape[0]} and {y.shape[0]} rows")


def checked_out(name: str, out: torch.Tensor | None, num_rows: int, size: int) -> torch.Tensor | None:
    """What a producer of activations writes in float32 besides, as it is given.

    Raises:
        ShapeError: it is there, and not contiguous float32 [num_rows, size].
    """
    if out is not None and (out.shape != (num_rows, size) or not out.is_contiguous() or out.dtype != torch.float32):
        raise ShapeError(
            f"{name}: out_float32 must be contiguous float32 [{num_rows}, {size}], got {out.dtype} {list(out.shape)}"
        )
    return out
