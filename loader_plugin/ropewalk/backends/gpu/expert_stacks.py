"""The experts of a layer as the kernels read them: the linears of all experts stacked in one buffer for each kind.

    words    expert 0 [blocks, N', 16] | expert 1 | ...        scales, zeros    expert 0 [pieces, N'] | ...

Experts may have been quantised differently (bits, group sizes); each kind is a stack, and a table says which place an
expert has in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from triton import cdiv

from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.activations import Activations, FeatureOrder
from ropewalk.backends.gpu.codes import UniformRows, held_bits, uniform_rows
from ropewalk.backends.gpu.experts_kernel import expert_linear, sum_expert_parts
from ropewalk.backends.gpu.pairs import Pairs
from ropewalk.backends.gpu.quantised import ASSEMBLY, QuantisedSegment, pack_segment
from ropewalk.base.errors import ShapeError, UnsupportedError
from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear

MOST_ROWS = (32, 64)  # of a tile, the fewer with groups of 32: more leave no registers for the places of its rows
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
        rows = 1 if pairs.are_few else min(max(1, num_pairs // pairs.num_experts), MOST_ROWS[weights.group > 32])
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


def pack(experts: Sequence[Expert], device: torch.device, compute: str) -> GpuExperts:
    """Lay out the experts of a layer, one after the other. compute: as for linears.

    Raises:
        ShapeError: no experts, or experts of different sizes.
        UnsupportedError: an expert whose weights are not quantised.
    """
    if not len(experts):
        raise ShapeError("pack_experts: at least one expert is needed, none was given")
    gate_up: dict[tuple[object, ...], _Growing] = {}
    down: dict[tuple[object, ...], _Growing] = {}
    sizes: tuple[tuple[int, int], ...] = ()
    for number in range(len(experts)):
        expert = experts[number]  # is read
        sizes = _checked_sizes(expert, sizes)
        for first, parts in _side_by_side(expert.gate, expert.up):
            _add_(gate_up, number, first, parts, len(experts), device)
        _add_(down, number, 0, [expert.down], len(experts), device)
    (in_features, inner), _, (_, out_features) = sizes
    stacks = (tuple(grown.finished(compute) for grown in stacks.values()) for stacks in (gate_up, down))
    return GpuExperts(len(experts), in_features, 2 * inner, out_features, *stacks)


def _checked_sizes(expert: Expert, wanted: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """[K, N] of gate, up and down; wanted: of the experts before, () for the first."""
    for part in expert:
        if isinstance(part, DenseLinear):
            raise UnsupportedError(
                f"{part.name}: its weights are not quantised, and the GPU backend computes quantised experts alone"
            )
    found = tuple((part.in_features, part.out_features) for part in expert)
    fits = found[0] == found[1] and found[0][1] == found[2][0] and found[0][0] == found[2][1]
    if not fits or (wanted and found != wanted):
        names = ", ".join(f"{part.name} {size}" for part, size in zip(expert, found, strict=True))
        raise ShapeError(f"pack_experts: {names}: experts of a layer have one size{f', {wanted}' if wanted else ''}")
    return found


def _side_by_side(gate: GptqLinear, up: GptqLinear) -> list[tuple[int, list[GptqLinear]]]:
    """(first column, linears that one product computes): both together if their rows are alike."""
    if _layout(gate) == _layout(up):
        return [(0, [gate, up])]
    return [(0, [gate]), (gate.out_features, [up])]


def _layout(part: GptqLinear) -> tuple[object, ...]:
    """Equal for linears whose columns can be side by side."""
    rows = uniform_rows(part)
    return (*_kind(part, rows), rows.source.numpy().tobytes(), rows.groups.numpy().tobytes())


def _kind(part: GptqLinear, rows: UniformRows) -> tuple[object, ...]:
    """Equal for linears that can be in one stack."""
    return (held_bits(part.bits), part.scales.dtype, rows.piece, rows.width)


def _add_(
    stacks: dict[tuple[object, ...], _Growing],
    number: int,
    first: int,
    parts: Sequence[GptqLinear],
    num_experts: int,
    device: torch.device,
) -> None:
    """To the stack of its kind."""
    rows = uniform_rows(parts[0])
    key = (first, len(parts), *_kind(parts[0], rows))
    if key not in stacks:
        stacks[key] = _Growing(first, parts[0].in_features, num_experts)
    stacks[key].add_(number, pack_segment(parts, rows, device), rows)


class _Growing:
    """A stack to which experts are added, in the order of their numbers; it has room for all of a layer."""

    def __init__(self, first: int, in_features: int, num_experts: int) -> None:
        self._first, self._in_features, self._num_experts = first, in_features, num_experts
        self._rows: dict[int, UniformRows] = {}  # of the experts that are in it
        self._tensors: dict[str, torch.Tensor] = {}
        self._last: QuantisedSegment | None = None

    def add_(self, number: int, packed: QuantisedSegment, rows: UniformRows) -> None:
        """Copy the tensors of one expert to the next place."""
        for name in ("words", "high", "scales", "zeros", "bias"):
            tensor = getattr(packed, name)
            if tensor is None:
                continue
            if name not in self._tensors:
                self._tensors[name] = tensor.new_zeros(self._num_experts, *tensor.shape)
            self._tensors[name][len(self._rows)] = tensor
        self._rows[number] = rows
        self._last = packed

    def finished(self, compute: str) -> ExpertStack:
        """The stack, with no more room than it needs."""
        packed, count, fp16 = self._last, len(self._rows), compute == "fp16"
        assert packed is not None, "stacks are made for an expert"
        tensors = {name: each if count == len(each) else each[:count].clone() for name, each in self._tensors.items()}
        device = packed.words.device
        slots = torch.full((self._num_experts,), -1, dtype=torch.int32)
        slots[list(self._rows)] = torch.arange(count, dtype=torch.int32)
        order = FeatureOrder(
            order=self._orders(device),
            width=next(iter(self._rows.values())).width,
            in_features=self._in_features,
            dtype=torch.float16 if fp16 else torch.float32,
            scaled=fp16,
        )
        blocks, padded = packed.words.shape[:2]
        absent = {name: None for name in ("high", "bias")}
        splits = tiles.splits(blocks, EXPERTS_AT_ONCE * padded)
        weights = replace(packed, **(absent | tensors), splits=splits)
        return ExpertStack(weights, slots.to(device), order, self._first)

    def _orders(self, device: torch.device) -> torch.Tensor | None:
        """None, [Kp] or [E, Kp] int32: as the experts agree."""
        first, *others = self._rows.values()
        if all(torch.equal(other.source, first.source) for other in others):
            return None if first.is_plain else first.source.to(device, torch.int32)
        orders = torch.full((self._num_experts, first.width), -1, dtype=torch.int32)  # of others: multiplied by none
        orders[list(self._rows)] = torch.stack([rows.source for rows in self._rows.values()]).to(torch.int32)
        return orders.to(device)
