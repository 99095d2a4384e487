"""A recorded layer as launches: every linear is given its input in its own order of features by whatever computes it.

    program:   norm -> linear -> rotate, rotate, append -> attend -> linear -> add residual -> ...
    launches:  norm, folded -> product -> rotate and append -> attend -> fold -> product -> add residual -> ...

A buffer that linears alone read exists in their orders of features; in float32 only where something else reads it, or
in a call whose adapters change one of those linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ropewalk.backends.gpu import experts, feed_forward, heads, low_rank, rows
from ropewalk.backends.gpu.activations import Activations, FeatureOrder, prepare
from ropewalk.backends.gpu.attention import attend
from ropewalk.backends.gpu.experts import GpuExperts
from ropewalk.backends.gpu.linear import GpuLinear
from ropewalk.backends.gpu.step import GpuStep
from ropewalk.backends.protocol import RowChange
from ropewalk.backends.shared import Seen
from ropewalk.families.program import (
    RESIDUAL,
    Activate,
    Activation,
    AddResidual,
    Append,
    Attend,
    Experts,
    Gate,
    LayerNorm,
    Linear,
    Operation,
    Program,
    RmsNorm,
    Rotate,
    Route,
    SigmoidMul,
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
Folding = RmsNorm | LayerNorm | Activate | Gate  # whose result is written as linears read it


class GpuLayer:
    """A program with the weights of one layer. weights: by the names of the program; norms are float32."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor | GpuLinear | GpuExperts],
        norm_eps: float,
        compute: str,
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
            op.out.buffer for op in program.operations if isinstance(op, Folding) and _is_folded(op, program)
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
        step, weights, eps = self._step, self._layer.weights, self._layer.norm_eps
        match launch:
            case RmsNorm(x, weight, out):
                self._norm_(x, rows.Norm(weights[weight], None, eps, centred=False), out)
            case LayerNorm(x, weight, bias, out):
                shift = None if bias is None else weights[bias]
                self._norm_(x, rows.Norm(weights[weight], shift, eps, centred=True), out)
            case Linear(x, weight, out):
                self._linear_(x, weight, out)
            case Rotate(x, table):
                heads.rotate_(step, self._view(x), table)
            case Append(k, v):
                heads.append_(step, self._view(k), self._view(v), self._instance)
            case RotateAppend(q, k, v, table):
                heads.rotate_append_(step, self._view(q), self._view(k), self._view(v), self._instance, table)
            case Attend(q, out, window, scale, softcap):
                seen = Seen(window, scale, softcap)
                attend(step, self._view(q), self._instance, seen, self._view(out), self._layer.exact)
            case Activate(x, activation, out):
                self._inner_(x, activation, False, out)
            case Gate(gate_up, activation, out):
                self._inner_(gate_up, activation, True, out)
            case Route(logits, _, normalised, out):
                experts.route_(self._columns(logits), normalised, self._view(out))
            case Experts(x, routes, weight, activation, out):
                experts.run_(weights[weight], self._columns(x), self._view(routes), activation, self._columns(out))
            case SigmoidMul(x, gate, out):
                feed_forward.sigmoid_mul_(self._columns(x), self._columns(gate), self._columns(out))
            case AddResidual(y, scale):
                rows.add_residual_(step.x, self._columns(y), self._weight * scale)

    def forget_(self, index: int) -> None:
        """Give the memory of buffers back that no launch after this one uses."""
        for buffer in [*self._buffers, *self._folded]:
            if buffer != RESIDUAL and self._layer.last_use[buffer] <= index:
                self._buffers.pop(buffer, None)
                self._folded.pop(buffer, None)

    def _norm_(self, x: View, norm: rows.Norm, out: View) -> None:
        if out.buffer not in self._layer.only_linears_read:
            rows.norm_(self._view(x), norm, self._view(out))
            return
        columns = self._columns(x)
        self._fold_(out, lambda order, whole: rows.norm_activations(columns, norm, order, whole))

    def _inner_(self, x: View, activation: Activation, gated: bool, out: View) -> None:
        columns = self._columns(x)
        produce = partial(feed_forward.inner_activations, columns, activation, gated)
        if out.buffer in self._layer.only_linears_read:
            self._fold_(out, produce)
        else:
            plain = FeatureOrder(None, out.size, out.size, torch.float32, scaled=False)
            self._buffers[out.buffer] = produce(plain, None).values

    def _fold_(self, out: View, produce: Callable[[FeatureOrder, torch.Tensor | None], Activations]) -> None:
        """Produce a buffer in every order that a linear wants; the first launch also writes it in float32 if needed."""
        whole = self._columns(out) if self._is_needed_whole(out.buffer) else None
        folded = self._folded.setdefault(out.buffer, [])
        for name in self._layer.readers[out.buffer]:
            for order in self._layer.weights[name].orders:
                if not any(order is made.order for made in folded):
                    folded.append(produce(order, whole if not folded else None))

    def _is_needed_whole(self, buffer: int) -> bool:
        """Whether adapters change a linear that reads it; of those that linears alone read."""
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


def _is_folded(op: Folding, program: Program) -> bool:
    """True if linears alone read the result, whole, and the kernel that folds it can compute it: one head."""
    readers = [other for other in program.operations if any(_overlap(op.out, view) for view in _reads(other))]
    return op.out.heads == 1 and all(isinstance(reader, Linear) and reader.x == op.out for reader in readers)


def _reads(op: Launch) -> tuple[View, ...]:
    match op:
        case RmsNorm(x) | LayerNorm(x) | Linear(x) | Rotate(x) | Activate(x) | Gate(x) | Route(x) | Attend(x):
            return (x,)
        case Append(k, v):
            return k, v
        case RotateAppend(q, k, v):
            return q, k, v
        case Experts(x, other) | SigmoidMul(x, other):
            return x, other
        case AddResidual(y):
            return (y,)


def _buffers(op: Launch) -> set[int]:
    written = () if isinstance(op, Rotate | Append | RotateAppend | AddResidual) else (op.out,)
    return {view.buffer for view in (*written, *_reads(op))}


def _overlap(one: View, other: View) -> bool:
    return one.buffer == other.buffer and one.first < other.end and other.first < one.end
