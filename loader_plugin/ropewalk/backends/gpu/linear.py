"""Linear layers over the same input, packed for the kernels of the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ropewalk.backends.gpu.activations import Activations, FeatureOrder
from ropewalk.backends.gpu.codes import held_bits, uniform_rows
from ropewalk.backends.gpu.dense import DenseSegment, pack_dense
from ropewalk.backends.gpu.quantised import QuantisedSegment, pack_segment
from ropewalk.base.errors import ShapeError
from ropewalk.gptq.linear import DenseLinear, GptqLinear


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Adjacent columns of the result that one product computes. order: which of `GpuLinear.orders` it reads."""

    product: QuantisedSegment | DenseSegment
    first: int
    end: int
    order: int


@dataclass(frozen=True, slots=True, eq=False)
class GpuLinear:
    """Linears over one input; their outputs are concatenated. orders: the distinct ones in which they read it."""

    in_features: int
    out_features: int
    orders: tuple[FeatureOrder, ...]
    segments: tuple[Segment, ...]

    @property
    def num_bytes(self) -> int:
        """Memory on the card: words, scales, zero points, dense weights, orders of features, biases."""
        held = [order.order.nbytes for order in self.orders if order.order is not None]
        return sum(held) + sum(segment.product.num_bytes for segment in self.segments)

    def run_(self, inputs: Sequence[Activations], y: torch.Tensor) -> None:
        """y = x W + bias.

        inputs: the same rows, in each of `orders`. y: [T, N] float32, columns contiguous, any stride between rows.

        Raises:
            ShapeError: inputs in other orders, or a result of another shape, dtype or layout.
        """
        if len(inputs) != len(self.orders) or any(
            given.order is not order and not given.order.matches(order)
            for given, order in zip(inputs, self.orders, strict=True)
        ):
            raise ShapeError(f"linear: the input must be given in each of its {len(self.orders)} orders of features")
        num_rows = inputs[0].values.shape[0]
        if y.shape != (num_rows, self.out_features) or y.dtype != torch.float32 or y.stride(1) != 1:
            raise ShapeError(
                f"linear: y must be [{num_rows}, {self.out_features}] float32 with contiguous columns, "
                f"got {list(y.shape)} {y.dtype} with strides {y.stride()}"
            )
        for segment in self.segments:
            segment.product.multiply_(inputs[segment.order], y[:, segment.first : segment.end])


def pack(parts: Sequence[GptqLinear | DenseLinear], device: torch.device, compute: str) -> GpuLinear:
    """Lay out linears that read the same input; adjacent ones of the same kind become one segment.

    compute: "fp16" (float16 activations for quantised weights) or "exact" (float32).

    Raises:
        ShapeError: no parts, or parts that disagree about K.
    """
    if not parts:
        raise ShapeError("pack: at least one linear layer is needed, none was given")
    features = {part.name: _in_features(part) for part in parts}
    if len(set(features.values())) != 1:
        raise ShapeError(f"pack: layers over the same input must agree about its features, got {features}")
    orders: list[FeatureOrder] = []
    segments: list[Segment] = []
    first = 0
    for _, run in groupby(parts, key=_kind):
        segment, order = _packed(list(run), device, compute)
        known = [i for i, other in enumerate(orders) if order.matches(other)]
        if not known:
            orders.append(order)
        end = first + segment.num_columns
        segments.append(Segment(segment, first, end, known[0] if known else len(orders) - 1))
        first = end
    return GpuLinear(_in_features(parts[0]), first, tuple(orders), tuple(segments))


def _kind(part: GptqLinear | DenseLinear) -> tuple[object, ...]:
    """Equal for linears that one product can compute."""
    if isinstance(part, DenseLinear):
        return (part.weight.dtype,)
    rows = uniform_rows(part)
    layout = (tensor.numpy().tobytes() for tensor in (rows.source, rows.groups))
    return (held_bits(part.bits), part.scales.dtype, rows.piece, *layout)


def _packed(
    parts: list[GptqLinear] | list[DenseLinear], device: torch.device, compute: str
) -> tuple[QuantisedSegment | DenseSegment, FeatureOrder]:
    """Linears of one kind, and the order in which they read the input."""
    K = _in_features(parts[0])
    if isinstance(parts[0], DenseLinear):
        return pack_dense(parts, device, compute), FeatureOrder(None, K, K, torch.float32, scaled=False)
    rows = uniform_rows(parts[0])
    fp16 = compute == "fp16"
    order = FeatureOrder(
        order=None if rows.is_plain else rows.source.to(device, torch.int32),
        width=rows.width,
        in_features=K,
        dtype=torch.float16 if fp16 else torch.float32,
        scaled=fp16,
    )
    return pack_segment(parts, rows, device), order


def _in_features(part: GptqLinear | DenseLinear) -> int:
    return part.weight.shape[1] if isinstance(part, DenseLinear) else part.in_features
