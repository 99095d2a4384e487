"""The experts of a layer as the kernels read them: the linears of all experts stacked in one buffer for each kind.

    words    expert 0 [blocks, N', 16] | expert 1 | ...        scales, zeros    expert 0 [pieces, N'] | ...

Experts may have been quantised differently (bits, group sizes); each kind is a stack, and a table says which place an
expert has in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from triton import cdiv

from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.activations import Activations, FeatureOrder
from ropewalk.backends.gpu.codes import UniformRows, held_bits, uniform_rows
from ropewalk.backends.gpu.experts_kernel import expert_linear, sum_expert_parts
from ropewalk.backends.gpu.pairs import Pairs
from ropewalk.backends.gpu.quantised import ASSEMBLY, QuantisedSegment, pack_segment
from ropewalk.base.errors import ShapeError, UnsupportedError
from ropewalk.gptq.linear import DenseLinear, GptqLinear

EXPERTS_AT_ONCE = 8  # of a token, about: so many times more programs a product of few rows has


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStack:
    """Columns first..end of a product with each expert's weights, for the experts that are of one kind.

    weights: of one expert, its tensors with a dimension for the experts in front. slots: [E] int32, where in it an
    expert is, or -1. order: of the features; of each expert, if its tensor is [E, Kp].
    """

    weights: QuantisedSegment
    slots: torch.Tensor
    order: FeatureOrder
    first: int

    @property
    def end(self) -> int:
        """The column behind the last."""
        return self.first + self.weights.num_columns

    @property
    def num_bytes(self) -> int:
        """Memory of the weights, and of the tables."""
        return self.weights.num_bytes + self.slots.nbytes + (0 if self.order.order is None else self.order.order.nbytes)

    @property
    def has_own_orders(self) -> bool:
        """Whether each expert has its own order of features, so that each pair has a row of activations."""
        return self.order.order is not None and self.order.order.ndim == 2

    def multiply_(self, x: Activations, pairs: Pairs, y: torch.Tensor) -> None:
        """y = x W + bias for each pair whose expert is in the stack; y: [P, N] float32, columns contiguous.

        x: a row for each pair, or one for all pairs of a row.
        """
        weights, num_pairs = self.weights, pairs.count
        blocks, padded = weights.words.shape[1:3]
        exact = x.values.dtype == torch.float32
        rows = 1 if pairs.are_few else max(1, num_pairs // pairs.num_experts)
        tile = tiles.linear_tile(rows, padded, weights.bits, weights.group, exact, tiles.generation(y.device))
        split = weights.splits > 1 and pairs.are_few
        out = torch.empty(weights.splits, num_pairs, weights.num_columns, device=y.device) if split else y
        grouped = None if pairs.are_few else pairs.grouped(tile.rows)
        num_tiles = num_pairs if grouped is None else grouped.tiles.shape[0]
        times = num_pairs // x.values.shape[0]
        scale = x.values if x.scale is None else x.scale
        bias = y if weights.bias is None else weights.bias
        expert_linear[(cdiv(padded, tile.columns), num_tiles, weights.splits if split else 1)](
            x.values,
            scale,
            weights.words,
            weights.words if weights.high is None else weights.high,
            weights.scales,
            weights.zeros,
            bias,
            out,
            self.slots,
            pairs.experts,
            pairs.experts if grouped is None else grouped.tiles,
            pairs.experts if grouped is None else grouped.order,
            num_pairs,
            weights.num_columns,
            x.values.stride(0),
            out.stride(-2),
            padded,
            blocks,
            weights.group_shift,
            weights.scales.shape[1],
            TIMES=times,
            GROUPED=grouped is not None,
            BITS=weights.bits,
            GROUP=weights.group,
            EXACT=exact,
            SCALED=x.scale is not None,
            HAS_BIAS=weights.bias is not None,
            ASSEMBLY=ASSEMBLY,
            BT=tile.rows,
            BN=tile.columns,
            SPLITS=weights.splits,
            SPLIT_GRID=split,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        if split:
            sum_expert_parts[(cdiv(weights.num_columns, tiles.SUM_COLUMNS), num_pairs)](
                out,
                scale,
                bias,
                y,
                self.slots,
                pairs.experts,
                num_pairs,
                weights.num_columns,
                y.stride(0),
                padded,
                TIMES=times,
                SCALED=x.scale is not None,
                HAS_BIAS=weights.bias is not None,
                SPLITS=weights.splits,
                BN=tiles.SUM_COLUMNS,
                num_warps=tiles.SUM_WARPS,
                enable_fp_fusion=True,
            )


@dataclass(frozen=True, slots=True, eq=False)
class GpuExperts:
    """The experts of a layer. gate_up, down: stacks that together have all columns of all experts.

    gate_up_features: 2 * I.
    """

    num_experts: int
    in_features: int
    gate_up_features: int
    out_features: int
    gate_up: tuple[ExpertStack, ...]
    down: tuple[ExpertStack, ...]

    @property
    def num_bytes(self) -> int:
        """Memory on the card."""
        return sum(stack.num_bytes for stack in (*self.gate_up, *self.down))


def pack(
    gates: Sequence[GptqLinear | DenseLinear],
    ups: Sequence[GptqLinear | DenseLinear],
    downs: Sequence[GptqLinear | DenseLinear],
    device: torch.device,
    compute: str,
) -> GpuExperts:
    """Lay out the experts of a layer, one after the other. compute: as for linears.

    Raises:
        ShapeError: no experts, or experts of different shapes.
        UnsupportedError: an expert whose weights are not quantised.
    """
    for part in (*gates, *ups, *downs):
        if isinstance(part, DenseLinear):
            raise UnsupportedError(
                f"{part.name}: its weights are not quantised, and the GPU backend computes quantised experts alone"
            )
    _check(gates, ups, downs)
    together = all(_rows_of(gate) == _rows_of(up) for gate, up in zip(gates, ups, strict=True))
    inner = gates[0].out_features
    if together:
        gate_up = _stacks([list(pair) for pair in zip(gates, ups, strict=True)], 0, device, compute)
    else:
        gate_up = (
            *_stacks([[gate] for gate in gates], 0, device, compute),
            *_stacks([[up] for up in ups], inner, device, compute),
        )
    down = _stacks([[part] for part in downs], 0, device, compute)
    return GpuExperts(len(gates), gates[0].in_features, 2 * inner, downs[0].out_features, gate_up, down)


def _check(gates: Sequence[GptqLinear], ups: Sequence[GptqLinear], downs: Sequence[GptqLinear]) -> None:
    if not gates or not len(gates) == len(ups) == len(downs):
        raise ShapeError(f"experts: {len(gates)} gates, {len(ups)} ups and {len(downs)} downs")
    inner = gates[0].out_features
    for parts, wanted in (
        ((*gates, *ups), [gates[0].in_features, inner]),
        (downs, [inner, downs[0].out_features]),
    ):
        for part in parts:
            found = [part.in_features, part.out_features]
            if found != wanted:
                raise ShapeError(f"{part.name}: {found}, and another expert {wanted}")


def _rows_of(part: GptqLinear) -> tuple[object, ...]:
    """Equal for linears whose columns can be side by side."""
    rows = uniform_rows(part)
    return (*_kind(part, rows), rows.source.numpy().tobytes(), rows.groups.numpy().tobytes())


def _kind(part: GptqLinear, rows: UniformRows) -> tuple[object, ...]:
    """Equal for linears that can be in one stack."""
    return (held_bits(part.bits), part.scales.dtype, rows.piece, rows.width)


def _stacks(
    experts: Sequence[Sequence[GptqLinear]], first: int, device: torch.device, compute: str
) -> tuple[ExpertStack, ...]:
    """experts: of each its linears, whose columns are side by side from column `first` of the result on."""
    rows = [uniform_rows(parts[0]) for parts in experts]
    kinds: dict[tuple[object, ...], list[int]] = {}
    for number, parts in enumerate(experts):
        kinds.setdefault(_kind(parts[0], rows[number]), []).append(number)
    return tuple(_stack(experts, rows, numbers, first, device, compute) for numbers in kinds.values())


def _stack(
    experts: Sequence[Sequence[GptqLinear]],
    rows: Sequence[UniformRows],
    numbers: Sequence[int],
    first: int,
    device: torch.device,
    compute: str,
) -> ExpertStack:
    """The experts of these numbers, which are of one kind."""
    slots = torch.full((len(experts),), -1, dtype=torch.int32)
    slots[list(numbers)] = torch.arange(len(numbers), dtype=torch.int32)
    fp16 = compute == "fp16"
    order = FeatureOrder(
        order=_orders(rows, numbers, device),
        width=rows[numbers[0]].width,
        in_features=experts[0][0].in_features,
        dtype=torch.float16 if fp16 else torch.float32,
        scaled=fp16,
    )
    return ExpertStack(_stacked(experts, rows, numbers, device), slots.to(device), order, first)


def _orders(rows: Sequence[UniformRows], numbers: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """None, [Kp] or [E, Kp] int32: as the experts agree."""
    chosen = [rows[number] for number in numbers]
    if all(torch.equal(each.source, chosen[0].source) for each in chosen):
        return None if chosen[0].is_plain else chosen[0].source.to(device, torch.int32)
    orders = torch.full((len(rows), chosen[0].width), -1, dtype=torch.int32)  # of others: read, and multiplied by none
    orders[list(numbers)] = torch.stack([each.source for each in chosen]).to(torch.int32)
    return orders.to(device)


def _stacked(
    experts: Sequence[Sequence[GptqLinear]], rows: Sequence[UniformRows], numbers: Sequence[int], device: torch.device
) -> QuantisedSegment:
    """Packed one by one into buffers for all: no more memory than these and one expert."""
    made: dict[str, torch.Tensor | None] = {}
    for place, number in enumerate(numbers):
        packed = pack_segment(experts[number], rows[number], device)
        for name in ("words", "high", "scales", "zeros", "bias"):
            tensor = getattr(packed, name)
            if tensor is None:
                continue
            if made.get(name) is None:
                made[name] = tensor.new_zeros(len(numbers), *tensor.shape)
            made[name][place] = tensor
    blocks, padded = packed.words.shape[:2]
    return QuantisedSegment(
        bits=packed.bits,
        words=made["words"],
        high=made.get("high"),
        scales=made["scales"],
        zeros=made["zeros"],
        bias=made.get("bias"),
        num_columns=packed.num_columns,
        group=packed.group,
        group_shift=packed.group_shift,
        splits=tiles.splits(blocks, EXPERTS_AT_ONCE * padded),
    )
