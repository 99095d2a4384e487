"""Every array that a kernel cannot take is refused with a message that names it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kernel_support import gptq_case
from ropewalk import _core, native
from ropewalk.base.errors import ShapeError

RUNTIME = native.Runtime(None, 1)
CORE = RUNTIME.core


def refused(message: str):
    return pytest.raises(ShapeError, match=re.escape(message))


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def misaligned(num_rows: int, size: int) -> np.ndarray:
    return np.zeros(num_rows * size * 4 + 1, np.uint8)[1:].view(np.float32).reshape(num_rows, size)


K, N, G = 64, 24, 2

PACK_MISTAKES = {
    "qweight-rows": ({"qweight": np.zeros((7, N), np.int32)}, "qweight has shape [7, 24]; expected [8, 24]"),
    "qweight-dtype": ({"qweight": np.zeros((8, N), np.int64)}, "qweight has dtype int64; accepted: int32"),
    "qweight-unsigned": ({"qweight": np.zeros((8, N), np.uint32)}, "qweight has dtype uint32; accepted: int32"),
    "qweight-layout": ({"qweight": np.zeros((N, 8), np.int32).T}, "qweight must be contiguous (row-major)"),
    "qweight-dims": ({"qweight": np.zeros(8, np.int32)}, "qweight and scales must have two dimensions"),
    "qweight-empty": ({"qweight": np.zeros((8, 0), np.int32)}, "qweight or scales is empty"),
    "qweight-list": ({"qweight": [[0]]}, "expected a torch tensor or numpy array, got list"),
    "bits-1": ({"bits": 1}, "bits is 1; accepted: 2 to 8"),
    "bits-9": ({"bits": 9}, "bits is 9; accepted: 2 to 8"),
    "bits-mismatch": ({"bits": 8}, "qweight has shape [8, 24]; expected [16, 24]"),
    "planar-mismatch": ({"in_features": 60, "planar": True, "bits": 3}, "expected [6, 24]"),
    "no-features": ({"in_features": 0}, "in_features is out of range"),
    "negative-features": ({"in_features": -64}, "in_features is out of range"),
    "too-many-features": ({"in_features": 1 << 40}, "in_features is out of range"),
    "scales-dtype": ({"scales": np.zeros((G, N))}, "scales has dtype float64; accepted: float16, float32"),
    "scales-bits": ({"scales": np.zeros((G, N), np.uint16)}, "scales has dtype uint16; accepted: float16, float32"),
    "scales-order": ({"scales": np.zeros((G, N), ">f4")}, "scales has dtype >f4; accepted: float16, float32"),
    "scales-bfloat16": ({"scales": torch.zeros(G, N, dtype=torch.bfloat16)}, "torch.bfloat16"),
    "scales-columns": ({"scales": np.zeros((G, N - 1), np.float16)}, "scales has shape [2, 23]; expected [2, 24]"),
    "scales-empty": ({"scales": np.zeros((0, N), np.float16)}, "qweight or scales is empty"),
    "scales-layout": ({"scales": np.zeros((N, G), np.float32).T}, "scales must be contiguous"),
    "zeros-shape": ({"zeros": np.zeros((G + 1, N), np.uint8)}, "zeros has shape [3, 24]; expected [2, 24]"),
    "zeros-dtype": ({"zeros": np.zeros((G, N), np.int8)}, "zeros has dtype int8; accepted: uint8"),
    "starts-dtype": (
        {"group_starts": np.array([0, 32, 64], np.int32)},
        "group_starts has dtype int32; accepted: int64",
    ),
    "starts-length": ({"group_starts": np.array([0, 64])}, "group_starts has shape [2]; expected [3]"),
    "starts-first": ({"group_starts": np.array([1, 32, 64])}, "group_starts must begin with 0 and end with"),
    "starts-last": ({"group_starts": np.array([0, 32, 63])}, "end with in_features (64)"),
    "starts-decreasing": ({"group_starts": np.array([0, 70, 64])}, "group_starts decreases after group 1"),
    "starts-negative": ({"group_starts": np.array([0, -1, 64])}, "group_starts decreases after group 0"),
    "order-dtype": ({"order": np.arange(K)}, "order has dtype int64; accepted: int32"),
    "order-length": ({"order": np.arange(K - 1, dtype=np.int32)}, "order has shape [63]; expected [64]"),
    "order-twice": ({"order": np.zeros(K, np.int32)}, "order is not a permutation: entry 1 is 0"),
    "order-beyond": ({"order": np.arange(1, K + 1, dtype=np.int32)}, "order is not a permutation: entry 63 is 64"),
    "order-negative": ({"order": np.arange(-1, K - 1, dtype=np.int32)}, "order is not a permutation: entry 0 is -1"),
    "bias-length": ({"bias": f32(N + 1)}, "bias has shape [25]; expected [24]"),
    "bias-dtype": ({"bias": np.zeros(N, np.float16)}, "bias has dtype float16; accepted: float32"),
}


@pytest.mark.parametrize("name", PACK_MISTAKES)
def test_packing_refuses(name):
    change, message = PACK_MISTAKES[name]
    with refused(message):
        native.pack_gptq(RUNTIME, **(gptq_case(K, N, 32).arguments | change))


def test_packing_takes_what_the_mistakes_were_made_from():
    assert gptq_case(K, N, 32).pack(RUNTIME).num_bytes > 0


@pytest.mark.parametrize(
    "weight, bias, message",
    [
        (np.zeros((4, 8)), None, "weight has dtype float64; accepted: float32, float16, bfloat16"),
        (np.zeros((4, 8), np.int16), None, "weight has dtype int16; accepted"),
        (np.zeros((4, 8), ">f4"), None, "weight has dtype >f4; accepted"),
        (f32(8), None, "weight has shape [8]; expected 2 dimensions"),
        ([[1.0]], None, "weight is a list; accepted: a torch tensor or numpy array"),
        (f32(0, 8), None, "weight must be a matrix with at least one row and column"),
        (f32(8, 4).T, None, "weight must be contiguous"),
        (torch.zeros(8, 4, dtype=torch.bfloat16).T, None, "weight must be contiguous"),
        (torch.zeros(4, 8, device="meta"), None, "expected a tensor on the CPU, got one on meta"),
        (torch.zeros(4, 8).to_sparse(), None, "cannot be read"),
        (f32(4, 8), f32(5), "bias has shape [5]; expected [4]"),
        (f32(4, 8), np.zeros(4), "bias has dtype float64; accepted: float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dense_linear_refuses(weight, bias, message):
    with refused(message):
        native.dense_linear(weight, bias)


def test_a_dense_linear_refuses_an_unknown_float_type():
    with refused("float type is 'f64'; accepted: 'f32', 'f16', 'bf16'"):
        _core.dense_linear(f32(4, 8), "f64", None)


def test_linears_over_different_inputs_are_refused():
    with refused("the parts of a linear group read different inputs"):
        native.Linear(RUNTIME, [native.dense_linear(f32(4, 8)), native.dense_linear(f32(4, 9))])


def test_a_linear_of_no_parts_or_of_foreign_parts_is_refused():
    with refused("a linear group needs at least one part"):
        native.Linear(RUNTIME, [])
    for part in (None, 5, f32(4, 8)):
        with refused("a part of a linear group is neither PackedGptq nor DenseLinear"):
            _core.LinearGroup([part])


@pytest.mark.parametrize(
    "x, message",
    [
        (f32(2, 9), "x has shape [2, 9]; expected [2, 8]"),
        (f32(8), "x has shape [8]; expected 2 dimensions"),
        (f32(1, 2, 8), "x has shape [1, 2, 8]; expected 2 dimensions"),
        (np.zeros((2, 8)), "x has dtype float64; accepted: float32"),
        (np.zeros((2, 8), np.int32), "x has dtype int32; accepted: float32"),
        (np.zeros((2, 8), ">f4"), "x has dtype >f4; accepted: float32"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), "torch.bfloat16"),
        (f32(8, 2).T, "x must be contiguous in all dimensions but the first"),
        (f32(2, 16)[:, ::2], "x must be contiguous in all dimensions but the first"),
        (f32(4, 8)[::-1], "x has overlapping or misaligned rows"),
        (np.broadcast_to(f32(1, 8), (3, 8)), "x has overlapping or misaligned rows"),
        (misaligned(2, 8), "x does not start on a multiple of its element size"),
        ([[0.0] * 8], "x is a list; accepted: a torch tensor or numpy array"),
        (None, "x is a NoneType; accepted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_linear_refuses(x, message):
    linear = native.Linear(RUNTIME, [native.dense_linear(f32(4, 8))])
    with refused(message):
        linear(x)


def test_a_linear_refuses_an_unknown_compute_mode():
    linear = native.Linear(RUNTIME, [native.dense_linear(f32(4, 8))])
    with refused("compute is 'fp8'; accepted: 'exact', 'int8'"):
        linear(f32(1, 8), "fp8")


@pytest.mark.parametrize(
    "out, message",
    [
        (read_only(f32(2, 4)), "out is read-only"),
        (f32(3, 4), "out has shape [3, 4]; expected [2, 4]"),
        (f32(2, 5), "out has shape [2, 5]; expected [2, 4]"),
        (f32(4), "out must have two dimensions"),
        (np.zeros((2, 4)), "out has dtype float64"),
        (np.broadcast_to(f32(1, 4), (2, 4)), "out is read-only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_core_refuses_an_output_that_does_not_fit(out, message):
    group = _core.LinearGroup([_core.dense_linear(f32(4, 8), "f32", None)])
    with refused(message):
        group.run(CORE, "exact", f32(2, 8), out, None)


@pytest.mark.parametrize(
    "x, weight, eps, message",
    [
        (f32(2, 8), f32(9), 1e-6, "x has shape [2, 8]; expected [2, 9]"),
        (f32(2, 3, 8), f32(9), 1e-6, "x has shape [2, 3, 8]; expected [2, 3, 9]"),
        (f32(8), f32(8), 1e-6, "x has shape [8]; expected 2 or 3 dimensions"),
        (f32(2, 8), f32(1, 8), 1e-6, "weight must have one dimension and at least one element"),
        (f32(2, 0), f32(0), 1e-6, "weight must have one dimension and at least one element"),
        (f32(2, 8), np.zeros(8), 1e-6, "weight has dtype float64"),
        (f32(2, 8), f32(16)[::2], 1e-6, "weight must be contiguous"),
        (f32(2, 8), f32(8), -1e-6, "epsilon must be in [0, 1]"),
        (f32(2, 8), f32(8), 1.0001, "epsilon must be in [0, 1]"),
        (f32(2, 8), f32(8), float("nan"), "epsilon must be in [0, 1]"),
        (f32(2, 8, 3).transpose(0, 2, 1), f32(8), 1e-6, "x must be contiguous in all dimensions but the first"),
        (np.zeros((2, 8), np.float16), f32(8), 1e-6, "x has dtype float16; accepted: float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_norm_refuses(x, weight, eps, message):
    with refused(message):
        native.rms_norm(RUNTIME, x, weight, eps)


@pytest.mark.parametrize("out, message", [(read_only(f32(2, 8)), "out is read-only"), (f32(2, 7), "out has shape")])
def test_the_core_refuses_an_output_of_a_norm_that_does_not_fit(out, message):
    with refused(message):
        _core.rms_norm(CORE, f32(2, 8), f32(8), 1e-6, out)


@pytest.mark.parametrize(
    "x, cos, sin, message",
    [
        (f32(2, 8), f32(2, 4), f32(2, 4), "x must be [T, H, D] and cos, sin [T, R / 2]"),
        (f32(2, 1, 8), f32(4), f32(4), "x must be [T, H, D] and cos, sin [T, R / 2]"),
        (f32(2, 1, 8), f32(2, 5), f32(2, 5), "cos has more than D / 2 columns"),
        (f32(2, 1, 8), f32(3, 4), f32(3, 4), "cos has shape [3, 4]; expected [2, 4]"),
        (f32(2, 1, 8), f32(2, 4), f32(2, 3), "sin has shape [2, 3]; expected [2, 4]"),
        (f32(2, 1, 8), f32(4, 2).T, f32(2, 4), "cos must be contiguous"),
        (f32(2, 1, 8), np.zeros((2, 4)), f32(2, 4), "cos has dtype float64"),
        (np.zeros((2, 1, 8)), f32(2, 4), f32(2, 4), "x has dtype float64"),
        (read_only(f32(2, 1, 8)), f32(2, 4), f32(2, 4), "x is read-only"),
        (f32(2, 8, 3).transpose(0, 2, 1), f32(2, 4), f32(2, 4), "x must be contiguous in all dimensions but the first"),
        ([0.0], f32(2, 4), f32(2, 4), "expected a torch tensor or numpy array, got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rotation_refuses(x, cos, sin, message):
    with refused(message):
        native.rotate_(RUNTIME, x, cos, sin)


@pytest.mark.parametrize(
    "gate_up, message",
    [
        (f32(2, 7), "gate_up has shape [2, 7]; expected [2, 6]"),
        (f32(8), "gate_up has shape [8]; expected 2 dimensions"),
        (np.zeros((2, 8)), "gate_up has dtype float64"),
        (f32(2, 16)[:, :8], "gate_up must be contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gate_refuses(gate_up, message):
    with refused(message):
        native.silu_mul(RUNTIME, gate_up)


def test_the_core_refuses_an_output_of_a_gate_that_does_not_fit():
    with refused("out must be [T, I]"):
        _core.activate(CORE, f32(2, 8), "silu", True, f32(8))
    with refused("out is read-only"):
        _core.activate(CORE, f32(2, 8), "silu", True, read_only(f32(2, 4)))


@pytest.mark.parametrize(
    "x, y, message",
    [
        (f32(2, 8), f32(2, 7), "y has shape [2, 7]; expected [2, 8]"),
        (f32(8), f32(8), "x must be [T, C]"),
        (read_only(f32(2, 8)), f32(2, 8), "x is read-only"),
        (f32(8, 2).T, f32(2, 8), "x must be contiguous (row-major)"),
        (f32(2, 8), np.zeros((2, 8)), "y has dtype float64; accepted: float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sum_refuses(x, y, message):
    with refused(message):
        native.add_(RUNTIME, x, y)


@pytest.mark.parametrize(
    "token_ids, message",
    [
        (np.array([0, 4]), "token id 4 at position 1 is outside a table of 4"),
        (np.array([-1]), "token id -1 at position 0 is outside a table of 4"),
        (np.array([0], np.int32), "token_ids has dtype int32; accepted: int64"),
        (np.array([[0]]), "token_ids has shape [1, 1]; expected 1 dimensions"),
        (np.arange(4)[::2], "token_ids must be contiguous"),
        ([0], "token_ids is a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_embedding_refuses(token_ids, message):
    with refused(message):
        native.embed(RUNTIME, native.dense_linear(f32(4, 8)), token_ids)


def test_the_core_refuses_an_output_of_an_embedding_that_does_not_fit():
    table = _core.dense_linear(f32(4, 8), "f32", None)
    with refused("out has shape [2, 8]; expected [1, 8]"):
        _core.embed(CORE, table, np.array([0]), f32(2, 8))
    with refused("token_ids must have one dimension"):
        _core.embed(CORE, table, np.array([[0]]), f32(1, 8))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 8, 8), "num_heads is out of range"),
        ((1 << 17, 8, 8), "num_heads is out of range"),
        ((1, 0, 8), "head_dim is out of range"),
        ((1, 8193, 8), "head_dim is out of range"),
        ((1, 8, 0), "capacity is out of range"),
        ((1, 8, -5), "capacity is out of range"),
        ((1, 8, 1 << 40), "capacity is out of range"),
        ((1, 8, 8, "bf16"), "type of a cache is 'bf16'; accepted"),
        ((1, 8, 8, "fp16"), "type of a cache is 'fp16'; accepted"),
        ((1, 8, 8, "q8_"), "type of a cache is 'q8_'; accepted"),
        ((1, 8, 8, "q8_q4_q4"), "type of a cache is 'q8_q4_q4'; accepted"),
        ((1, 8, 8, "q4+64"), "type of a cache is 'q4+64'; accepted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_refuses(arguments, message):
    with refused(message):
        native.KvCache(RUNTIME, *arguments)


def test_a_cache_that_memory_cannot_hold_is_a_memory_error():
    with pytest.raises(MemoryError):
        native.KvCache(RUNTIME, 1 << 14, 1 << 13, 1 << 24, "f32")


@pytest.mark.parametrize(
    "k, v, start, message",
    [
        (f32(3, 2, 8), f32(3, 2, 8), 8, "positions 8 to 11 do not fit a cache of 10"),
        (f32(3, 2, 8), f32(3, 2, 8), -1, "positions -1 to 2 do not fit a cache of 10"),
        (f32(11, 2, 8), f32(11, 2, 8), 0, "positions 0 to 11 do not fit a cache of 10"),
        (f32(3, 1, 8), f32(3, 1, 8), 0, "k and v must have the cache's 2 heads"),
        (f32(3, 2, 8), f32(3, 1, 8), 0, "k and v must have the cache's 2 heads"),
        (f32(3, 2, 8), f32(2, 2, 8), 0, "k and v differ in their number of rows"),
        (f32(3, 2, 7), f32(3, 2, 7), 0, "k has shape [3, 2, 7]; expected [3, 2, 8]"),
        (f32(3, 2, 8), f32(3, 2, 9), 0, "v has shape [3, 2, 9]; expected [3, 2, 8]"),
        (f32(3, 16), f32(3, 16), 0, "k has shape [3, 16]; expected 3 dimensions"),
        (np.zeros((3, 2, 8), np.float16), f32(3, 2, 8), 0, "k has dtype float16; accepted: float32"),
        (f32(3, 2, 8), np.zeros((3, 2, 8)), 0, "v has dtype float64"),
        (f32(2, 3, 8).transpose(1, 0, 2), f32(3, 2, 8), 0, "k must be contiguous in all dimensions but the first"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_appending_refuses(k, v, start, message):
    with refused(message):
        native.KvCache(RUNTIME, 2, 8, 10).append_(k, v, start)


def filled_cache(length: int = 10) -> native.KvCache:
    cache = native.KvCache(RUNTIME, 2, 8, 10)
    cache.append_(f32(length, 2, 8), f32(length, 2, 8), 0)
    return cache


@pytest.mark.parametrize(
    "q, start, window, message",
    [
        (f32(3, 4, 8), 8, None, "positions 8 to 11 do not fit a cache of 10"),
        (f32(3, 4, 8), -1, None, "positions -1 to 2 do not fit a cache of 10"),
        (f32(3, 3, 8), 0, None, "the number of query heads (3) must be a multiple of the cache's 2"),
        (f32(3, 4, 9), 0, None, "q has shape [3, 4, 9]; expected [3, 4, 8]"),
        (f32(3, 32), 0, None, "q has shape [3, 32]; expected 3 dimensions"),
        (np.zeros((3, 4, 8)), 0, None, "q has dtype float64"),
        (f32(4, 3, 8).transpose(1, 0, 2), 0, None, "q must be contiguous in all dimensions but the first"),
        (f32(3, 4, 8), 0, 0, "window is 0; accepted: None or at least 1"),
        (f32(3, 4, 8), 0, -3, "window is -3; accepted: None or at least 1"),
        ("q", 0, None, "q is a str; accepted: a torch tensor or numpy array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_refuses(q, start, window, message):
    with refused(message):
        filled_cache().attend(q, start, window)


@pytest.mark.parametrize(
    "start, window, out, message",
    [
        (62, 0, f32(3, 32), "queries at positions 62 to 65 lie outside a cache of 64"),
        (-1, 0, f32(3, 32), "queries at positions -1 to 2 lie outside a cache of 64"),
        (0, -1, f32(3, 32), "window must be at least 0"),
        (0, 0, f32(3, 31), "out has shape [3, 31]; expected [3, 32]"),
        (0, 0, read_only(f32(3, 32)), "out is read-only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_core_refuses_what_the_face_would_have_refused(start, window, out, message):
    cache = _core.KvCache(2, 8, 10, "f16")
    _core.append(CORE, cache, f32(64, 2, 8), f32(64, 2, 8), 0)
    with refused(message):
        _core.attend(CORE, f32(3, 4, 8), cache, start, window, 1.0, 0.0, "int8", out)


def test_the_core_refuses_positions_beyond_its_tiles():
    cache = _core.KvCache(2, 8, 10, "f16")
    assert cache.capacity == 64
    for start in (62, -1):
        with refused(f"positions {start} to {start + 3} do not fit a cache of 64"):
            _core.append(CORE, cache, f32(3, 2, 8), f32(3, 2, 8), start)
