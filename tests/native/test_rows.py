"""The row kernels: RMS norm, rotation, the SiLU gate, the residual sum and the embedding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from kernel_support import every_isa, same_bits, spread_rows
from ropewalk import native

SIZES = (1, 15, 16, 20, 64, 80, 96, 128, 333)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def angles(num_rows: int, half: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    position = torch.arange(start, start + num_rows, dtype=torch.float64)[:, None]
    angle = position * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(1, half))
    return angle.cos().float(), angle.sin().float()


@every_isa
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [None, 3])
def test_rms_norm_is_as_accurate_as_float32(isa, size, heads):
    x = normal(*((5, size) if heads is None else (5, heads, size))) * 30
    weight = normal(size, seed=1)
    y = native.rms_norm(native.Runtime(isa, 2), x, weight, 1e-5)
    assert y.shape == x.shape
    assert_as_accurate(y, norm_formula(x.double(), weight.double(), 1e-5), norm_formula(x, weight, 1e-5))


@every_isa
def test_rms_norm_of_zeros_and_of_tiny_rows_is_kept_finite_by_epsilon(isa):
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e-20), torch.full((40,), 1e-3)])
    y = native.rms_norm(native.Runtime(isa, 1), x, torch.ones(40), 1e-6)
    assert_as_accurate(
        y, norm_formula(x.double(), torch.ones(40).double(), 1e-6), norm_formula(x, torch.ones(40), 1e-6)
    )


@every_isa
@pytest.mark.parametrize(
    "head_dim, half", [(20, 10), (64, 32), (80, 40), (96, 48), (128, 64), (128, 16), (20, 3), (7, 0)]
)
@pytest.mark.parametrize("start", [0, 131071 - 4])
def test_rotation_is_as_accurate_as_float32_and_leaves_the_other_dims(isa, head_dim, half, start):
    x = normal(5, 3, head_dim)
    cos, sin = angles(5, half, start)
    y = x.clone()
    native.rotate_(native.Runtime(isa, 2), y, cos, sin)
    assert_as_accurate(y, rotation(x.double(), cos.double(), sin.double()), rotation(x, cos, sin))
    assert same_bits(y[..., 2 * half :], x[..., 2 * half :])


@every_isa
@pytest.mark.parametrize("size", SIZES)
def test_silu_gate_is_as_accurate_as_float32(isa, size):
    gate_up = normal(6, 2 * size) * 8
    y = native.silu_mul(native.Runtime(isa, 2), gate_up)
    plain, exact = (torch.nn.functional.silu(a[:, :size]) * a[:, size:] for a in (gate_up, gate_up.double()))
    assert_as_accurate(y, exact, plain)


@every_isa
def test_silu_gate_holds_over_the_whole_range_of_the_exponential(isa):
    gate = torch.cat(
        [torch.linspace(-100, 100, 4001), torch.tensor([-1e4, -88.5, -87.0, 0.0, 1e-30, 88.0, 88.5, 1e30])]
    )
    y = native.silu_mul(native.Runtime(isa, 1), torch.cat([gate, torch.ones_like(gate)])[None])[0]
    exact, plain = torch.nn.functional.silu(gate.double()), torch.nn.functional.silu(gate)
    for low, high in ((-1e5, -60), (-60, -20), (-20, -1), (-1, 1), (1, 200), (200, 1e31)):  # each of its own magnitude
        inside = (gate >= low) & (gate <= high)
        assert_as_accurate(y[inside], exact[inside], plain[inside])


@every_isa
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
def test_residual_sum_is_as_accurate_as_float32(isa, size, weight):
    x, y = normal(7, size), normal(7, size, seed=1)
    result = x.clone()
    native.add_(native.Runtime(isa, 2), result, y, weight)
    factor = float(np.float32(weight))
    assert_as_accurate(result, x.double() + factor * y.double(), x + weight * y)
    if weight == 1.0:
        assert torch.equal(result, x + y)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 40])
def test_embedding_rows_are_widened_exactly(isa, dtype, size):
    table = normal(50, size).to(dtype)
    token_ids = torch.tensor([49, 0, 7, 7, 31])
    rows = native.embed(native.Runtime(isa, 2), native.dense_linear(table), token_ids)
    assert same_bits(rows, table[token_ids].float())


@every_isa
def test_rows_give_the_same_bits_with_any_neighbours_threads_and_distance(isa):
    weight, x = normal(4100, seed=1), normal(37, 4100)
    cos, sin = angles(37, 32)
    heads = normal(37, 64, 64, seed=2)
    operations = {
        "norm": (lambda runtime, rows: native.rms_norm(runtime, x[rows], weight, 1e-6), 37),
        "silu": (lambda runtime, rows: native.silu_mul(runtime, x[rows]), 37),
        "sum": (lambda runtime, rows: summed(runtime, x[rows], x.flip(0)[rows]), 37),
        "rotate": (lambda runtime, rows: rotated(runtime, heads[rows], cos[rows], sin[rows]), 37),
    }
    for name, (operation, num_rows) in operations.items():
        whole = operation(native.Runtime(isa, 1), slice(None))
        for threads in (2, 3, 4):
            assert same_bits(operation(native.Runtime(isa, threads), slice(None)), whole), name
        runtime = native.Runtime(isa, 2)
        for chunk in (1, 7):
            parts = [operation(runtime, slice(t, t + chunk)) for t in range(0, num_rows, chunk)]
            assert same_bits(torch.cat(parts), whole), name


def summed(runtime: native.Runtime, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = x.clone()
    native.add_(runtime, result, y, 0.3)
    return result


def rotated(runtime: native.Runtime, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    native.rotate_(runtime, y, cos, sin)
    return y


@every_isa
def test_rows_of_a_norm_and_a_rotation_may_lie_any_distance_apart(isa):
    runtime = native.Runtime(isa, 1)
    x, weight = normal(6, 2, 20).numpy(), normal(20, seed=1).numpy()
    assert same_bits(native.rms_norm(runtime, spread_rows(x), weight, 1e-6), native.rms_norm(runtime, x, weight, 1e-6))
    fused = normal(6, 100)
    before = fused.clone()
    view = fused[:, 30:70].unflatten(1, (2, 20))
    cos, sin = angles(6, 10)
    native.rotate_(runtime, view, cos, sin)
    assert same_bits(view, rotated(runtime, before[:, 30:70].reshape(6, 2, 20), cos, sin))
    assert same_bits(fused[:, :30], before[:, :30]) and same_bits(fused[:, 70:], before[:, 70:])


@every_isa
def test_no_rows_give_no_rows(isa):
    runtime = native.Runtime(isa, 2)
    assert native.rms_norm(runtime, np.empty((0, 20), np.float32), np.ones(20, np.float32), 1e-6).shape == (0, 20)
    assert native.rms_norm(runtime, np.empty((0, 3, 20), np.float32), np.ones(20, np.float32), 1e-6).shape == (0, 3, 20)
    assert native.silu_mul(runtime, torch.empty(0, 40)).shape == (0, 20)
    native.rotate_(runtime, torch.empty(0, 2, 20), torch.empty(0, 10), torch.empty(0, 10))
    native.add_(runtime, torch.empty(0, 20), torch.empty(0, 20))
    table = native.dense_linear(torch.ones(3, 20))
    assert native.embed(runtime, table, torch.empty(0, dtype=torch.int64)).shape == (0, 20)


@every_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_element_shows_in_its_row_and_in_no_other(isa, value):
    runtime = native.Runtime(isa, 1)
    x = normal(3, 40)
    clean = {"norm": native.rms_norm(runtime, x, torch.ones(40), 1e-6), "silu": native.silu_mul(runtime, x)}
    for place in (2, 18, 39):
        bad = x.clone()
        bad[1, place] = value
        results = {"norm": native.rms_norm(runtime, bad, torch.ones(40), 1e-6), "silu": native.silu_mul(runtime, bad)}
        for name, y in results.items():
            column = place % 20 if name == "silu" else place
            assert not torch.isfinite(y[1, column]), name
            assert same_bits(y[[0, 2]], clean[name][[0, 2]]), name
    heads = normal(2, 1, 20)
    heads[0, 0, 12] = value
    cos, sin = angles(2, 10, start=1)
    native.rotate_(runtime, heads, cos, sin)
    assert not torch.isfinite(heads[0, 0, [2, 12]]).any()
    assert torch.isfinite(heads[1]).all()
