"""Launches of mixtures of experts: routing, and the feed-forward blocks of the experts that rows have chosen.

    x -> prepared (for each pair, where experts have orders of their own) -> gate_up of the pairs -> f(gate) * up
      -> down of the pairs -> sum over the pairs of a row

Which experts rows have is known on the device alone. Few pairs are a program each, and each reads its expert's weights;
many are put in the order of their experts there, so that weights are read once for a tile of them. Both give the same
bits. See experts_kernel.py for what a pair is.
"""

from __future__ import annotations

import torch
import triton

from ropewalk.backends.gpu import experts_kernel as kernels
from ropewalk.backends.gpu.activations import prepare
from ropewalk.backends.gpu.expert_stacks import GpuExperts
from ropewalk.backends.gpu.feed_forward import inner_activations
from ropewalk.backends.gpu.pairs import Pairs
from ropewalk.backends.gpu.rows import AS_WRITTEN, TILE_FLOATS
from ropewalk.backends.gpu.views import check_rows, check_same_rows
from ropewalk.base.errors import ShapeError
from ropewalk.families.program import Activation

ROWS_AT_ONCE = 2048  # of a step: a pair has 2 * I + C floats


def route_(logits: torch.Tensor, normalised: bool, out: torch.Tensor) -> None:
    """The experts of each row, as `Route` of families/program.py; logits: [T, E], out: [T, 2, top_k] float32 views."""
    (num_rows, num_experts), top_k = logits.shape, out.shape[2]
    check_rows("route: logits", logits)
    check_rows("route: out", out, 2, top_k)
    check_same_rows("route", logits, out)
    if not 0 < top_k <= num_experts:
        raise ShapeError(f"route: {top_k} of {num_experts} experts")
    if num_rows:
        kernels.route[(num_rows,)](
            logits,
            out,
            X_STRIDE=logits.stride(0),
            OUT_STRIDE=out.stride(0),
            EXPERTS=num_experts,
            TOP_K=top_k,
            NORMALISED=normalised,
            B=triton.next_power_of_2(num_experts),
            num_warps=1,
            **AS_WRITTEN,
        )


def run_(weight: GpuExperts, x: torch.Tensor, routes: torch.Tensor, activation: Activation, out: torch.Tensor) -> None:
    """What its experts make of each row, as `Experts` of families/program.py.

    x, out: [T, C], routes: [T, 2, top_k] float32 views, the experts as `route_` gives them.

    Raises:
        ShapeError: x, routes or out do not fit each other or the weights.
    """
    check_rows("experts: x", x, weight.in_features)
    check_rows("experts: routes", routes, 2, routes.shape[2])
    check_rows("experts: out", out, weight.out_features)
    check_same_rows("experts", x, routes)
    check_same_rows("experts", x, out)
    for first in range(0, x.shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        _run_block_(weight, x[rows], routes[rows], activation, out[rows])


def _run_block_(
    weight: GpuExperts, x: torch.Tensor, routes: torch.Tensor, activation: Activation, out: torch.Tensor
) -> None:
    num_rows, _, top_k = routes.shape
    experts = routes[:, 0].to(torch.int32).view(-1)  # [T * top_k]
    pairs = Pairs(experts, weight.num_experts)
    inner = torch.empty(len(experts), weight.gate_up_features, device=x.device)
    for stack in weight.gate_up:
        given = prepare(x, stack.order, experts if stack.has_own_orders else None)
        stack.multiply_(given, pairs, inner[:, stack.first : stack.end])
    products = torch.empty(len(experts), weight.out_features, device=x.device)
    for stack in weight.down:
        own = experts if stack.has_own_orders else None
        given = inner_activations(inner, activation, True, stack.order, None, own)
        stack.multiply_(given, pairs, products[:, stack.first : stack.end])
    size = out.shape[1]
    block = min(TILE_FLOATS, triton.next_power_of_2(size))
    kernels.combine[(num_rows, triton.cdiv(size, block))](
        products,
        routes,
        out,
        ROUTES_STRIDE=routes.stride(0),
        OUT_STRIDE=out.stride(0),
        TOP_K=top_k,
        SIZE=size,
        B=block,
        num_warps=4,
        **AS_WRITTEN,
    )
