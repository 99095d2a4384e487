"""Runs a recorded layer: its operations one by one, in torch, on the rows of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ropewalk.backends.protocol import RowChange, RowSpan
from ropewalk.backends.reference.activations import activate
from ropewalk.backends.reference.attention import attend, rotate_
from ropewalk.backends.reference.linear import ReferenceLinear, low_rank_product, product
from ropewalk.backends.reference.pages import append_, as_seen, gathered, pieces
from ropewalk.backends.shared import Seen, check_step
from ropewalk.families.program import (
    RESIDUAL,
    Activate,
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

# Rows of a step that go through a layer together: the inner activations are wide (2 * I floats a row), and a step may
# have thousands of rows.
BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceLayer:
    """A program, and the weights of one layer by the names that it uses."""

    program: Program
    weights: Mapping[str, torch.Tensor | ReferenceLinear]
    norm_eps: float


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceStep:
    """Rows of several sequences. x: [T, C] float32; cos, sin: [tables, T, R/2] float32."""

    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    spans: tuple[RowSpan, ...]

    def blocks(self, num_rows: int) -> Iterator[tuple[int, ReferenceStep]]:
        """(first row, the rows from there on as a step of their own), `num_rows` at a time."""
        for first in range(0, self.x.shape[0], num_rows):
            rows = slice(first, first + num_rows)
            spans = tuple(_spans_within(self.spans, first, min(first + num_rows, self.x.shape[0])))
            yield first, ReferenceStep(self.x[rows], self.cos[:, rows], self.sin[:, rows], spans)


def begin_step(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> ReferenceStep:
    """Check that rows, tables, spans and pages fit each other."""
    check_step(x, cos, sin, spans)
    return ReferenceStep(x, cos, sin, tuple(spans))


def run_layer_(
    step: ReferenceStep,
    layer: ReferenceLayer,
    instance: int,
    weight: float,
    changes: Sequence[RowChange],
    compute: str,
) -> None:
    """Add one layer instance to the residual stream, a block of rows after the other."""
    for first, block in step.blocks(BLOCK_ROWS):
        last = first + block.x.shape[0]
        overlapping = (change for change in changes if change.first < last and first < change.end)
        moved = [
            replace(change, first=max(change.first, first) - first, end=min(change.end, last) - first)
            for change in overlapping
        ]
        _Run(block, layer, instance, weight, moved, compute).run_()


class _Run:
    """One block of rows on its way through one layer; a buffer exists from the first result in it."""

    def __init__(
        self,
        step: ReferenceStep,
        layer: ReferenceLayer,
        instance: int,
        weight: float,
        changes: Sequence[RowChange],
        compute: str,
    ) -> None:
        self._step = step
        self._layer = layer
        self._instance = instance
        self._weight = weight
        self._changes = changes
        self._compute = compute
        self._buffers = {RESIDUAL: step.x}

    def run_(self) -> None:
        for operation in self._layer.program.operations:
            self._run_(operation)

    def _run_(self, operation: Operation) -> None:
        match operation:
            case RmsNorm(x, weight, out):
                self._write(out, rms_norm(self._read(x), self._layer.weights[weight], self._layer.norm_eps))
            case LayerNorm(x, weight, bias, out):
                self._write(out, self._layer_norm(self._read(x), weight, bias))
            case Linear(x, weight, out):
                self._write(out, self._linear(self._read(x).flatten(1), weight))
            case Rotate(x, table):
                rotate_(self._read(x), self._step.cos[table], self._step.sin[table])
            case Append(k, v):
                for rows, span in self._spans():
                    self._append_(span, self._read(k)[rows], self._read(v)[rows])
            case Attend(q, out, window, scale, softcap):
                seen = Seen(window, scale, softcap)
                for rows, span in self._spans():
                    found = self._attend(span, self._read(q)[rows], seen)  # [rows, Hq * D]
                    self._read(out)[rows] = found.view(-1, out.heads, out.size)  # [rows, Hq, D]
            case Activate(x, activation, out):
                self._write(out, activate(self._read(x), activation))
            case Gate(gate_up, activation, out):
                gate, up = self._read(gate_up).flatten(1).chunk(2, dim=1)  # [T, I] each
                self._write(out, activate(gate, activation) * up)
            case Route(logits, top_k, normalised, out):
                self._write(out, route(self._read(logits).flatten(1), top_k, normalised))
            case Experts(x, routes, weight, activation, out):
                experts = self._layer.weights[weight]
                y = experts.product(self._read(x).flatten(1), self._read(routes), activation, self._compute)
                self._write(out, y)
            case SigmoidMul(x, gate, out):
                self._write(out, self._read(gate).sigmoid() * self._read(x))
            case AddResidual(y, scale):
                self._step.x.add_(self._read(y).flatten(1), alpha=self._weight * scale)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x: [T, K] -> [T, N], changed in the rows whose adapters change this linear."""
        y = product(x, self._layer.weights[name], self._compute)
        for rows in self._changes:
            change = rows.change.get(name)
            if change is not None:
                y[rows.first : rows.end] += low_rank_product(x[rows.first : rows.end], change)
        return y

    def _layer_norm(self, x: torch.Tensor, weight: str, bias: str | None) -> torch.Tensor:
        """x: [T, heads, size] -> the same."""
        weights, per_head = self._layer.weights, x.shape[2]
        shift = None if bias is None else weights[bias].view(-1, per_head)  # [heads or 1, size]
        return layer_norm(x, weights[weight].view(-1, per_head), shift, self._layer.norm_eps)

    def _append_(self, span: RowSpan, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [T, Hkv, D], the rows of a span; those that are given a page for it are written in float16, too."""
        append_(span.pages, self._instance, k, v, span.start)
        for index, place, rows in pieces(span.start, span.num_rows):
            if index < len(span.recent) and span.recent[index] is not None:
                append_([span.recent[index]], self._instance, k[rows], v[rows], place)

    def _attend(self, span: RowSpan, q: torch.Tensor, seen: Seen) -> torch.Tensor:
        """q: [T, Hq, D], the rows of a span -> [T, Hq * D]."""
        parts = []
        for rows, pages in as_seen(span):
            keys, values = gathered(pages, self._instance, span.start + rows.stop)
            parts.append(attend(q[rows], keys, values, span.start + rows.start, seen))
        return torch.cat(parts)

    def _spans(self) -> Iterator[tuple[slice, RowSpan]]:
        first = 0
        for span in self._step.spans:
            yield slice(first, first + span.num_rows), span
            first += span.num_rows

    def _read(self, view: View) -> torch.Tensor:
        """[T, heads, size]; what is written to it is written to the buffer."""
        if view.buffer not in self._buffers:
            width = self._layer.program.widths[view.buffer]
            self._buffers[view.buffer] = torch.empty(self._step.x.shape[0], width, device=self._step.x.device)
        columns = self._buffers[view.buffer][:, view.first : view.end]  # [T, heads * size]
        return columns.view(-1, view.heads, view.size)  # [T, heads, size]

    def _write(self, view: View, values: torch.Tensor) -> None:
        self._read(view).copy_(values.view(-1, view.heads, view.size))  # [T, heads, size]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., C] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x: [..., C] float32 -> (x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return normed if bias is None else normed + bias


def route(logits: torch.Tensor, top_k: int, normalised: bool) -> torch.Tensor:
    """logits: [T, E] -> the experts of each row, ascending, and their shares: [T, 2, top_k] float32."""
    shares = logits.softmax(-1)  # [T, E]
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = order.sort(dim=-1).values  # [T, top_k]
    kept = shares.gather(1, chosen)  # [T, top_k]
    if normalised:
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.stack([chosen.float(), kept], dim=1)  # [T, 2, top_k]


def _spans_within(spans: Sequence[RowSpan], first: int, end: int) -> Iterator[RowSpan]:
    """The parts of the spans that lie in rows first..end."""
    row = 0
    for span in spans:
        low, high = max(first, row), min(end, row + span.num_rows)
        if low < high:
            yield replace(span, num_rows=high - low, start=span.start + low - row)
        row += span.num_rows
