"""Low-rank changes, added to a linear or alone: accuracy, the same bits for any rows and threads, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accuracy import assert_as_accurate
from kernel_support import every_isa, gptq_case, same_bits, spread_rows
from ropewalk import _core, native
from ropewalk.base.errors import ShapeError

every_dtype = pytest.mark.parametrize("dtype", ["f32", "i8"])
Parts = list[tuple[torch.Tensor, torch.Tensor]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(in_features: int, widths: list[int], ranks: list[int]) -> Parts:
    """(A [r, K], B [N, r]) of each part, of the sizes that trained adapters have."""
    pairs = enumerate(zip(widths, ranks, strict=True))
    return [(0.05 * normal(r, in_features, seed=i), 0.01 * normal(n, r, seed=50 + i)) for i, (n, r) in pairs]


def added(parts: Parts, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([(x.to(dtype) @ a.to(dtype).T) @ b.to(dtype).T for a, b in parts], dim=1)


def linear(runtime: native.Runtime, kind: str, in_features: int, widths: list[int]) -> native.Linear:
    """Linears of these widths over one input: dense, GPTQ, or GPTQ with an order of its own for each part."""
    if kind == "dense":
        return native.Linear(runtime, [native.dense_linear(normal(n, in_features, seed=n)) for n in widths])
    act_order = kind == "act-order"
    cases = [gptq_case(in_features, n, 32, act_order=act_order, seed=i) for i, n in enumerate(widths)]
    return native.Linear(runtime, [case.pack(runtime) for case in cases])


def rounded_to_codes(parts: Parts) -> Parts:
    """float64: A by its rows, and B by its rows once every rank is as large, rounded to 127 steps of the largest."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        step = rows.abs().amax(1, keepdim=True).clamp_min(1e-300) / 127
        return (rows / step).round() * step

    made = []
    for a, b in parts:
        sizes = b.double().abs().amax(0).clamp_min(1e-300)  # [r]
        made.append((rounded(a.double()), rounded(b.double() / sizes) * sizes) if len(a) else (a, b))
    return made


SHAPES = [(1, 64, [16], [1]), (3, 80, [40, 7, 16], [5, 0, 17]), (101, 96, [67, 130], [16, 64]), (6, 33, [5], [3])]


@every_isa
@every_dtype
@pytest.mark.parametrize("num_rows, in_features, widths, ranks", SHAPES)
def test_the_change_alone_is_as_accurate_as_plain(isa, dtype, num_rows, in_features, widths, ranks):
    parts, x = made(in_features, widths, ranks), normal(num_rows, in_features, seed=9)
    y = normal(num_rows, sum(widths), seed=8)
    change, out = native.LowRank(parts, dtype), y.clone()
    change.add_(native.Runtime(isa, 2), out, x)
    exact = y.double() + added(parts, x, torch.float64)
    plain = y + added(parts, x, torch.float32)
    if dtype == "i8":
        plain = y.double() + added(rounded_to_codes(parts), x, torch.float64)
    assert_as_accurate(out, exact, plain)
    if 0 in ranks:
        unchanged = slice(widths[0], widths[0] + widths[1])
        assert same_bits(out[:, unchanged], y[:, unchanged])


@every_isa
@every_dtype
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("kind", ["dense", "gptq", "act-order"])
def test_a_linear_adds_its_change_as_alone(isa, dtype, compute, kind):
    runtime, widths = native.Runtime(isa, 2), [40, 7, 131]
    weight, parts = linear(runtime, kind, 96, widths), made(96, widths, [16, 0, 5])
    change, x = native.LowRank(parts, dtype), normal(101, 96, seed=4)
    alone = weight(x, compute)
    change.add_(runtime, alone, x)
    assert same_bits(weight(x, compute, change), alone)


@every_isa
@every_dtype
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_results_are_the_same_bits_for_any_rows_and_threads(isa, dtype, compute):
    widths, x = [40, 7, 131], normal(100, 96, seed=3)
    change = native.LowRank(made(96, widths, [16, 3, 48]), dtype)
    whole = linear(native.Runtime(isa, 1), "act-order", 96, widths)(x, compute, change)
    for threads in range(2, 5):
        assert same_bits(linear(native.Runtime(isa, threads), "act-order", 96, widths)(x, compute, change), whole)
    weight = linear(native.Runtime(isa, 2), "act-order", 96, widths)
    for chunk in (1, 7, 64):
        assert same_bits(torch.cat([weight(part, compute, change) for part in x.split(chunk)]), whole)


@every_isa
def test_four_adapters_are_one_of_their_summed_rank(isa):
    runtime, x = native.Runtime(isa, 2), normal(5, 64, seed=2)
    single = [made(64, [48], [16])[0] for _ in range(4)]
    stacked = (torch.cat([a for a, _ in single]), torch.cat([b for _, b in single], dim=1))
    one, four = torch.zeros(5, 48), torch.zeros(5, 48)
    native.LowRank([stacked]).add_(runtime, one, x)
    for part in single:
        native.LowRank([part]).add_(runtime, four, x)
    exact, plain = (sum(added([part], x, dtype) for part in single) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(one, exact, plain)
    assert_as_accurate(four, exact, plain)


@every_isa
@pytest.mark.parametrize("scales", [(1e-9, 1e-2), (1e-2, 1e-9), (1e30, 1e-36), (1e-30, 1e30), (0.0, 1.0), (1.0, 0.0)])
def test_codes_hold_matrices_of_any_magnitude(isa, scales):
    x, parts = normal(3, 64, seed=1), [(scales[0] * normal(4, 64), scales[1] * normal(20, 4, seed=1))]
    out, exact = torch.zeros(3, 20), added(parts, x, torch.float64)
    native.LowRank(parts, "i8").add_(native.Runtime(isa), out, x)
    assert_as_accurate(out, exact, added(rounded_to_codes(parts), x, torch.float64))


@every_isa
def test_a_small_rank_keeps_its_digits_beside_a_large_one(isa):
    """As adapters of very different weights that are stacked; the large one reads an input that is zero here."""
    x, a, b = normal(3, 64, seed=1), normal(4, 64), normal(20, 4, seed=1)
    x[:, 32:], a[:2, :32] = 0.0, 0.0
    parts = [(a, b * torch.tensor([1e6, 1e6, 1e-6, 1e-6]))]
    out, exact = torch.zeros(3, 20), added(parts, x, torch.float64)
    native.LowRank(parts, "i8").add_(native.Runtime(isa), out, x)
    assert_as_accurate(out, exact, added(rounded_to_codes(parts), x, torch.float64))


def test_codes_take_a_quarter_of_the_memory_and_matrices_beyond_them_stay_floats():
    small, large = made(64, [32], [16]), [(torch.full((16, 64), 1e30), torch.full((32, 16), 1e30))]
    assert native.LowRank(small, "i8").num_bytes == 16 * (64 + 32) + 4 * (16 + 32)
    assert native.LowRank(small, "f32").num_bytes == native.LowRank(large, "i8").num_bytes == 4 * 16 * (64 + 32)


@every_isa
@every_dtype
def test_rows_may_lie_any_distance_apart_and_none_give_none(isa, dtype):
    runtime, change, x = native.Runtime(isa), native.LowRank(made(20, [9], [3]), dtype), normal(7, 20).numpy()
    dense, spread = np.zeros((7, 9), np.float32), spread_rows(np.zeros((7, 9), np.float32))
    change.add_(runtime, dense, x)
    change.add_(runtime, spread, spread_rows(x))
    assert same_bits(dense, spread)
    change.add_(runtime, torch.zeros(0, 9), torch.zeros(0, 20))


@every_isa
@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_activation_leaves_no_finite_number_in_its_row(isa, dtype, value):
    x, y = normal(3, 20, seed=1), torch.zeros(3, 9)
    x[1, 18] = value
    native.LowRank(made(20, [9], [3]), dtype).add_(native.Runtime(isa), y, x)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], "needs a part of a rank above 0"),
        ([(torch.zeros(0, 8), torch.zeros(4, 0))], "needs a part of a rank above 0"),
        ([(torch.zeros(2, 8), torch.zeros(4, 3))], r"A must be \[r, K\] and B \[N, r\], got \[2, 8\] and \[4, 3\]"),
        ([(torch.zeros(2, 8), torch.zeros(4, 2)), (torch.zeros(2, 9), torch.zeros(4, 2))], r"got \[2, 9\]"),
        ([(torch.zeros(8), torch.zeros(4, 2))], r"A has shape \[8\]; expected 2 dimensions"),
    ],
)
def test_matrices_that_do_not_fit_each_other_are_refused(parts, message):
    with pytest.raises(ShapeError, match=message):
        native.LowRank(parts)


@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_matrices_are_floats_of_either_kind_and_nothing_else(dtype):
    a, b = torch.randn(2, 32), torch.randn(16, 2)
    for given in ((a, b), (a.numpy(), b.numpy()), (torch.nn.Parameter(a), torch.nn.Parameter(b))):
        assert native.LowRank([given], dtype).num_bytes > 0
    for wrong in (a.half(), a.bfloat16(), a.int(), a.numpy().astype(np.float64)):
        with pytest.raises(ShapeError):
            native.LowRank([(wrong, b)], dtype)
    with pytest.raises(ShapeError, match="there are no outputs"):
        native.LowRank([(a, b[:0])], dtype)
    with pytest.raises(ShapeError, match="there are no inputs"):
        native.LowRank([(a[:, :0], b)], dtype)


def test_a_dtype_that_there_is_not_is_refused():
    with pytest.raises(ShapeError, match="is 'f16'; accepted: 'f32', 'i8'"):
        native.LowRank(made(8, [4], [2]), "f16")


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def i8(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int8)


@pytest.mark.parametrize(
    "a, in_features, type_, parts, message",
    [
        (f32(1, 1, 4, 16), 8, "f16", [(4, f32(1, 2, 16))], "type is 'f16'; accepted: 'f32', 'i8'"),
        (f32(1, 1, 4, 16), 8, "f32", [], "needs at least one part"),
        (f32(1, 1, 4, 16), 0, "f32", [(4, f32(1, 2, 16))], "in_features is out of range"),
        (f32(1, 1, 4, 16), 17, "f32", [(4, f32(1, 2, 16))], r"a has shape \[1, 1, 4, 16\]; expected \[1, 2, 4, 16\]"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, f32(1, 5, 16))], r"a has shape \[1, 1, 4, 16\]; expected \[2, 1, 4, 16\]"),
        (f32(1, 1, 16, 4).transpose(0, 1, 3, 2), 8, "f32", [(4, f32(1, 2, 16))], "a must be contiguous"),
        (f32(4, 16), 8, "f32", [(4, f32(1, 2, 16))], r"a has shape \[4, 16\]"),
        (f32(1, 1, 4, 16), 8, "f32", [(0, f32(1, 2, 16))], "output features of a part are out of range"),
        (f32(1, 1, 4, 16), 8, "f32", [(17, f32(1, 2, 16))], r"b has shape \[1, 2, 16\]; expected \[2, 2, 16\]"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, f32(1, 2, 15))], r"expected \[1, 2, 16\]"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, f32(2, 16))], r"b must be \[tiles, rank, 16\]"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, f32(1, 0, 16))], r"b must be \[tiles, rank, 16\]"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, f32(1, 16, 2).transpose(0, 2, 1))], "b must be contiguous"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, np.zeros((1, 2, 16), np.uint16))], "b has dtype uint16"),
        (f32(1, 1, 4, 16), 8, "f32", [(4, None)], "needs a part of a rank above 0"),
    ],
)
def test_the_core_refuses_arrays_that_do_not_fit(a, in_features, type_, parts, message):
    with pytest.raises(ShapeError, match=message):
        _core.LowRank(a, None, in_features, type_, [(n, b, None) for n, b in parts])


@pytest.mark.parametrize(
    "a, scales, b, b_scales, type_, message",
    [
        (f32(1, 1, 4, 16), f32(4), i8(1, 2, 16), f32(16), "i8", "a has dtype float32; accepted: int8"),
        (i8(1, 1, 4, 16), f32(4), f32(1, 2, 16), f32(16), "i8", "b has dtype float32; accepted: int8"),
        (i8(1, 1, 4, 16), None, i8(1, 2, 16), f32(16), "i8", "scales must be an array for type 'i8'"),
        (i8(1, 1, 4, 16), f32(4), i8(1, 2, 16), None, "i8", "scales of b must be an array for type 'i8'"),
        (i8(1, 1, 4, 16), f32(2), i8(1, 2, 16), f32(16), "i8", r"scales has shape \[2\]; expected \[4\]"),
        (i8(1, 1, 4, 16), f32(4), i8(1, 2, 16), f32(4), "i8", r"scales of b has shape \[4\]; expected \[16\]"),
        (i8(1, 1, 4, 16), i8(4), i8(1, 2, 16), f32(16), "i8", "scales has dtype int8; accepted: float32"),
        (f32(1, 1, 4, 16), f32(4), f32(1, 2, 16), None, "f32", "scales must be None for type 'f32'"),
        (f32(1, 1, 4, 16), None, f32(1, 2, 16), f32(16), "f32", "scales of b must be None for type 'f32'"),
    ],
)
def test_the_core_refuses_codes_and_scales_that_do_not_fit(a, scales, b, b_scales, type_, message):
    with pytest.raises(ShapeError, match=message):
        _core.LowRank(a, scales, 8, type_, [(4, b, b_scales)])


def test_a_change_of_other_linears_is_refused():
    runtime = native.Runtime("scalar", 1)
    weight = native.Linear(runtime, [native.dense_linear(f32(4, 8)), native.dense_linear(f32(5, 8))])
    x = torch.zeros(2, 8)
    for in_features, widths in ((9, [4, 5]), (8, [4]), (8, [5, 4]), (8, [4, 5, 1])):
        change = native.LowRank(made(in_features, widths, [2] * len(widths)))
        with pytest.raises(ShapeError, match="was made for linears of other sizes"):
            weight(x, "exact", change)
    change = native.LowRank(made(8, [4, 5], [2, 2]))
    assert weight(x, "exact", change).shape == (2, 9)
    group = _core.LinearGroup([_core.dense_linear(f32(4, 8), "f32", None)])
    with pytest.raises(ShapeError, match="change is neither LowRank nor None"):
        group.run(runtime.core, "exact", f32(2, 8), f32(2, 4), 7)
    for y, x, message in (
        (f32(2, 8), f32(2, 8), r"out has shape \[2, 8\]; expected \[2, 9\]"),
        (f32(3, 9), f32(2, 8), r"out has shape \[3, 9\]; expected \[2, 9\]"),
        (f32(2, 9), f32(2, 9), r"x has shape \[2, 9\]; expected \[2, 8\]"),
        (np.broadcast_to(f32(1, 9), (2, 9)), f32(2, 8), "out is read-only"),
    ):
        with pytest.raises(ShapeError, match=message):
            change.add_(runtime, y, x)


def test_the_matrices_are_kept_alive():
    runtime, parts = native.Runtime("scalar", 1), made(64, [48], [16])
    change, x, y = native.LowRank(parts), normal(2, 64), torch.zeros(2, 48)
    expected = y.clone()
    change.add_(runtime, expected, x)
    del parts
    filler = [torch.ones(16 * 64) for _ in range(50)]  # would take the place of matrices that had been freed
    change.add_(runtime, y, x)
    assert same_bits(y, expected)
    assert len(filler) == 50
