"""The compiled core (native/bindings/core.cpp). Every array is checked and none is converted; use ropewalk.native.

Raises everywhere: ShapeError for an array, size or name that cannot be taken, and for an array that is written and
overlaps one that is read; MemoryError where memory runs out.
"""

from collections.abc import Sequence

import numpy

LIMITS: dict[str, int]
"""The largest FEATURES, HEADS, HEAD_DIM, POSITIONS, EXPERTS and THREADS that are taken."""

Columns = Sequence[int]
"""Of a buffer: (buffer, first column, heads, size of a head)."""

def available_isas() -> list[str]:
    """The instruction sets that this machine can run, best first; "scalar" is last."""

class Runtime:
    """A kernel table and a pool of threads."""

    def __init__(self, isa: str, threads: int) -> None:
        """isa: a name, or "" for the best. threads: 1 to 1024, the caller included. Raises NativeError otherwise."""
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def empty(self, num_rows: int, num_columns: int) -> numpy.ndarray:
        """float32, not initialised; its memory goes back to the runtime, to be used again, when the array is freed."""

class AlignedBytes:
    """Memory that starts on a cache line and, if it is large, lies in huge pages; not initialised."""

    def __init__(self, size: int) -> None: ...
    def array(self) -> numpy.ndarray:
        """[size] uint8: this memory, kept alive by the array."""

class SpareMemory:
    """Memory that was given back, kept for whoever asks next: at most 128 MiB of it."""

    def __init__(self) -> None: ...
    def take(self, size: int) -> numpy.ndarray:
        """[size] uint8, not initialised; its memory comes back here when the array is freed."""
    @property
    def num_bytes(self) -> int:
        """Of what was given back."""

class PackedGptq:
    """A GPTQ linear in tiles, made by `pack_gptq`."""

    @property
    def num_bytes(self) -> int: ...

class DenseLinear:
    """A dense weight, used in place, made by `dense_linear`."""

    @property
    def in_features(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

def pack_gptq(
    runtime: Runtime,
    qweight: numpy.ndarray,
    bits: int,
    planar: bool,
    in_features: int,
    scales: numpy.ndarray,
    zeros: numpy.ndarray,
    group_starts: numpy.ndarray,
    order: object,
    bias: object,
) -> PackedGptq:
    """qweight: [word rows, N] int32. scales: [G, N] uint16 (the bits of float16) or float32. zeros: [G, N] uint8.

    group_starts: [G + 1] int64. order: [K] int32 or None. bias: [N] float32 or None.
    """

def round_rows(
    runtime: Runtime,
    weight: numpy.ndarray,
    type: str,
    bits: int,
    half_scales: bool,
    words: numpy.ndarray,
    scales: numpy.ndarray,
    zeros: numpy.ndarray,
) -> bool:
    """weight: [N, K] as for `dense_linear`. Writes words: [K * bits / 32, N] int32, scales: [G, N] float32 and
    zeros: [G, N] uint8; bits: 8, with a scale for 64 inputs, or 4, with one for 32. half_scales: round them to float16
    before they divide. Returns whether a scale that is not zero leaves the normal numbers of float16.
    """

def dense_linear(weight: numpy.ndarray, type: str, bias: object) -> DenseLinear:
    """weight: [N, K] float32 for type "f32", uint16 (the bits) for "f16" and "bf16". bias: [N] float32 or None."""

class LowRank:
    """A low-rank change of a linear group, y += (x A) B, used where it lies."""

    def __init__(
        self,
        a: numpy.ndarray,
        scales: object,
        in_features: int,
        type: str,
        parts: Sequence[tuple[int, object, object]],
    ) -> None:
        """a: [ceil(R / 4), ceil(K / 16), 4, 16] float32 for type "f32", int8 for "i8".

        parts: N, B and the scales of B of each linear. B: [ceil(N / 16), rank, 16] of the same type, or None; R is the
        sum of the ranks. scales: float32, [R rounded up to 4] and of B [N rounded up to 16] for "i8", None for "f32".
        """
    def add(self, runtime: Runtime, x: numpy.ndarray, out: numpy.ndarray) -> None:
        """out += the change; x: [T, K] float32. out: [T, N] float32, written."""
    @property
    def num_bytes(self) -> int: ...

class LinearGroup:
    """Linears over one input, their outputs side by side."""

    def __init__(self, parts: Sequence[object]) -> None:
        """parts: PackedGptq and DenseLinear."""
    def run(self, runtime: Runtime, compute: str, x: numpy.ndarray, out: numpy.ndarray, change: object) -> None:
        """x: [T, K] float32. compute: "exact" or "int8". out: [T, N] float32, written. change: a LowRank or None."""
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

class Experts:
    """The experts of a layer, all of the same sizes, put there one by one."""

    def __init__(self, num_experts: int, size: int, inner: int, fetch: object) -> None:
        """size: input and output features. fetch: None, or called with the numbers that a layer is about to use,
        ascending, to put there those that are not; by the thread that computes, which may pack meanwhile.
        """
    def put(self, number: int, gate_up: object, down: object) -> None:
        """gate_up, down: LinearGroup."""
    def drop(self, number: int) -> None:
        """Its memory is given back when nobody computes with it any more."""

class KvCache:
    """Keys and values of one layer; the capacity is rounded up to whole tiles of 64."""

    def __init__(self, num_heads: int, head_dim: int, capacity: int, type: str) -> None:
        """type: "f16", "f32", "q8", "q6" or "q4" for keys and values; "q8_q4" for each."""
    @property
    def capacity(self) -> int: ...
    @property
    def length(self) -> int:
        """The positions that it holds, 0 to length."""
    @property
    def num_bytes(self) -> int: ...

class Page:
    """Keys and values of 64 positions in all layer instances; its memory goes back to its pool when it is freed."""

    def array(self) -> numpy.ndarray:
        """[bytes] uint8: its memory; the array keeps the page alive."""

class PagePool:
    """At most so many bytes of pages, for one format of keys and values."""

    def __init__(self, num_heads: int, head_dim: int, type: str, num_bytes: int, recent: int) -> None:
        """type: as of KvCache. recent: how many positions are kept in f16 besides codes, a multiple of 64; 0: none."""
    @property
    def num_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int:
        """Of pages that exist."""
    @property
    def instance_bytes(self) -> int:
        """Of a page, for each layer instance."""
    @property
    def recent_instance_bytes(self) -> int:
        """Of a page of the last positions, in f16."""
    def take(self, num_instances: int, recent: bool) -> Page:
        """Not initialised; MemoryError beyond the limit. recent: of the last positions, where the pool has those."""
    def copy(self, page: Page) -> Page:
        """page: of this pool."""

class Step:
    """Rows of several sequences on their way through the layers."""

    def __init__(
        self,
        x: numpy.ndarray,
        cos: numpy.ndarray,
        sin: numpy.ndarray,
        spans: Sequence[tuple[int, int, Sequence[Page], Sequence[Page]]],
    ) -> None:
        """x: [T, C] float32, the residual stream, written by the layers. cos, sin: [tables, T, R / 2].

        spans: number of rows, first position, pages from position 0 on, and where the pool keeps the last positions in
        f16 as many pages of those, of each sequence; all rows are T together. A page that one sequence writes must be
        in no other. A page of the last positions may be None before the first that a row reads.
        """

class Layer:
    """The operations of a decoder layer over buffers; buffer 0 is the residual stream."""

    def __init__(self, widths: Sequence[int], compute: str) -> None:
        """widths: floats in a row of each buffer."""
    def rms_norm(self, x: Columns, weight: numpy.ndarray, epsilon: float, out: Columns) -> None:
        """weight: [size of a head of x]. out covers its buffer."""
    def layer_norm(self, x: Columns, weight: numpy.ndarray, bias: object, epsilon: float, out: Columns) -> None:
        """weight, bias: size of a head of x, or as many for each head; bias may be None. out covers its buffer."""
    def linear(self, x: Columns, weight: object, out: Columns) -> None:
        """weight: a LinearGroup."""
    def rotate(self, x: Columns, table: int) -> None: ...
    def append(self, k: Columns, v: Columns) -> None: ...
    def attend(self, q: Columns, out: Columns, window: int, scale: float, softcap: float) -> None:
        """window, softcap: 0 for none. out covers its buffer."""
    def activate(self, x: Columns, activation: str, out: Columns) -> None:
        """activation: "silu", "gelu" or "gelu_tanh". out covers its buffer."""
    def gate(self, gate_up: Columns, activation: str, out: Columns) -> None:
        """activation: as of `activate`. out covers its buffer."""
    def sigmoid_mul(self, x: Columns, gate: Columns, out: Columns) -> None:
        """gate: one column. out covers its buffer."""
    def route(self, logits: Columns, top_k: int, normalised: bool, out: Columns) -> None:
        """out: two heads of top_k, which cover their buffer."""
    def experts(self, x: Columns, routes: Columns, weight: object, activation: str, out: Columns) -> None:
        """routes: as `route` gives them. weight: an Experts. out covers its buffer."""
    def add_residual(self, y: Columns, scale: float) -> None:
        """y covers its buffer."""
    def finish(self) -> None:
        """No operation follows."""
    def run(
        self,
        runtime: Runtime,
        step: Step,
        instance: int,
        weight: float,
        changes: Sequence[tuple[int, int, Sequence[object]]],
    ) -> None:
        """instance: of the pages. weight: of what `add_residual` adds.

        changes: first row, end, and a LowRank or None for each linear, ascending.
        """

def rms_norm(runtime: Runtime, x: numpy.ndarray, weight: numpy.ndarray, epsilon: float, out: numpy.ndarray) -> None:
    """x: [T, C] or [T, H, C] float32, weight: [C]. out: contiguous, of the shape of x, written."""

def rotate(runtime: Runtime, x: numpy.ndarray, cos: numpy.ndarray, sin: numpy.ndarray) -> None:
    """x: [T, H, D] float32, rotated in place. cos, sin: [T, R / 2]."""

def layer_norm(
    runtime: Runtime, x: numpy.ndarray, weight: numpy.ndarray, bias: object, epsilon: float, out: numpy.ndarray
) -> None:
    """x: [T, C] or [T, H, C] float32; weight: [C] or [H, C]; bias: the same, or None. out: like x, written."""

def activate(runtime: Runtime, x: numpy.ndarray, activation: str, gated: bool, out: numpy.ndarray) -> None:
    """x: [T, I] float32, or [T, 2 * I] for a gate. activation: "silu", "gelu" or "gelu_tanh". out: [T, I], written."""

def add(runtime: Runtime, x: numpy.ndarray, y: numpy.ndarray, weight: float) -> None:
    """x += weight * y; x: [T, C] float32, written; y: [T, C]."""

def embed(runtime: Runtime, table: DenseLinear, token_ids: numpy.ndarray, out: numpy.ndarray) -> None:
    """table: [V, C]. token_ids: [T] int64. out: [T, C] float32, written."""

def probe_read(runtime: Runtime, floats: numpy.ndarray) -> float:
    """Their sum, read by all threads. floats: [a multiple of 64] float32."""

def probe_products(runtime: Runtime, kind: str, steps: int) -> int:
    """Products on operands that stay in registers; returns the operations of all threads. kind: "int8" or "f32"."""

def append(runtime: Runtime, cache: KvCache, k: numpy.ndarray, v: numpy.ndarray, start: int) -> None:
    """k, v: [T, Hkv, D] float32, written to positions start..start+T; start is at most the cache's length."""

def attend(
    runtime: Runtime,
    q: numpy.ndarray,
    cache: KvCache,
    start: int,
    window: int,
    scale: float,
    softcap: float,
    compute: str,
    out: numpy.ndarray,
) -> None:
    """q: [T, Hq, D] float32 at positions start..start+T, which the cache holds. window, softcap: 0 for none.

    compute: of codes, "exact" or "int8". out: [T, Hq * D], written.
    """

def move_rows(
    runtime: Runtime,
    source: Sequence[Page],
    source_start: int,
    target: Sequence[Page],
    target_start: int,
    num_rows: int,
    cos: numpy.ndarray,
    sin: numpy.ndarray,
    tables: Sequence[int],
) -> None:
    """Positions source_start.. of pages to target_start.. of others of the same pool and kind, in all layer instances.

    cos, sin: [tables, num_rows, R / 2] float32; tables: which of them turns the keys of each instance, -1: none.
    Pages may be in both where rows move to lower places.
    """
