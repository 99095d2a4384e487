"""The kernels alone: packed GPTQ linears, RoPE, norms and chunked attention on torch tensors or numpy arrays.

Letters: T rows, K input features, N output features, G groups, Hq and Hkv query and key/value heads, D head size, R
rotated dims. Arrays live on the CPU and are never converted: a wrong dtype, shape or layout raises ShapeError. Results
are of the same kind as the first array (torch in, torch out).

    runtime = native.Runtime(threads=2)
    starts = torch.arange(0, K + 1, 128)  # groups of 128
    packed = native.pack_gptq(runtime, qweight, bits=4, in_features=K, scales=scales, zeros=zeros, group_starts=starts)
    y = native.Linear(runtime, [packed])(x, compute="int8")

Row t of every result depends on row t of the inputs alone, bit for bit, whatever T and the number of threads.
"""

from __future__ import annotations

from ropewalk.native.arrays import Array, as_numpy
from ropewalk.native.kv_cache import KvCache
from ropewalk.native.linear import Linear, dense_linear, pack_gptq, round_rows
from ropewalk.native.low_rank import Arena, LowRank
from ropewalk.native.rows import activate, add_, embed, gate, layer_norm, rms_norm, rotate_, silu_mul
from ropewalk.native.runtime import MachineLimits, Runtime, SpareMemory, available_isas, usable_processors

__all__ = [
    "Arena",
    "Array",
    "KvCache",
    "Linear",
    "LowRank",
    "MachineLimits",
    "Runtime",
    "SpareMemory",
    "activate",
    "add_",
    "as_numpy",
    "available_isas",
    "dense_linear",
    "embed",
    "gate",
    "layer_norm",
    "pack_gptq",
    "rms_norm",
    "rotate_",
    "round_rows",
    "silu_mul",
    "usable_processors",
]
