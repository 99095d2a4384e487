"""The kernels alone: packed GPTQ linears, RoPE, norms and chunked attention on torch tensors or numpy arrays.

Letters: T rows, K input features, N output features, G groups, Hq and Hkv query and key/value heads, D head size, R
rotated dims. Arrays live on the CPU and are never converted: a wrong dtype, shape or layout raises ShapeError. Results
are of the same kind as the first array (torch in, torch out).

    runtime = native.Runtime(threads=2)
    weight = native.Linear(runtime, [native.pack_gptq(runtime, qweight, bits=4, in_features=K, scales=..., zeros=...)])
    y = weight(x, compute="int8")

Row t of every result depends on row t of the inputs alone, bit for bit, whatever T and the number of threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ropewalk.base.errors import NativeError, ShapeError
from ropewalk.base.limits import MAX_THREADS

try:
    from ropewalk import _core
except ImportError as error:
    raise NativeError(
        f"the compiled core of ropewalk cannot be imported ({error}); install the package with a C++ compiler "
        "present: pip install . (or use backend='reference')"
    ) from error

Array = Any  # torch.Tensor or numpy.ndarray


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best first; "scalar" is always there."""
    return tuple(_core.available_isas())


class Runtime:
    """An instruction set and a set of threads.

    isa: one of `available_isas()`; None for the best. threads: None for the number of processors this process may use.

    Raises:
        NativeError: an instruction set that this machine lacks, or a number of threads below 1 or above 1024.
    """

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        threads = usable_processors() if threads is None else threads
        if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise NativeError(f"threads must be between 1 and {MAX_THREADS}, got {threads!r:.40}")
        self.core = _core.Runtime(isa or "", threads)

    @property
    def isa(self) -> str:
        """The name of the instruction set in use."""
        return self.core.isa

    @property
    def threads(self) -> int:
        """The number of threads, the calling one included."""
        return self.core.threads

    @property
    def scratch_bytes(self) -> int:
        """Memory held between calls: prepared activations, attention tiles, at most 128 MiB of freed large results.

        It grows with T, never with S.
        """
        return self.core.scratch_bytes

    def limits(self, num_floats: int) -> MachineLimits:
        """To measure this machine by, with so many floats of memory to read: a multiple of 64."""
        return MachineLimits(self, num_floats)


class MachineLimits:
    """What this machine does at most with the threads and instructions of a runtime; whoever calls takes the time."""

    def __init__(self, runtime: Runtime, num_floats: int) -> None:
        self._runtime = runtime
        memory = _core.AlignedBytes(4 * num_floats).array().view(np.float32)  # [num_floats], in huge pages
        memory[:] = 1.0
        self._memory = memory

    def read(self) -> int:
        """Read all of the memory once; returns its bytes."""
        _core.probe_read(self._runtime.core, self._memory)
        return self._memory.nbytes

    def multiply(self, kind: str, steps: int) -> int:
        """Products on operands that stay in registers, `steps` rounds of 12 vectors on each thread; returns the
        operations, a product and a sum being two. kind: "int8" (codes with activations of 8 bits) or "f32"."""
        return _core.probe_products(self._runtime.core, kind, steps)


def usable_processors() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack_gptq(
    runtime: Runtime,
    qweight: Array,
    *,
    bits: int,
    in_features: int,
    scales: Array,
    zeros: Array,
    group_starts: Array,
    order: Array | None = None,
    bias: Array | None = None,
    planar: bool = False,
) -> _core.PackedGptq:
    """Repack one GPTQ linear into tiles; W[k, n] = scales[g, n] * (code[k, n] - zeros[g, n]).

    qweight: [word rows, N] int32, the codes of 2 to 8 bits packed down K as stored in a checkpoint; planar: as bit
    planes (`gptq_p`). scales: [G, N] float16 or float32. zeros: [G, N] uint8. group_starts: [G + 1] int64, the rows
    of each group after sorting. order: [K] int32, the stored row of each sorted row; None when rows are already in
    the order of their groups. bias: [N] float32.

    Raises:
        ShapeError: an array of another shape, dtype or layout, or indices out of range.
    """
    return _core.pack_gptq(
        runtime.core,
        as_numpy(qweight),
        bits,
        planar,
        in_features,
        scale_bits(as_numpy(scales)),
        as_numpy(zeros),
        as_numpy(group_starts),
        None if order is None else as_numpy(order),
        None if bias is None else as_numpy(bias),
    )


def dense_linear(weight: Array, bias: Array | None = None) -> _core.DenseLinear:
    """A dense weight, used in place (the array is kept alive, not copied).

    weight: [N, K] float32, float16 or (torch) bfloat16, contiguous. bias: [N] float32.
    """
    checked_shape(weight, "weight", 2)
    types = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    name = str(weight.dtype).removeprefix("torch.")
    if name not in types:
        raise ShapeError(f"weight has dtype {name}; accepted: {', '.join(types)}")
    if types[name] != "f32":
        weight = weight.view(torch.int16) if isinstance(weight, torch.Tensor) else weight.view(np.int16)
        weight = as_numpy(weight).view(np.uint16)
    return _core.dense_linear(as_numpy(weight), types[name], None if bias is None else as_numpy(bias))


class Linear:
    """Linears that read the same input, with their outputs side by side: q, k and v, or gate and up.

    compute: the only way in which this one is computed, whatever a call asks for; None: as asked for.
    """

    def __init__(
        self, runtime: Runtime, parts: Sequence[_core.PackedGptq | _core.DenseLinear], compute: str | None = None
    ) -> None:
        self._runtime = runtime
        self._compute = compute
        self.core = _core.LinearGroup(list(parts))
        self.in_features: int = self.core.in_features
        self.out_features: int = self.core.out_features
        self.num_bytes: int = sum(part.num_bytes for part in parts)

    def __call__(self, x: Array, compute: str = "int8", change: LowRank | None = None) -> Array:
        """y = x W + bias for every part, and what the change adds.

        x: [T, K] float32, rows any distance apart. compute: "exact" multiplies float32 activations with exactly
        dequantised weights; "int8" quantises the activations per block of 32 in the order of the groups (scale =
        largest magnitude / 127, rounded to nearest even) and sums integers within a block. Dense parts always use
        float32 activations. Returns [T, N] float32.
        """
        out = new_result(self._runtime, x, (checked_shape(x, "x", 2)[0], self.out_features))
        core = None if change is None else change.core
        self.core.run(self._runtime.core, self._compute or compute, as_numpy(x), as_numpy(out), core)
        return out


class Arena:
    """Room for many small matrices that are read one after the other, side by side in huge pages.

    On small pages a decoded token spends as long on looking up addresses as on reading (scripts/bench/adapters.py).
    A block is given back to the system when no array in it is used any more. Threads may place arrays at the same time:
    each takes its place alone, and fills it beside the others.
    """

    BLOCK_BYTES = 8 << 20
    LINE_BYTES = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the two below
        self._block = np.empty(0, np.uint8)
        self._used = 0

    def place(self, array: np.ndarray) -> np.ndarray:
        """A copy of a contiguous array that starts on a cache line; same shape and dtype."""
        place = self._take(-(-array.nbytes // self.LINE_BYTES) * self.LINE_BYTES)
        copy = place[: array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def _take(self, size: int) -> np.ndarray:
        """So many bytes, [size] uint8, that nobody else is given."""
        with self._lock:
            if self._used + size > self._block.size:
                self._block, self._used = _core.AlignedBytes(max(size, self.BLOCK_BYTES)).array(), 0
            place = self._block[self._used : self._used + size]
            self._used += size
        return place


class LowRank:
    """A low-rank change of the parts of a `Linear`: y += (x A^T) B^T.

    parts: (A [r, K], B [N, r]) of each part in float32; r may be 0. dtype: "f32", or "i8", a quarter of what is read:
    8-bit codes with a scale for each rank of A and each output of B (f32 where such a scale would not be finite).
    Products and sums are float32. arena: where the matrices go.

    Raises:
        ShapeError: no parts, none of a rank above 0, matrices that disagree about their sizes, or another dtype.
    """

    def __init__(
        self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: str = "f32", arena: Arena | None = None
    ) -> None:
        for a, b in parts:
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[1] != parts[0][0].shape[1]:
                raise ShapeError(f"A must be [r, K] and B [N, r], got {list(a.shape)} and {list(b.shape)}")
        if not any(a.shape[0] for a, _ in parts):
            raise ShapeError("a low-rank change needs a part of a rank above 0")
        held, dtype = _held(parts, dtype)
        arena = arena or Arena()
        a = torch.cat([a.values for a, _ in held])  # [R, K]
        scales = [a.scales for a, _ in held if a.scales is not None]
        panels = arena.place(_panels(a).numpy())  # read before the tiles, so placed before them
        panel_scales = _placed_scales(arena, torch.cat(scales) if scales else None, 4)
        tiles = [(b.values.shape[0], *_placed_tiles(arena, b)) for _, b in held]
        self.core = _core.LowRank(panels, panel_scales, a.shape[1], dtype, tiles)
        self.num_bytes: int = self.core.num_bytes

    def add_(self, runtime: Runtime, y: Array, x: Array) -> None:
        """Add the change alone to y: [T, N] float32, in place; x: [T, K] float32."""
        self.core.add(runtime.core, as_numpy(x), as_numpy(y))


class _Held(NamedTuple):
    """A matrix as float32, or as int8 codes with a float32 scale for each row."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def _held(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: str) -> tuple[list[tuple[_Held, _Held]], str]:
    """(A and B of each part as `dtype` has them, that dtype); in f32 where a scale of i8 would not be finite."""
    if dtype not in ("f32", "i8"):
        raise ShapeError(f"dtype of a low-rank change is {dtype!r}; accepted: 'f32', 'i8'")
    codes = [_codes(a, b) for a, b in parts] if dtype == "i8" else []
    if codes and all(bool(held.scales.isfinite().all()) for pair in codes for held in pair if held.scales is not None):
        return codes, dtype
    return [(_Held(a), _Held(b)) for a, b in parts], "f32"


def _codes(a: torch.Tensor, b: torch.Tensor) -> tuple[_Held, _Held]:
    """A [r, K] with scales [r] and B [N, r] with scales [N], with the product of A and B.

    How large a rank is in B goes into its scale of A, so that a small rank keeps its digits beside a large one.
    """
    if not a.shape[0]:
        return _Held(a.to(torch.int8), a.new_empty(0)), _Held(b.to(torch.int8), b.new_zeros(b.shape[0]))
    sizes = _largest(b, 0)  # [1, r]
    return _rows_in_codes(a, sizes.T), _rows_in_codes(b / sizes)


def _rows_in_codes(matrix: torch.Tensor, sizes: torch.Tensor | float = 1.0) -> _Held:
    """[n, m] float32 -> int8 within -127..127 and the scale of each row, times `sizes`: [n, 1]."""
    largest = _largest(matrix, 1)  # [n, 1]
    return _Held((matrix / largest * 127).round().to(torch.int8), (largest / 127 * sizes)[:, 0])


def _largest(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest magnitude along `dim`, which stays; above 0, to divide by."""
    return matrix.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _placed_scales(arena: Arena, scales: torch.Tensor | None, multiple: int) -> np.ndarray | None:
    """With zeros to a multiple."""
    if scales is None:
        return None
    return arena.place(torch.nn.functional.pad(scales, (0, -scales.shape[0] % multiple)).numpy())


def _placed_tiles(arena: Arena, b: _Held) -> tuple[np.ndarray | None, np.ndarray | None]:
    """B and its scales as the core takes them; nothing for a rank of 0."""
    if not b.values.shape[1]:
        return None, None
    return arena.place(_tiles(b.values).numpy()), _placed_scales(arena, b.scales, 16)


def _panels(a: torch.Tensor) -> torch.Tensor:
    """A [R, K] -> [ceil(R / 4), ceil(K / 16), 4, 16], zero past R and K."""
    padded = torch.nn.functional.pad(a, (0, -a.shape[1] % 16, 0, -a.shape[0] % 4))
    return padded.view(padded.shape[0] // 4, 4, -1, 16).transpose(1, 2).contiguous()


def _tiles(b: torch.Tensor) -> torch.Tensor:
    """B [N, r] -> [ceil(N / 16), r, 16], zero past N."""
    padded = torch.nn.functional.pad(b, (0, 0, 0, -b.shape[0] % 16))  # [16 * tiles, r]
    return padded.view(-1, 16, b.shape[1]).transpose(1, 2).contiguous()


def rms_norm(runtime: Runtime, x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight; x: [T, C] or [T, H, C] float32, weight: [C] float32."""
    out = new_result(runtime, x, checked_shape(x, "x", 2, 3))
    _core.rms_norm(runtime.core, as_numpy(x), as_numpy(weight), eps, as_numpy(out))
    return out


def rotate_(runtime: Runtime, x: Array, cos: Array, sin: Array) -> None:
    """Rotate in place the pairs (i, i + R/2) of every head by the angles of its row (Su et al. 2021, eq. 34).

    x: [T, H, D] float32, rows any distance apart. cos, sin: [T, R/2] float32. Dims from R on stay as they are.
    """
    _core.rotate(runtime.core, as_numpy(x), as_numpy(cos), as_numpy(sin))


def layer_norm(runtime: Runtime, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias; x: [T, C] or [T, H, C] float32, both over C.

    weight: [C] or [H, C] float32; bias: the same, or None.
    """
    out = new_result(runtime, x, checked_shape(x, "x", 2, 3))
    shift = None if bias is None else as_numpy(bias)
    _core.layer_norm(runtime.core, as_numpy(x), as_numpy(weight), shift, eps, as_numpy(out))
    return out


def activate(runtime: Runtime, x: Array, activation: str) -> Array:
    """f(x); x: [T, I] float32. activation: "silu", "gelu" (by the error function) or "gelu_tanh". Returns [T, I]."""
    out = new_result(runtime, x, checked_shape(x, "x", 2))
    _core.activate(runtime.core, as_numpy(x), activation, False, as_numpy(out))
    return out


def gate(runtime: Runtime, gate_up: Array, activation: str) -> Array:
    """f(gate) * up; gate_up: [T, 2 * I] float32, gate first. activation: as of `activate`. Returns [T, I]."""
    num_rows, num_columns = checked_shape(gate_up, "gate_up", 2)
    out = new_result(runtime, gate_up, (num_rows, num_columns // 2))
    _core.activate(runtime.core, as_numpy(gate_up), activation, True, as_numpy(out))
    return out


def silu_mul(runtime: Runtime, gate_up: Array) -> Array:
    """silu(gate) * up; gate_up: [T, 2 * I] float32, gate first. Returns [T, I]."""
    return gate(runtime, gate_up, "silu")


def add_(runtime: Runtime, x: Array, y: Array, weight: float = 1.0) -> None:
    """x += weight * y in place; x, y: [T, C] float32."""
    _core.add(runtime.core, as_numpy(x), as_numpy(y), weight)


def embed(runtime: Runtime, table: _core.DenseLinear, token_ids: Array) -> Array:
    """Rows of a table made by `dense_linear`: [V, C] -> [T, C] float32; token_ids: [T] int64."""
    out = new_result(runtime, token_ids, (*checked_shape(token_ids, "token_ids", 1), table.in_features))
    _core.embed(runtime.core, table, as_numpy(token_ids), as_numpy(out))
    return out


class KvCache:
    """Keys and values of one layer for chunked causal attention.

    dtype: "f16" (stored rounded to nearest even), "f32", or codes: "q8", "q6" or "q4", of so many bits with a float16
    scale for each block of 32 dims; "q8_q4" for keys and values apart. Memory is set aside at once and touched as it
    fills. It holds the positions 0..length. Appending at an earlier position forgets what followed it.
    """

    def __init__(self, runtime: Runtime, num_kv_heads: int, head_dim: int, capacity: int, dtype: str = "f16") -> None:
        self._runtime = runtime
        self._cache = _core.KvCache(num_kv_heads, head_dim, capacity, dtype)
        self._head_dim = head_dim
        self.capacity: int = capacity
        self.num_bytes: int = self._cache.num_bytes

    @property
    def length(self) -> int:
        """The positions that it holds: 0 at first, then the end of what was appended last."""
        return self._cache.length

    def append_(self, k: Array, v: Array, start: int) -> None:
        """Write k, v: [T, Hkv, D] float32 to positions start..start+T; start is at most `length`."""
        self._check_range(start, checked_shape(k, "k", 3)[0])
        _core.append(self._runtime.core, self._cache, as_numpy(k), as_numpy(v), start)

    def attend(
        self,
        q: Array,
        start: int,
        window: int | None = None,
        compute: str = "int8",
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Array:
        """Attention of queries at positions start..start+T over the keys 0..start+T, at most `length`.

        q: [T, Hq, D] float32. Query t sees keys j <= start + t, and with a window only j > start + t - window: the
        bottom-right aligned causal mask. Scores are products times `scale` (None: 1/sqrt(D)), then with a soft cap c
        c * tanh(score / c). Returns [T, Hq * D] float32.

        compute: "exact" computes in float32, coded keys and values are decoded. "int8" rounds queries over codes to 8
        bits per block of 32 dims and weights to 15 bits per page of 64 keys, and sums integers within each; over "f16"
        it rounds all four factors to bf16 where the processor multiplies such pairs ("avx512bf16"), and sums in
        float32. "f32" has one way.
        """
        num_rows, num_heads, head_dim = checked_shape(q, "q", 3)
        self._check_range(start, num_rows)
        if window is not None and window < 1:
            raise ShapeError(f"window is {window}; accepted: None or at least 1")
        out = new_result(self._runtime, q, (num_rows, num_heads * head_dim))
        scale = 1.0 / math.sqrt(self._head_dim) if scale is None else scale
        if softcap is not None and not softcap > 0:
            raise ShapeError(f"softcap is {softcap}; accepted: None or above 0")
        seen = (start, window or 0, scale, softcap or 0.0, compute)
        _core.attend(self._runtime.core, as_numpy(q), self._cache, *seen, as_numpy(out))
        return out

    def _check_range(self, start: int, num_rows: int) -> None:
        if start < 0 or start + num_rows > self.capacity:  # the core's capacity is rounded up
            raise ShapeError(f"positions {start} to {start + num_rows} do not fit a cache of {self.capacity}")


def as_numpy(array: Array) -> np.ndarray:
    """The same memory as a numpy array."""
    if isinstance(array, np.ndarray):
        return array
    if not isinstance(array, torch.Tensor):
        raise ShapeError(f"expected a torch tensor or numpy array, got {type(array).__name__}")
    if array.device.type != "cpu":
        raise ShapeError(f"expected a tensor on the CPU, got one on {array.device}")
    try:
        return (array.detach() if array.requires_grad else array).numpy()
    except (TypeError, RuntimeError) as error:  # a dtype or layout that numpy does not have
        raise ShapeError(f"a tensor of {array.dtype}, {array.layout} cannot be read: {error}") from error


def scale_bits(scales: np.ndarray) -> np.ndarray:
    """float16 scales as their bit patterns, which is how the core takes them; float32 ones as they are."""
    if scales.dtype == np.float16:
        return scales.view(np.uint16)
    if scales.dtype != np.float32:
        raise ShapeError(f"scales has dtype {scales.dtype}; accepted: float16, float32")
    return scales


def checked_shape(array: Array, name: str, *num_dims: int) -> tuple[int, ...]:
    """The shape of an array that has one of these numbers of dimensions."""
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise ShapeError(f"{name} is a {type(array).__name__}; accepted: a torch tensor or numpy array")
    if array.ndim not in num_dims:
        accepted = " or ".join(map(str, num_dims))
        raise ShapeError(f"{name} has shape {list(array.shape)}; expected {accepted} dimensions")
    return tuple(array.shape)


LARGE_RESULT = 1 << 18  # floats; about where malloc begins to ask the system for every piece anew


def new_result(runtime: Runtime, like: Array, shape: tuple[int, ...]) -> Array:
    """An uninitialised float32 array: torch for torch, numpy for numpy. Large ones use recycled memory."""
    is_torch = isinstance(like, torch.Tensor)
    if math.prod(shape) < LARGE_RESULT:
        return torch.empty(shape, dtype=torch.float32) if is_torch else np.empty(shape, np.float32)
    array = runtime.core.empty(shape[0], math.prod(shape[1:])).reshape(shape)
    return torch.from_numpy(array) if is_torch else array
