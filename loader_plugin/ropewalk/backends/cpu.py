"""The CPU backend: the operations of backends/protocol.py on the compiled core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ropewalk import native
from ropewalk.backends.expert_memory import CpuExperts, ExpertMemory
from ropewalk.backends.shared import SinglePlace
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import (
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
from ropewalk.files.reader import FileReader
from ropewalk.gptq.linear import GptqLinear
from ropewalk.gptq.rounding import RoundedRows
from ropewalk.native.core import _core  # from there: it says what to do where the core is missing

if TYPE_CHECKING:
    from ropewalk.backends.protocol import ExpertRoom, LayerChange, LowRankPart, Page, RowChange, RowSpan
    from ropewalk.gptq.linear import DenseLinear, Expert

ACTIVATIONS = {Activation.SILU: "silu", Activation.GELU: "gelu", Activation.GELU_TANH: "gelu_tanh"}
KV_TYPES = {"fp16": "f16", "fp32": "f32"}  # the core's names; those of codes are the same


class CpuBackend(SinglePlace):
    """Kernels of one instruction set on a fixed number of threads.

    compute: "exact" or "int8" (see `native.Linear`). isa, threads: see `native.Runtime`. experts: how much
    memory those of a mixture may take; None: as much as they need.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(
        self, compute: str, isa: str | None = None, threads: int | None = None, experts: ExpertRoom | None = None
    ) -> None:
        self.compute = compute
        self._experts = ExpertMemory(experts)
        self.runtime = native.Runtime(isa, threads)
        self._arena = native.Arena()

    @property
    def load_options(self) -> dict[str, Any]:
        """The same kernels on as many threads."""
        return {"backend": self.name, "compute": self.compute, "threads": self.runtime.threads, "isa": self.runtime.isa}

    @property
    def arithmetic(self) -> str:
        """Two instruction sets need not agree to the last bit; avxvnni and avx2 do."""
        isa = "avx2" if self.runtime.isa == "avxvnni" else self.runtime.isa
        return f"{self.name} {self.compute} {isa}"

    def computing(self, compute: str) -> CpuBackend | None:
        """The same threads; tiles serve both ways of computing."""
        if compute not in ("exact", "int8"):
            return None
        other = CpuBackend.__new__(CpuBackend)
        other.compute, other.runtime = compute, self.runtime
        other._arena, other._experts = self._arena, self._experts
        return other

    @property
    def file_reader(self) -> FileReader:
        """As many threads as compute; memory of weights that were packed is used again."""
        return FileReader(self.runtime.threads, native.SpareMemory().take)

    def round_rows(self, weight: torch.Tensor, bits: int) -> RoundedRows:
        """On all threads."""
        return RoundedRows(*native.round_rows(self.runtime, weight, bits))

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> native.Linear:
        """Repack GPTQ parts into tiles; dense parts are used in place."""
        packed, rounds = [], True
        for part in parts:
            packed.append(self._pack_part(part))
            rounds = rounds and (not isinstance(part, GptqLinear) or part.rounds_inputs)
            del part  # before the next is read into its memory
        return native.Linear(self.runtime, packed, None if rounds else "exact")

    def pack_experts(self, experts: Sequence[Expert]) -> CpuExperts:
        """Repack one expert after the other: all of them, or as many as there is room for."""
        return CpuExperts(self.pack, experts, self._experts)

    def _pack_part(self, part: GptqLinear | DenseLinear) -> object:
        if not isinstance(part, GptqLinear):
            return native.dense_linear(part.weight, part.bias)
        try:
            return native.pack_gptq(
                self.runtime,
                part.qweight,
                bits=part.bits,
                planar=part.planar,
                in_features=part.in_features,
                scales=part.scales,
                zeros=part.zeros,
                group_starts=part.group_starts,
                order=part.order,
                bias=part.bias,
            )
        except ShapeError as error:
            raise ShapeError(f"{part.name}: {error}") from error

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> native.LowRank:
        """Matrices in 8 bits in "int8", where activations are rounded to 8 bits as well; as given in "exact"."""
        dtype = "i8" if self.compute == "int8" else "f32"
        return native.LowRank([(part.a, part.b) for part in parts], dtype, self._arena)

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: native.LowRank) -> None:
        """y += (x A^T) B^T."""
        change.add_(self.runtime, y, x)

    def linear(self, x: torch.Tensor, weight: native.Linear, change: native.LowRank | None = None) -> torch.Tensor:
        """[T, K] -> [T, N]."""
        return weight(x, self.compute, change)

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, widened to float32."""
        return native.embed(self.runtime, native.dense_linear(table), token_ids)

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y."""
        native.add_(self.runtime, x, y, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension."""
        return native.rms_norm(self.runtime, x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """LayerNorm over the last dimension."""
        return native.layer_norm(self.runtime, x, weight, bias, eps)

    def new_pool(self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int) -> CpuPagePool:
        """Room for pages of keys and values."""
        kinds = [KV_TYPES.get(kind, kind) for kind in (cache_format.keys, cache_format.values)]
        core = _core.PagePool(num_kv_heads, head_dim, "_".join(kinds), num_bytes, cache_format.recent)
        return CpuPagePool(core, f"{LAYOUT} {cache_format} heads={num_kv_heads} dim={head_dim}")

    def move_rows_(
        self,
        source: Sequence[Page],
        source_start: int,
        target: Sequence[Page],
        target_start: int,
        num_rows: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotations: Sequence[int | None],
    ) -> None:
        """The heads of all layer instances are shared out among the threads."""
        tables = [-1 if table is None else table for table in rotations]
        angles = cos.numpy(), sin.numpy()
        _core.move_rows(self.runtime.core, source, source_start, target, target_start, num_rows, *angles, tables)

    def compile_layer(
        self, program: Program, weights: Mapping[str, torch.Tensor | native.Linear], norm_eps: float
    ) -> CpuLayer:
        """The operations of a layer, with its weights in place of their names."""
        return CpuLayer(program, weights, norm_eps, self.compute)

    def begin_step(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> _core.Step:
        """The rows of a step on their way through the layers."""
        rows = [(span.num_rows, span.start, span.pages, span.recent) for span in spans]
        return _core.Step(x.numpy(), cos.numpy(), sin.numpy(), rows)

    def run_layer_(
        self, step: _core.Step, layer: CpuLayer, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        """One call of the core for all operations of a layer."""
        changed = [(change.first, change.end, layer.low_ranks(change.change)) for change in changes]
        layer.core.run(self.runtime.core, step, instance, weight, changed)

    def end_step_(self, step: _core.Step) -> None:
        """Nothing is put off."""


LAYOUT = "cpu-1"  # of the bytes of a page; another number whenever native/README.md draws them differently


class CpuPagePool:
    """A pool of the core; its pages go back to it when Python drops them."""

    def __init__(self, core: _core.PagePool, layout: str) -> None:
        self._core = core
        self.layout = layout
        self.num_bytes: int = core.num_bytes
        self.copy = core.copy

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use."""
        return self._core.used_bytes

    def page_bytes(self, num_instances: int, recent: bool = False) -> int:
        """Memory of one page."""
        return num_instances * (self._core.recent_instance_bytes if recent else self._core.instance_bytes)

    def take(self, num_instances: int, recent: bool = False) -> _core.Page:
        """A page whose keys and values are not initialised."""
        return self._core.take(num_instances, recent)

    def parts_of(self, page: _core.Page) -> list[torch.Tensor]:
        """The memory of a page, in one part; the tensor keeps the page alive."""
        return [torch.from_numpy(page.array())]

    def written_(self, page: _core.Page, parts: list[torch.Tensor]) -> None:
        """They are the memory itself."""


class CpuLayer:
    """A program as the core replays it."""

    def __init__(
        self, program: Program, weights: Mapping[str, torch.Tensor | native.Linear], norm_eps: float, compute: str
    ) -> None:
        self.core = _core.Layer(list(program.widths), compute)
        self._linears = [operation.weight for operation in program.operations if isinstance(operation, Linear)]
        for operation in program.operations:
            self._add(operation, weights, norm_eps)
        self.core.finish()

    def low_ranks(self, change: LayerChange) -> list[_core.LowRank | None]:
        """What changes each linear, in the order of the program."""
        found = (change.get(name) for name in self._linears)
        return [None if low_rank is None else low_rank.core for low_rank in found]

    def _add(self, operation: Operation, weights: Mapping[str, torch.Tensor | native.Linear], norm_eps: float) -> None:
        core = self.core
        match operation:
            case RmsNorm(x, weight, out):
                core.rms_norm(_columns(x), weights[weight].numpy(), norm_eps, _columns(out))
            case LayerNorm(x, weight, bias, out):
                shift = None if bias is None else weights[bias].numpy()
                core.layer_norm(_columns(x), weights[weight].numpy(), shift, norm_eps, _columns(out))
            case Linear(x, weight, out):
                core.linear(_columns(x), weights[weight].core, _columns(out))
            case Rotate(x, table):
                core.rotate(_columns(x), table)
            case Append(k, v):
                core.append(_columns(k), _columns(v))
            case Attend(q, out, window, scale, softcap):
                core.attend(_columns(q), _columns(out), window or 0, scale, softcap or 0.0)
            case Activate(x, activation, out):
                core.activate(_columns(x), ACTIVATIONS[activation], _columns(out))
            case Gate(gate_up, activation, out):
                core.gate(_columns(gate_up), ACTIVATIONS[activation], _columns(out))
            case Route(logits, top_k, normalised, out):
                core.route(_columns(logits), top_k, normalised, _columns(out))
            case Experts(x, routes, weight, activation, out):
                places = _columns(x), _columns(routes)
                core.experts(*places, weights[weight].core, ACTIVATIONS[activation], _columns(out))
            case SigmoidMul(x, gate, out):
                core.sigmoid_mul(_columns(x), _columns(gate), _columns(out))
            case AddResidual(y, scale):
                core.add_residual(_columns(y), scale)
            case _:
                raise TypeError(f"the CPU backend does not know the operation {operation}")


def _columns(view: View) -> tuple[int, int, int, int]:
    return view.buffer, view.first, view.heads, view.size
