"""Dense linears over float32, float16 and bfloat16 weights, and the widening of halves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from kernel_support import every_isa, same_bits, spread_rows
from ropewalk import native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dense(isa: str, weight, bias=None, threads: int = 1) -> native.Linear:
    return native.Linear(native.Runtime(isa, threads), [native.dense_linear(weight, bias)])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@every_isa
@every_dtype
@pytest.mark.parametrize("in_features", [1, 15, 16, 17, 80, 333])
@pytest.mark.parametrize("num_rows, out_features", [(1, 1), (3, 5), (6, 67), (101, 18)])
def test_result_is_as_accurate_as_float32(isa, dtype, in_features, num_rows, out_features):
    weight, bias = normal(out_features, in_features).to(dtype), normal(out_features, seed=1)
    x = normal(num_rows, in_features, seed=2)
    y = dense(isa, weight, bias, threads=2)(x)
    assert_as_accurate(y, x.double() @ weight.double().T + bias.double(), x @ weight.float().T + bias)


@every_isa
@every_dtype
def test_results_are_the_same_bits_for_any_rows_and_threads(isa, dtype):
    weight, x = normal(131, 70).to(dtype), normal(100, 70, seed=3)
    whole = dense(isa, weight)(x)
    for threads in range(2, 5):
        assert same_bits(dense(isa, weight, threads=threads)(x), whole)
    linear = dense(isa, weight, threads=2)
    for chunk in (1, 7, 64):
        assert same_bits(torch.cat([linear(part) for part in x.split(chunk)]), whole)
    assert same_bits(linear(x[[5, 99, 0, 41]]), whole[[5, 99, 0, 41]])


@every_isa
def test_every_half_widens_exactly(isa):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    y = dense(isa, halves[:, None])(np.ones((1, 1), np.float32))[0]
    with np.errstate(invalid="ignore"):
        assert np.array_equal(y, halves.astype(np.float32), equal_nan=True)


@every_isa
def test_every_bfloat16_widens_exactly(isa):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    y = dense(isa, bits[:, None])(torch.ones(1, 1))[0]
    assert torch.equal(torch.nan_to_num(y, nan=0.5), torch.nan_to_num(bits.float(), nan=0.5))


@every_isa
def test_rows_may_lie_any_distance_apart(isa):
    weight, x = normal(9, 20), normal(7, 20, seed=1).numpy()
    assert same_bits(dense(isa, weight)(spread_rows(x)), dense(isa, weight)(x))


@every_isa
def test_no_rows_give_no_rows(isa):
    assert dense(isa, normal(9, 20))(torch.empty(0, 20)).shape == (0, 9)


@every_isa
@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 18])
def test_a_non_finite_activation_leaves_no_finite_number_in_its_row(isa, dtype, value, place):
    linear, x = dense(isa, normal(9, 20).to(dtype)), normal(3, 20, seed=1)
    clean = linear(x)
    x[1, place] = value
    y = linear(x)
    assert not torch.isfinite(y[1]).any()
    assert same_bits(y[[0, 2]], clean[[0, 2]])


def test_the_weight_is_used_where_it_lies_and_kept_alive():
    weight = normal(4, 8)
    linear = dense("scalar", weight)
    assert linear.num_bytes == 4 * 8 * 4
    before = linear(torch.ones(1, 8))
    weight *= 2
    del weight
    assert torch.equal(linear(torch.ones(1, 8)), 2 * before)
