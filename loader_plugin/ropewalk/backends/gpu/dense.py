"""Dense columns that one kernel computes: weights as stored, and the launches of a product with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton import cdiv

from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.activations import Activations
from ropewalk.backends.gpu.dense_kernel import dense_linear
from ropewalk.backends.gpu.linear_kernel import add_parts_
from ropewalk.gptq.linear import DenseLinear


@dataclass(frozen=True, slots=True, eq=False)
class DenseSegment:
    """weight: [N, K] float16, bfloat16 or float32, contiguous. bias: [N] float32. ieee: products in float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    ieee: bool
    splits: int

    @property
    def num_columns(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def multiply_(self, x: Activations, y: torch.Tensor) -> None:
        """y = x W^T + bias; y: [T, N] float32, columns contiguous."""
        multiply_(x.values, self.weight, self.bias, y, self.splits, self.ieee)


def pack_dense(parts: Sequence[DenseLinear], device: torch.device, compute: str) -> DenseSegment:
    """Linears of one dtype; the weight of one alone is used as it is if it is on the device."""
    weights = [part.weight.to(device) for part in parts]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # [N, K]
    bias = None
    if any(part.bias is not None for part in parts):
        given = [torch.zeros(part.weight.shape[0]) if part.bias is None else part.bias.cpu() for part in parts]
        bias = torch.cat(given).to(device)
    ieee = compute == "exact" or weight.dtype == torch.float32 or not tiles.has_tf32(device)
    blocks = cdiv(weight.shape[1], tiles.DENSE_FEATURES)
    return DenseSegment(weight, bias, ieee, tiles.splits(blocks, weight.shape[0]))


def multiply_(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, splits: int, ieee: bool
) -> None:
    """y = x W^T + bias. x: [T, K] float32, weight: [N, K], y: [T, N] float32; rows of x and y may lie apart."""
    num_rows, (num_columns, in_features) = x.shape[0], weight.shape
    if not num_rows:
        return
    tile = tiles.dense_tile(num_rows, ieee, tiles.generation(y.device))
    split = splits > 1 and num_rows <= tiles.SPLIT_ROWS
    out = torch.empty(splits, num_rows, num_columns, device=y.device) if split else y
    grid = (cdiv(num_columns, tile.columns), cdiv(num_rows, tile.rows), splits if split else 1)
    dense_linear[grid](
        x,
        weight,
        y if bias is None else bias,
        out,
        num_rows,
        num_columns,
        in_features,
        x.stride(0),
        out.stride(-2),
        cdiv(in_features, tiles.DENSE_FEATURES),
        IEEE=ieee,
        EVEN=in_features % tiles.DENSE_FEATURES == 0,
        HAS_BIAS=bias is not None,
        BT=tile.rows,
        BN=tile.columns,
        BK=tiles.DENSE_FEATURES,
        SPLITS=splits,
        SPLIT_GRID=split,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if split:
        add_parts_(out, None, bias, y)
