"""A recorded layer as launches: every linear is given its input in its own order of features by whatever computes it.

    program:   norm -> linear -> rotate, rotate, append -> attend -> linear -> add residual -> ...
    launches:  norm, folded -> product -> rotate and append -> attend -> fold -> product -> add residual -> ...

A buffer that linears alone read exists in their orders of features; in float32 only where something else reads it, or
in a call whose adapters change one of those linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.gpu import heads, low_rank, rows
from ropewalk.backends.gpu.activations import Activations, prepare
from ropewalk.backends.gpu.attention import attend
from ropewalk.backends.gpu.linear import GpuLinear
from ropewalk.backends.gpu.step import GpuStep
from ropewalk.backends.protocol import RowChange
from ropewalk.families.program import (
    RESIDUAL,
    AddResidual,
    Append,
    Attend,
    Gate,
    Linear,
    Operation,
    Program,
    RmsNorm,
    Rotate,
    View,
)


@dataclass(frozen=True, slots=True)
class RotateAppend:
    """Rotate q in place; write keys, rotated, and values to the pages. Nothing reads k afterwards."""

    q: View
    k: View
    v: View
    table: int


Launch = Operation | RotateAppend


class GpuLayer:
    """A program with the weights of one layer. weights: by the names of the program; norms are float32."""

    def __init__(
        self, program: Program, weights: Mapping[str, torch.Tensor | GpuLinear], norm_eps: float, compute: str
    ) -> None:
        self.weights = dict(weights)
        self.norm_eps = norm_eps
        self.exact = compute == "exact"
        self.widths = program.widths
        self.launches = fused(program.operations)
        self.readers = {  # the linears that read each buffer
            buffer: tuple(op.weight for op in program.operations if isinstance(op, Linear) and op.x.buffer == buffer)
            for buffer in range(len(program.widths))
        }
        self.only_linears_read = {
            op.out.buffer for op in program.operations if isinstance(op, (RmsNorm, Gate)) and _is_folded(op, program)
        }
        self.last_use = {buffer: index for index, op in enumerate(self.launches) for buffer in _buffers(op)}

    def run_(self, step: GpuStep, instance: int, weight: float, changes: Sequence[RowChange]) -> None:
        """Add one layer instance to the residual stream of the step."""
        run = _Run(self, step, instance, weight, changes)
        for index, launch in enumerate(self.launches):
            run.launch_(launch)
            run.forget_(index)


def fused(operations: Sequence[Operation]) -> tuple[Launch, ...]:
    """The operations, with neighbours that one kernel computes joined."""
    launches: list[Launch] = []
    index = 0
    while index < len(operations):
        match operations[index : index + 3]:
            case [Rotate(q, table), Rotate(k, other), Append(appended, v)] if (k, table) == (
                appended,
                other,
            ) and not any(_overlap(k, view) for later in operations[index + 3 :] for view in _reads(later)):
                launches.append(RotateAppend(q, k, v, table))
                index += 3
            case [operation, *_]:
                launches.append(operation)
                index += 1
    return tuple(launches)


class _Run:
    """The rows of a step on their way through one layer."""

    def __init__(
        self, layer: GpuLayer, step: GpuStep, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        self._layer, self._step = layer, step
        self._instance, self._weight, self._changes = instance, weight, changes
        self._buffers = {RESIDUAL: step.x}  # [T, width] float32 each
        self._folded: dict[int, list[Activations]] = {}  # buffers in the orders of the linears that read them

    def launch_(self, launch: Launch) -> None:
        step, weights = self._step, self._layer.weights
        match launch:
            case RmsNorm(x, weight, out):
                self._norm_(x, weights[weight], out)
            case Linear(x, weight, out):
                self._linear_(x, weight, out)
            case Rotate(x, table):
                heads.rotate_(step, self._view(x), table)
            case Append(k, v):
                heads.append_(step, self._view(k), self._view(v), self._instance)
            case RotateAppend(q, k, v, table):
                heads.rotate_append_(step, self._view(q), self._view(k), self._view(v), self._instance, table)
            case Attend(q, out, window, _, _):
                attend(step, self._view(q), self._instance, window, self._view(out), self._layer.exact)
            case Gate(gate_up, _, out):
                self._silu_(gate_up, out)
            case AddResidual(y, _):
                rows.add_residual_(step.x, self._columns(y), self._weight)

    def forget_(self, index: int) -> None:
        """Give the memory of buffers back that no launch after this one uses."""
        for buffer in [*self._buffers, *self._folded]:
            if buffer != RESIDUAL and self._layer.last_use[buffer] <= index:
                self._buffers.pop(buffer, None)
                self._folded.pop(buffer, None)

    def _norm_(self, x: View, weight: torch.Tensor, out: View) -> None:
        eps = self._layer.norm_eps
        if out.buffer not in self._layer.only_linears_read:
            rows.rms_norm_(self._view(x), weight, eps, self._view(out))
            return
        columns = self._columns(x)
        self._fold_(out, lambda order, whole: rows.norm_activations(columns, weight, eps, order, whole))

    def _silu_(self, gate_up: View, out: View) -> None:
        columns = self._columns(gate_up)
        self._fold_(out, lambda order, whole: rows.silu_activations(columns, order, whole))

    def _fold_(self, out: View, produce) -> None:
        """Produce a buffer in every order that a linear wants; the first launch also writes it in float32 if needed."""
        whole = self._columns(out) if self._is_needed_whole(out.buffer) else None
        folded = self._folded.setdefault(out.buffer, [])
        for name in self._layer.readers[out.buffer]:
            for order in self._layer.weights[name].orders:
                if not any(order is made.order for made in folded):
                    folded.append(produce(order, whole if not folded else None))

    def _is_needed_whole(self, buffer: int) -> bool:
        if buffer not in self._layer.only_linears_read:
            return True
        changed = (rows.change.get(name) for rows in self._changes for name in self._layer.readers[buffer])
        return any(change is not None for change in changed)

    def _linear_(self, x: View, name: str, out: View) -> None:
        weight, y = self._layer.weights[name], self._columns(out)  # y: [T, N]
        weight.run_(self._inputs(x, weight), y)
        for changed in self._changes:
            change = changed.change.get(name)
            if change is not None:
                low_rank.add_(y, self._columns(x), change, changed.first, changed.end)

    def _inputs(self, x: View, weight: GpuLinear) -> list[Activations]:
        folded = self._folded.get(x.buffer, [])
        found = []
        for order in weight.orders:
            known = next((made for made in folded if made.order is order), None)
            found.append(prepare(self._columns(x), order) if known is None else known)
        return found

    def _columns(self, view: View) -> torch.Tensor:
        """[T, heads * size]; what is written to it is written to the buffer."""
        if view.buffer not in self._buffers:
            width = self._layer.widths[view.buffer]
            self._buffers[view.buffer] = torch.empty(self._step.num_rows, width, device=self._step.x.device)
        return self._buffers[view.buffer][:, view.first : view.end]

    def _view(self, view: View) -> torch.Tensor:
        """[T, heads, size] of a buffer."""
        return self._columns(view).unflatten(1, (view.heads, view.size))  # [T, heads, size]


def _is_folded(op: RmsNorm | Gate, program: Program) -> bool:
    """True if linears alone read the result, whole, and the kernel that folds it can compute it: one head."""
    readers = [other for other in program.operations if any(_overlap(op.out, view) for view in _reads(other))]
    return op.out.heads == 1 and all(isinstance(reader, Linear) and reader.x == op.out for reader in readers)


def _reads(op: Launch) -> tuple[View, ...]:
    match op:
        case RmsNorm(x, _, _) | Linear(x, _, _) | Rotate(x, _):
            return (x,)
        case Append(k, v):
            return k, v
        case RotateAppend(q, k, v, _):
            return q, k, v
        case Attend(q, _, _, _, _):
            return (q,)
        case Gate(gate_up, _, _):
            return (gate_up,)
        case AddResidual(y, _):
            return (y,)


def _buffers(op: Launch) -> set[int]:
    written = {op.out.buffer} if isinstance(op, (RmsNorm, Linear, Attend, Gate)) else set()
    return written | {view.buffer for view in _reads(op)}


def _overlap(one: View, other: View) -> bool:
    return one.buffer == other.buffer and one.first < other.end and other.first < one.end
