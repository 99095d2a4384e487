"""Output features of a file in the order that layer functions want: a linear is reordered once, when it is read.

    PAIRS     the rotated part of a head:  0 1 2 3 .. R-1   ->   0 2 .. R-2  1 3 .. R-1
    BY_HEAD   q0 k0 v0 q1 k1 v1 ..                          ->   q0 q1 ..  k0 k1 ..  v0 v1 ..

So rotations always turn feature i together with i + R/2, and a product of q and k is the same sum in another order.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ropewalk.config.model import ModelConfig
from ropewalk.families.tables import Rows
from ropewalk.gptq.linear import DenseLinear, GptqLinear


def row_order(rows: Rows | None, config: ModelConfig, num_rows: int) -> torch.Tensor | None:
    """[N] int64: row i for the layer function is row order[i] of the file; None: they are in order."""
    match rows:
        case None:
            return None
        case Rows.PAIRS:
            heads = torch.arange(num_rows).view(-1, config.head_dim)  # [H, D]
            even, odd = heads[:, : config.paired_dim : 2], heads[:, 1 : config.paired_dim : 2]  # [H, R/2] each
            return torch.cat([even, odd, heads[:, config.paired_dim :]], dim=1).flatten()
        case Rows.BY_HEAD:
            by_head = torch.arange(num_rows).view(config.num_heads, 3, config.head_dim)  # [H, 3, D]
            return by_head.transpose(0, 1).flatten()


def ordered_linear(linear: GptqLinear | DenseLinear, order: torch.Tensor | None) -> GptqLinear | DenseLinear:
    """The linear with its output features in this order."""
    if order is None:
        return linear
    bias = None if linear.bias is None else linear.bias[order]
    if isinstance(linear, DenseLinear):
        return replace(linear, weight=linear.weight[order], bias=bias)
    columns = {name: getattr(linear, name)[:, order].contiguous() for name in ("qweight", "scales", "zeros")}
    return replace(linear, bias=bias, **columns)
