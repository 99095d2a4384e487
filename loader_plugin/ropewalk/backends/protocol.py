"""What a backend does: the operations of a decoder layer, on tensors whose layout is fixed here.

There is one definition of a layer (in families/), recorded as a list of operations: a backend compiles the list with
the weights of a layer and runs it for the rows of a step. A backend owns the packed layout of the weights and the
layout of the pages of keys and values; everything else that crosses this line is a plain torch tensor on
`Backend.device`.

Letters: T rows (new tokens), S cached keys, K input features, N output features of one part, Hq and Hkv query and
key/value heads, D head size, R rotated dims of a head, C hidden size, I intermediate size, V vocabulary.

Who checks what: weights/check.py checks shapes and dtypes of weights, model/step.py checks requests, each once. An
operation checks what would otherwise be read out of bounds. Results are new tensors; a name that ends in `_` writes
in place.

Reproducibility: row t of every result depends on row t of the inputs alone, bit for bit: it is the same for any T, any
number of threads, any split of a prompt into chunks, and whatever else is in a step. `reference` is exempt (a matrix
product of torch changes its order of summation with T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import Program

if TYPE_CHECKING:
    from ropewalk.files.reader import FileReader
    from ropewalk.gptq.linear import DenseLinear, Expert, GptqLinear
    from ropewalk.gptq.rounding import RoundedRows


PAGE_TOKENS = 64  # positions of a page: one tile of keys of the attention kernels


class PackedLinear(Protocol):
    """One or several linear layers over the same input, in the layout of the backend that packed them."""

    @property
    def in_features(self) -> int:
        """K, the number of input features."""

    @property
    def out_features(self) -> int:
        """The number of output features of all parts together."""

    @property
    def num_bytes(self) -> int:
        """Memory held: codes, scales, zeros, dense weights, permutations, biases; a tensor used as given counts too."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankPart:
    """The change of one linear: W += B A. a: [r, K], b: [N, r], float32, with all factors in b. r = 0: no change."""

    a: torch.Tensor
    b: torch.Tensor


class PackedLowRank(Protocol):
    """The low-rank change of linears over the same input, in the layout of the backend that packed it."""

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices as the backend holds them."""


# What a set of adapters changes in one layer: by the names of the program's linears, those that change.
LayerChange = Mapping[str, PackedLowRank]


class PackedExperts(Protocol):
    """The experts of one layer, in the layout of the backend that packed them."""

    @property
    def num_bytes(self) -> int:
        """Memory held by those that are in memory."""


@dataclass(frozen=True, slots=True)
class ExpertRoom:
    """How much memory experts may take: num_bytes of all layers together, which is this part of what all would take."""

    num_bytes: int
    part: float


@dataclass(frozen=True, slots=True)
class ReadElsewhere:
    """Samples (files/fingerprint.py) of the tensors that other processes have read, of either model."""

    first: Mapping[str, bytes]
    second: Mapping[str, bytes]


class Page(Protocol):
    """Keys and values of PAGE_TOKENS positions of all layer instances; the layout is the backend's own.

    There are two kinds: pages in the format of the cache, and, for a format with a recent window, in float16.

    Its memory goes back to the pool when the last reference to it is dropped.
    """


class PagePool(Protocol):
    """Where pages come from. Several threads may take pages and drop them at once."""

    @property
    def num_bytes(self) -> int:
        """The limit: pages in use never take more."""

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use."""

    @property
    def layout(self) -> str:
        """What the bytes of a page mean: equal names, equal meaning, also in another process."""

    def page_bytes(self, num_instances: int, recent: bool = False) -> int:
        """Memory of a page for that many layer instances. recent: of the kind in float16."""

    def take(self, num_instances: int, recent: bool = False) -> Page:
        """A page whose keys and values are not initialised. recent: of the kind in float16.

        Raises:
            MemoryError: the limit or the machine does not allow it.
        """

    def copy(self, page: Page) -> Page:
        """Another page with the keys and values of `page`, of the same kind.

        Raises:
            MemoryError: as `take`.
        """

    def parts_of(self, page: Page) -> list[torch.Tensor]:
        """The memory of a page, [bytes] uint8 on its device: one part for each place that a model runs in.

        To read them is to save the page; what is written to them restores one of the same layout and instances, once
        `written_` has been called.
        """

    def written_(self, page: Page, parts: list[torch.Tensor]) -> None:
        """What `parts_of` gave for this page has been written to: memory that lies elsewhere takes it over."""


@dataclass(frozen=True, slots=True, eq=False)
class RowSpan:
    """Rows of a step that belong to one sequence; they follow those of the span before.

    Their positions are start..start + num_rows. pages: of the positions from 0 on, enough for all of these.
    recent: for a format with a recent window, the same pages in float16, in the places of `pages`; None before
    `CacheFormat.first_exact_page(start)`. Rows are written to both.
    """

    num_rows: int
    start: int
    pages: tuple[Page, ...]
    recent: tuple[Page | None, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RowChange:
    """Rows first..end of a step, whose linears a set of adapters changes. Those of one call do not overlap."""

    first: int
    end: int
    change: LayerChange


class CompiledLayer(Protocol):
    """A program with the weights of one layer, ready to run on a backend."""


class BackendStep(Protocol):
    """The rows of a step while its layers run one after the other: residual stream, positions, tables and pages."""


class Backend(Protocol):
    """The operations that one model runs on. One instance per model: it owns its threads and its choice of kernels."""

    @property
    def name(self) -> str:
        """The name that `load_model` knows it by: "reference", "cpu" or "gpu"."""

    @property
    def compute(self) -> str:
        """ "exact" (float32 precision), "int8" (activations of quantised layers quantised on the fly) or "fp16"."""

    @property
    def arithmetic(self) -> str:
        """What decides the bits of keys and values: name, compute, kernels; "cpu int8 avx2". For saved caches."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors that go in and come out."""

    @property
    def shares(self) -> tuple[tuple[torch.device, float], ...]:
        """The devices that hold the pages, and the part of each page that lies there."""

    @property
    def bytes_elsewhere(self) -> int:
        """Memory of weights that other processes hold."""

    def await_layers(self) -> ReadElsewhere:
        """Once all layers that are read here have been: until other processes have read theirs.

        Raises:
            RopewalkError: what went wrong there. RankError: one of them is lost.
        """

    @property
    def steps_under_way(self) -> int:
        """How many steps it takes to keep all that computes busy: 1 where `end_step_` has the result."""

    def when_failed(self, function: Callable[[], None]) -> None:
        """Call this once, in some thread, if other processes that it needs are lost."""

    def close(self) -> None:
        """Let go of other processes, if it has any; nothing can be computed from then on."""

    @property
    def load_options(self) -> dict[str, Any]:
        """What `load_model` is given for another model to compute where the first layers of this one do."""

    @property
    def file_reader(self) -> FileReader:
        """Threads and memory for reading weights that this backend is going to pack."""

    def round_rows(self, weight: torch.Tensor, bits: int) -> RoundedRows:
        """A matrix [N, K] of floats on the CPU as a GPTQ linear, by the rule of gptq/rounding.py, to the bit."""

    def places_of(self, weights_index: int) -> tuple[OnePlace, ...]:
        """The backends that run a layer, by its place in `ModelWeights.layers`: each packs it and compiles it."""

    def joined(self, weights_index: int, copies: Sequence[CompiledLayer], program: Program) -> CompiledLayer:
        """A layer for `run_layer_`. copies: as each of its `places_of` has compiled `program`, in their order."""

    def check_instances(self, layers: Sequence[CompiledLayer]) -> None:
        """layers: what each layer instance of an order runs.

        Raises:
            ConfigError: an instance would run in a place for which its layer was not loaded.
        """

    def computing(self, compute: str) -> Backend | None:
        """This backend with other arithmetic, which takes the weights that this one packed; None if they do not serve.

        Layers are compiled anew for it.
        """

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> PackedLinear:
        """Lay out linear layers that read the same input; their outputs are concatenated in the given order.

        parts: at least one, all with the same number of input features K; may read a part each time that it is asked
        for one. Quantised and dense ones may be mixed, and each may have its own permutation or none. A packed layer
        keeps no reference to the given tensors except to those it uses as they are (dense weights).

        Raises:
            ShapeError: no parts, or parts that disagree about K.
        """

    def pack_experts(self, experts: Sequence[Expert]) -> PackedExperts:
        """Lay out the experts of one layer, which are numbered in the given order and all of the same sizes.

        experts: may read an expert each time that it is asked for one.

        Raises:
            ShapeError: no experts, or experts that disagree about their sizes.
        """

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> PackedLowRank:
        """Lay out the change of linears that were packed together, one part for each, in their order.

        parts: at least one has a rank above 0. In "int8" the matrices may be held in 8 bits.
        """

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: PackedLowRank) -> None:
        """y += (x A^T) B^T in place: float32 activations and accumulation in both modes.

        x: [T, K] float32, contiguous, in the original order of features. y: [T, N_0 + N_1 + ...] float32, contiguous.
        """

    def linear(self, x: torch.Tensor, weight: PackedLinear, change: PackedLowRank | None = None) -> torch.Tensor:
        """y = x W + bias, and the low-rank change of these linears, as `add_low_rank_` adds it.

        x: [T, K] float32, contiguous, in the original order of features: the backend takes care of act-order.
        Returns [T, N_0 + N_1 + ...] float32, contiguous.

        Numerics. Dense weights: float32 activations and accumulation in both modes. Quantised weights in "exact":
        activations times scale * (code - zero), to the precision of float32. In "int8": the input features, in the
        sorted order of the groups, are cut into blocks of 32 that never straddle a group (the last block of a group
        may be shorter). Per block and row of x: s = max|x| / 127, q = round-half-even(x / s); then y is the sum over
        blocks of s * scale * (sum of q * code - zero * sum of q), the inner sums in integers. In "fp16": each row of x
        is divided by a power of two of its own where it would overflow, rounded to float16 and multiplied with the
        integers (code - zero); the products are summed group by group in float32, times scale, times that power of two.
        """

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table.

        table: [V, C] float16, bfloat16 or float32. token_ids: [T] int64, each in 0..V.
        Returns [T, C] float32, contiguous.
        """

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """x += weight * y in place: the residual stream takes in what a block computed.

        x, y: [T, C] float32, contiguous.
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

        x: [..., C] float32, any strides as long as the last dimension is contiguous. weight: [C] float32.
        Returns [..., C] float32, contiguous.
        """

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (Ba et al. 2016,
        arXiv:1607.06450), the mean first and the variance of what is left, as `LayerNorm` in a program.

        x: [..., C] float32, any strides as long as the last dimension is contiguous. weight, bias: [C] float32.
        Returns [..., C] float32, contiguous.
        """

    def new_pool(self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int) -> PagePool:
        """A pool of pages of keys and values, of at most `num_bytes` together.

        Nothing is set aside yet: a page takes memory when it is taken, or even later, when it is first written.
        """

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
        """Copy positions source_start.. of pages to positions target_start.. of others, keys turned on the way.

        For all layer instances. source, target: pages from position 0 on, of one pool and kind; they may be the same if
        target_start <= source_start. cos, sin: [tables, num_rows, R/2] float32 on `device`; rotations: the table that
        every head of a key of each instance is turned by as `Rotate` does, whatever its length, or None: its keys are
        not turned. Keys in codes are read, turned, and rounded anew; those that are not turned, and values, stay as
        they are, code for code.

        Raises:
            ShapeError: positions outside of the pages, or tables that do not fit.
        """

    def begin_step(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]
    ) -> BackendStep:
        """Rows that are to go through the layers together.

        x: [T, C] float32, contiguous; the layers change it in place. cos, sin: [tables, T, R/2] float32, contiguous,
        the angles of each row in each way to rotate that layers have. The pages of a span must hold the positions
        before its start; no page may be written by two spans.

        Raises:
            ShapeError: the spans are not the T rows, the tables do not fit, or a span has too few pages.
        """

    def run_layer_(
        self, step: BackendStep, layer: CompiledLayer, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        """Add one layer instance to the residual stream of the step; its keys and values go to the pages.

        instance: which keys and values of a page are its own. weight: multiplies what the layer adds.
        The operations of families/program.py, row by row:

        Linear: as `linear`. RmsNorm: as `rms_norm` on [T, H, size]. AddResidual: as `add_`. LayerNorm, Activate, Gate,
        Route, Experts, SigmoidMul: as families/program.py says, in float32; the linears of an expert as `linear`.
        Rotate (Su et al. 2021, arXiv:2104.09864, in the pairing of Hugging Face checkpoints); dims from R on stay:

            x_i  <-  x_i cos_i - x_{i+R/2} sin_i        x_{i+R/2}  <-  x_{i+R/2} cos_i + x_i sin_i

        Append: keys (already rotated) and values are rounded as the format of the pool says (config/cache_format.py).
        Attend: causal attention of a row at position i over the positions 0..i of its own sequence:

            out_i = sum_j softmax_j(scale * q_i k_j) v_j      over j <= i, and j > i - window if there is one

        with softcap * tanh(s / softcap) in place of each s = scale * q_i k_j if there is a soft cap.

        Query head h reads key/value head h // (Hq / Hkv). Scratch memory does not grow with T times the number of keys.
        Over codes in "int8": queries are rounded to 8 bits in blocks of 32 dims, as activations are, and the weight of
        each value times its scale to 14 bits within its page; both products are summed in integers. With a recent
        window, row i reads the pages from `CacheFormat.first_exact_page(i)` on in float16.
        """

    def end_step_(self, step: BackendStep) -> None:
        """After the last layer instance: what `run_layer_` may have put off is done, or on its way elsewhere.

        Other steps may begin from here on, for other sequences or for later rows of the same.
        """

    def await_step_(self, step: BackendStep) -> None:
        """Until x holds the result of a step that has ended. Steps are awaited in the order in which they ended.

        Raises:
            RankError: it was computed by another process, which is lost.
        """


class OnePlace(Backend, Protocol):
    """A backend that is one place by itself, where layers run: all but that of `backends/split.py`."""

    def compile_layer(
        self, program: Program, weights: Mapping[str, torch.Tensor | PackedLinear], norm_eps: float
    ) -> CompiledLayer:
        """The program with the weights of one layer. weights: those that it names; norms are [C] or [D] float32."""
