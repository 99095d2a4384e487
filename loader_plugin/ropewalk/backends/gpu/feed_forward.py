"""Launches of the functions between the linears of a feed-forward block. See feed_forward_kernel.py."""

from __future__ import annotations

import torch
import triton

from ropewalk.backends.gpu import feed_forward_kernel as kernels
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, new_activations
from ropewalk.backends.gpu.rows import AS_WRITTEN, TILE_FLOATS, warps_of
from ropewalk.backends.gpu.views import check_rows, check_same_rows, checked_out
from ropewalk.families.program import Activation

ROW_FLOATS = 4096  # columns of a row that a program takes at a time
NUMBERS = {
    Activation.SILU: kernels.SILU.value,
    Activation.GELU: kernels.GELU.value,
    Activation.GELU_TANH: kernels.GELU_TANH.value,
}


def inner_activations(
    x: torch.Tensor,
    activation: Activation,
    gated: bool,
    order: FeatureOrder,
    out_float32: torch.Tensor | None,
    experts: torch.Tensor | None = None,
) -> Activations:
    """f(x) of x: [T, I] float32, or f(gate) * up of x: [T, 2 * I], as a linear reads it.

    out_float32: [T, I], where it is written as it is, if given. experts: [T] int32, where the order is that of the
    expert of a row.
    """
    num_rows, size = x.shape[0], order.in_features
    check_rows("inner_activations: x", x, size * (2 if gated else 1))
    made = new_activations(num_rows, order, x.device)
    out = checked_out("inner_activations", out_float32, num_rows, size)
    if num_rows:
        block = min(ROW_FLOATS, triton.next_power_of_2(order.width))
        kernels.inner_activations[(num_rows,)](
            x,
            order.order,
            x if experts is None else experts,
            made.values,
            made.scale,
            out,
            X_STRIDE=x.stride(0),
            SIZE=size,
            WIDTH=order.width,
            ACTIVATION=NUMBERS[activation],
            GATED=gated,
            HAS_ORDER=order.order is not None,
            BY_EXPERT=experts is not None,
            SCALED=order.scaled,
            WRITES_FLOAT32=out is not None,
            B=block,
            num_warps=warps_of(block),
            **AS_WRITTEN,
        )
    return made


def sigmoid_mul_(x: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> None:
    """out = sigmoid(gate) * x; x, out: [T, C], gate: [T, 1] float32 views."""
    num_rows, size = x.shape
    check_rows("sigmoid_mul: x", x)
    check_rows("sigmoid_mul: gate", gate, 1)
    check_rows("sigmoid_mul: out", out, size)
    for other in (gate, out):
        check_same_rows("sigmoid_mul", x, other)
    if x.numel():
        block = min(TILE_FLOATS, triton.next_power_of_2(size))
        kernels.sigmoid_mul[(num_rows, triton.cdiv(size, block))](
            x,
            gate,
            out,
            X_STRIDE=x.stride(0),
            GATE_STRIDE=gate.stride(0),
            OUT_STRIDE=out.stride(0),
            SIZE=size,
            B=block,
            num_warps=4,
            **AS_WRITTEN,
        )
