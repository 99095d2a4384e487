"""Activations as the kernels of linears read them: in the order of features of the linear, scaled to fit float16.

Models leave the range of float16 in single features (activations above 65504 are known from Llama and Qwen models), so
a row is divided by a power of two of its own, which is exact, and the product is multiplied by it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ropewalk.backends.gpu.activations_kernel import prepare_rows
from ropewalk.base.errors import ShapeError


@dataclass(frozen=True, slots=True, eq=False)
class FeatureOrder:
    """How a linear reads its input.

    order: [Kp] int32, the original feature of each, -1 where the producer writes 0; None: the features as they are,
    then zeros up to Kp; [E, Kp] where each expert has an order of its own. width: Kp. in_features: K. dtype: float16
    or float32. scaled: rows are divided by a power of two of their own.
    """

    order: torch.Tensor | None
    width: int
    in_features: int
    dtype: torch.dtype
    scaled: bool

    def matches(self, other: FeatureOrder) -> bool:
        """True if activations in the other order are activations in this one."""
        fields = ("width", "in_features", "dtype", "scaled")
        if any(getattr(self, field) != getattr(other, field) for field in fields):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return self.order is other.order or torch.equal(self.order, other.order)


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """values: [T, Kp] in the dtype of the order, rows contiguous. scale: [T] float32, each a power of two, or None.

    Feature order[i] of row t is values[t, i] * scale[t].
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    order: FeatureOrder


def new_activations(num_rows: int, order: FeatureOrder, device: torch.device) -> Activations:
    """Room for that many rows, not initialised: for producers."""
    values = torch.empty(num_rows, order.width, dtype=order.dtype, device=device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=device) if order.scaled else None
    return Activations(values, scale, order)


def prepare(x: torch.Tensor, order: FeatureOrder, experts: torch.Tensor | None = None) -> Activations:
    """Activations of any float32 rows; `x` itself where nothing has to be moved, rounded or scaled.

    x: [T, K] float32, features contiguous, any stride between rows. experts: [T * times] int32, for an order that each
    expert has of its own: of every row `times` experts, each of which gets a row of the result.

    Raises:
        ShapeError: x is something else.
    """
    if x.ndim != 2 or x.shape[1] != order.in_features or x.dtype != torch.float32 or x.stride(1) != 1:
        raise ShapeError(
            f"linear: x must be [T, {order.in_features}] float32 with contiguous features, "
            f"got {list(x.shape)} {x.dtype} with strides {x.stride()}"
        )
    if order.order is None and order.width == order.in_features and order.dtype == torch.float32 and not order.scaled:
        return Activations(x, None, order)
    made = new_activations(x.shape[0] if experts is None else experts.shape[0], order, x.device)
    if x.shape[0]:
        prepare_rows(x, order.order, made.values, made.scale, experts)
    return made
