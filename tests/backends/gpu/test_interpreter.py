"""Triton's interpreter as the backend uses it: where an element is in a tile does not change its bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from gpu_support import normal, same_bits
from ropewalk.backends.gpu.backend import GpuBackend
from triton_interpreter import interpreted_only

pytestmark = interpreted_only


@triton.jit
def product(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    sums = tl.dot(a, b, input_precision="ieee")
    tl.store(out_ptr + m[:, None] * N + n[None, :], sums)


def multiplied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[1])
    product[(1,)](a, b, out, a.shape[0], b.shape[1], a.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_do_not_depend_on_the_order_of_their_products(dtype: torch.dtype) -> None:
    GpuBackend("fp16", torch.device("cpu"))
    a, b = (300 * normal(64, 128)).to(dtype), normal(128, 32, seed=1).to(dtype)
    found = multiplied(a, b)
    backwards = multiplied(a.flip(1).contiguous(), b.flip(0).contiguous())
    assert same_bits(found, backwards)
    assert same_bits(found, (a.double() @ b.double()).float())
    assert same_bits(multiplied(a[16:32].contiguous(), b), found[16:32])


def test_infinities_stay_and_warn_nobody(recwarn: pytest.WarningsRecorder) -> None:
    GpuBackend("fp16", torch.device("cpu"))
    a, b = normal(16, 16).half(), normal(16, 16, seed=1).half()
    a[3, 2], b[2, 0] = float("inf"), 0.0
    found = multiplied(a, b)
    assert found[3, 0].isnan() and found[3, 1].isinf() and found[:3].isfinite().all()
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
