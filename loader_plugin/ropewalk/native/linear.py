"""Linears: packed GPTQ codes and dense weights, several side by side that read the same input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ropewalk.base.errors import ShapeError
from ropewalk.native.arrays import Array, as_numpy, checked_shape, new_result, scale_bits
from ropewalk.native.core import _core
from ropewalk.native.low_rank import LowRank
from ropewalk.native.runtime import Runtime


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


def round_rows(runtime: Runtime, weight: Array, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix of floats as what `pack_gptq` takes, by the rule of `ropewalk.gptq.rounding`, to the bit.

    weight: [N, K] float32, float16 or (torch) bfloat16, contiguous, K a multiple of 32 / bits. bits: 8, with a scale
    for runs of 64 inputs, or 4, for runs of 32. Returns qweight [K * bits / 32, N] int32, scales [G, N] float16
    (float32 if one is no normal number there) and zeros [G, N] uint8.
    """
    rows, type_name = _stored_floats(weight)
    num_rows, num_inputs = rows.shape
    if bits not in (8, 4):
        raise ShapeError(f"bits is {bits!r:.40}; accepted: 8, 4")
    shape = (num_inputs * bits // 32, num_rows)
    memory = _core.AlignedBytes(4 * shape[0] * shape[1]).array()  # in huge pages: the system hands them out faster
    words = memory.view(np.int32).reshape(shape)
    scales = np.empty((-(-num_inputs // (64 if bits == 8 else 32)), num_rows), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    leaves = _core.round_rows(runtime.core, rows, type_name, bits, True, words, scales, zeros)
    if leaves:  # float16 for some of them: once more with the scales as they are
        _core.round_rows(runtime.core, rows, type_name, bits, False, words, scales, zeros)
    held = torch.from_numpy(scales)
    return torch.from_numpy(words), held if leaves else held.half(), torch.from_numpy(zeros)


def dense_linear(weight: Array, bias: Array | None = None) -> _core.DenseLinear:
    """A dense weight, used in place (the array is kept alive, not copied).

    weight: [N, K] float32, float16 or (torch) bfloat16, contiguous. bias: [N] float32.
    """
    rows, type_name = _stored_floats(weight)
    return _core.dense_linear(rows, type_name, None if bias is None else as_numpy(bias))


def _stored_floats(weight: Array) -> tuple[np.ndarray, str]:
    """A matrix as the core takes it, and the name of its type."""
    checked_shape(weight, "weight", 2)
    types = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    name = str(weight.dtype).removeprefix("torch.")
    if name not in types:
        raise ShapeError(f"weight has dtype {name}; accepted: {', '.join(types)}")
    if types[name] != "f32":
        weight = weight.view(torch.int16) if isinstance(weight, torch.Tensor) else weight.view(np.int16)
        weight = as_numpy(weight).view(np.uint16)
    return as_numpy(weight), types[name]


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

        x: [T, K] float32, rows any distance apart. compute: both modes round the activations per block of 32 in the
        order of the groups and sum integers within a block; "int8" to 8 bits (scale = largest magnitude / 127, nearest
        even), "exact" to 23 bits of the largest magnitude, as accurate as float32. Weights are exact in both. Dense
        parts always use float32 activations. Returns [T, N] float32.
        """
        out = new_result(self._runtime, x, (checked_shape(x, "x", 2)[0], self.out_features))
        core = None if change is None else change.core
        self.core.run(self._runtime.core, self._compute or compute, as_numpy(x), as_numpy(out), core)
        return out
