"""The GPU backend: the operations of backends/protocol.py as Triton kernels, on a card or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ropewalk.backends.gpu import expert_stacks, linear, low_rank, rows
from ropewalk.backends.gpu.activations import prepare
from ropewalk.backends.gpu.expert_stacks import GpuExperts
from ropewalk.backends.gpu.graphs import LayerRun, StepGraphs, cuda_capture
from ropewalk.backends.gpu.interpreter import sum_products_exactly
from ropewalk.backends.gpu.layers import GpuLayer
from ropewalk.backends.gpu.linear import GpuLinear
from ropewalk.backends.gpu.low_rank import GpuLowRank
from ropewalk.backends.gpu.memory import told_in_numbers
from ropewalk.backends.gpu.move import move_rows_
from ropewalk.backends.gpu.pages import GpuPage, GpuPagePool
from ropewalk.backends.gpu.step import GpuStep
from ropewalk.backends.protocol import LowRankPart, RowChange, RowSpan
from ropewalk.backends.shared import SinglePlace
from ropewalk.base.errors import RequestError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import Program
from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear

LOAD_REMEDY = "give gpu_layers, so that the CPU runs the rest, or gpu_split for several cards"
RUN_REMEDY = "load the model with a smaller max_input_len or cache_memory"


class GpuBackend(SinglePlace):
    """Kernels on one device, which `device.checked_device` has looked at. compute: "fp16" or "exact"."""

    name = "gpu"

    def __init__(self, compute: str, device: torch.device) -> None:
        self.compute = compute
        self.device = device
        if device.type == "cpu":
            sum_products_exactly()
        self._graphs = StepGraphs(cuda_capture(device)) if device.type == "cuda" else None

    @property
    def arithmetic(self) -> str:
        """Cards of different capabilities run other code."""
        if self.device.type == "cpu":
            return f"{self.name} {self.compute} interpreted"
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"{self.name} {self.compute} {major}.{minor}"

    def computing(self, compute: str) -> None:
        """Weights are laid out for one arithmetic."""
        return None

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> GpuLinear:
        """Lay out linears that read the same input on the device."""
        parts = tuple(parts)
        with self._on_device(f"the weights of {parts[0].name if parts else ''}", MemoryError, LOAD_REMEDY):
            return linear.pack(parts, self.device, self.compute)

    def pack_experts(self, experts: Sequence[Expert]) -> GpuExperts:
        """Lay out the experts of a layer on the device, stacked."""
        with self._on_device("the experts of a layer", MemoryError, LOAD_REMEDY):
            return expert_stacks.pack(experts, self.device, self.compute)

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> GpuLowRank:
        """Move the matrices to the device."""
        with self._on_device("an adapter", RequestError, "unload another one"):
            return low_rank.pack(parts, self.device)

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: GpuLowRank) -> None:
        """y += (x A^T) B^T; x: [T, K], y: [T, N] float32."""
        with self._running(x.shape[0]):
            low_rank.add_(y, x, change, 0, x.shape[0])

    def linear(self, x: torch.Tensor, weight: GpuLinear, change: GpuLowRank | None = None) -> torch.Tensor:
        """y = x W + bias and the change; x: [T, K] float32 -> [T, N] float32."""
        with self._running(x.shape[0]):
            y = torch.empty(x.shape[0], weight.out_features, device=x.device)
            weight.run_([prepare(x, order) for order in weight.orders], y)
        if change is not None:
            self.add_low_rank_(y, x, change)
        return y

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """table: [V, C], token_ids: [T] int64 -> [T, C] float32."""
        with self._running(token_ids.shape[0]):
            return rows.embed(table, token_ids)

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y; x, y: [T, C] float32."""
        with self._running(x.shape[0]):
            rows.add_residual_(x, y, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [..., C] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
        return self._normed(x, rows.Norm(weight, None, eps, centred=False))

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """x: [..., C] float32 -> (x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""
        return self._normed(x, rows.Norm(weight, bias, eps, centred=True))

    def _normed(self, x: torch.Tensor, norm: rows.Norm) -> torch.Tensor:
        flat = x.reshape(-1, 1, x.shape[-1])  # [rows, 1, C]
        with self._running(flat.shape[0]):
            out = torch.empty_like(flat, memory_format=torch.contiguous_format)
            rows.norm_(flat, norm, out)
        return out.view(x.shape)

    def new_pool(self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int) -> GpuPagePool:
        """A pool of pages on the device."""
        return GpuPagePool(num_kv_heads, head_dim, cache_format, num_bytes, self.device)

    def move_rows_(
        self,
        source: Sequence[GpuPage],
        source_start: int,
        target: Sequence[GpuPage],
        target_start: int,
        num_rows: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotations: Sequence[int | None],
    ) -> None:
        """Positions of pages moved to others, keys turned by cos, sin: [tables, num_rows, R/2]."""
        with self._running(num_rows):
            move_rows_(source, source_start, target, target_start, num_rows, cos, sin, rotations)

    def compile_layer(
        self, program: Program, weights: Mapping[str, torch.Tensor | GpuLinear], norm_eps: float
    ) -> GpuLayer:
        """The launches of a layer."""
        return GpuLayer(program, weights, norm_eps, self.compute)

    def begin_step(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> OpenStep:
        """x: [T, C] float32, cos, sin: [tables, T, R/2] float32."""
        step = GpuStep(x, cos, sin, spans)
        return OpenStep(step, self._graphs if self._graphs is not None and self._graphs.takes(step) else None)

    def run_layer_(
        self, step: OpenStep, layer: GpuLayer, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        """Add one layer instance to the residual stream, now or, as part of a graph, at the end of the step."""
        with self._running(step.rows.num_rows):
            step.run_(layer, instance, weight, changes)

    def end_step_(self, step: OpenStep) -> None:
        """Run what was put off."""
        with self._running(step.rows.num_rows):
            step.end_()

    def _running(self, num_rows: int) -> AbstractContextManager[None]:
        return self._on_device(f"computing {num_rows} rows", RequestError, RUN_REMEDY)

    @contextmanager
    def _on_device(self, doing: str, kind: type[Exception], remedy: str) -> Iterator[None]:
        """Kernels are launched on the current card, which is another one where a model has several."""
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with current, told_in_numbers(self.device, doing, kind, remedy):
            yield


class OpenStep:
    """The rows of a step, and the layer instances that wait to be run as one graph. graphs: None if none do."""

    def __init__(self, rows: GpuStep, graphs: StepGraphs | None) -> None:
        self.rows = rows
        self._graphs = graphs
        self._waiting: list[LayerRun] = []

    def run_(self, layer: GpuLayer, instance: int, weight: float, changes: Sequence[RowChange]) -> None:
        """Run an instance, or note it; one with changes is never part of a graph, nor are those after it."""
        if self._graphs is not None and not changes:
            self._waiting.append(LayerRun(layer, instance, weight))
            return
        self._graphs = None
        self._launch_waiting_()
        layer.run_(self.rows, instance, weight, changes)

    def end_(self) -> None:
        """Run those that wait."""
        if self._graphs is not None and self._waiting:
            self._graphs.run_(self.rows, self._waiting)
            self._waiting = []

    def _launch_waiting_(self) -> None:
        for run in self._waiting:
            run.layer.run_(self.rows, run.instance, run.weight, ())
        self._waiting = []
