"""Arrays on their way to the core and back: torch tensors and numpy arrays, checked and never converted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ropewalk.base.errors import ShapeError

if TYPE_CHECKING:
    from ropewalk.native.runtime import Runtime

Array = Any  # torch.Tensor or numpy.ndarray


def as_numpy(array: Array) -> np.ndarray:
    """The same memory as a numpy array."""
    if isinstance(array, np.ndarray):
        return array
    if not isinstance(array, torch.Tensor):
        raise ShapeError(f"expected a torch tensor or numpy array, got {type(array).__name__}")
    if array.device.type != "cpu":
        raise ShapeError(f"expected a tensor on the CPU, got one on {array.device}")
    try:
        return (array.detach() if array.requires_grad else array).numpy()
    except (TypeError, RuntimeError) as error:  # a dtype or layout that numpy does not have
        raise ShapeError(f"a tensor of {array.dtype}, {array.layout} cannot be read: {error}") from error


def scale_bits(scales: np.ndarray) -> np.ndarray:
    """float16 scales as their bit patterns, which is how the core takes them; float32 ones as they are."""
    if scales.dtype == np.float16:
        return scales.view(np.uint16)
    if scales.dtype != np.float32:
        raise ShapeError(f"scales has dtype {scales.dtype}; accepted: float16, float32")
    return scales


def checked_shape(array: Array, name: str, *num_dims: int) -> tuple[int, ...]:
    """The shape of an array that has one of these numbers of dimensions."""
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise ShapeError(f"{name} is a {type(array).__name__}; accepted: a torch tensor or numpy array")
    if array.ndim not in num_dims:
        accepted = " or ".join(map(str, num_dims))
        raise ShapeError(f"{name} has shape {list(array.shape)}; expected {accepted} dimensions")
    return tuple(array.shape)


LARGE_RESULT = 1 << 18  # floats; about where malloc begins to ask the system for every piece anew


def new_result(runtime: Runtime, like: Array, shape: tuple[int, ...]) -> Array:
    """An uninitialised float32 array: torch for torch, numpy for numpy. Large ones use recycled memory."""
    is_torch = isinstance(like, torch.Tensor)
    if math.prod(shape) < LARGE_RESULT:
        return torch.empty(shape, dtype=torch.float32) if is_torch else np.empty(shape, np.float32)
    array = runtime.core.empty(shape[0], math.prod(shape[1:])).reshape(shape)
    return torch.from_numpy(array) if is_torch else array
