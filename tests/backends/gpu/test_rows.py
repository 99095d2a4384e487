"""Rows by themselves: norms, the gate, the residual stream, embeddings."""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import rows
from ropewalk.backends.gpu.activations import FeatureOrder, prepare
from ropewalk.backends.reference import layers
from ropewalk.base.errors import ShapeError
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around

EPS = 1e-5
K, WIDTH = 72, 96


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def permuted() -> torch.Tensor:
    """[WIDTH] int32: all K features, with padding among them."""
    order = torch.full((WIDTH,), -1, dtype=torch.int32)
    places = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:K]
    order[places] = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    return order.to(DEVICE)


ORDERS = {
    "plain": FeatureOrder(None, K, K, torch.float16, True),
    "padded": FeatureOrder(None, WIDTH, K, torch.float16, True),
    "permuted": FeatureOrder(permuted(), WIDTH, K, torch.float16, True),
    "permuted float32": FeatureOrder(permuted(), WIDTH, K, torch.float32, False),
    "plain float32": FeatureOrder(None, K, K, torch.float32, False),
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def norm(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return layers.rms_norm(x.to(dtype), weight.to(dtype), EPS)


def gate(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return layers.silu_mul(x.to(dtype))


@pytest.mark.parametrize("heads, size", [(1, 72), (3, 20), (2, 128), (5, 7)])
def test_norms_of_heads_within_wider_rows_follow_the_formula(heads: int, size: int) -> None:
    x, weight = on_device(normal(4, heads, size) * torch.tensor([1e-3, 1.0, 30.0, 0.0])[:, None, None], normal(size))
    x, out = guarded(x), guarded(torch.zeros_like(x))
    rows.rms_norm_(x, weight, EPS, out)
    assert room_around(out).isnan().all()
    assert_as_accurate(out.cpu(), norm(x, weight, torch.float64).cpu(), norm(x, weight).cpu())


@every_order
def test_norms_are_written_as_a_linear_reads_them(order: FeatureOrder) -> None:
    x, weight = on_device(normal(5, K), normal(K, seed=1) * 100)
    whole = torch.full((5, K), float("nan"), device=DEVICE)
    made = rows.norm_activations(guarded(x), weight, EPS, order, whole)
    assert_as_accurate(whole.cpu(), norm(x, weight, torch.float64).cpu(), norm(x, weight).cpu())
    assert_prepared_alike(made, whole, order)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a gate of -100, in NumPy: silu is 0 there
@every_order
def test_gates_are_written_as_a_linear_reads_them(order: FeatureOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up = (normal(5, 2 * K) * torch.tensor([0.01, 1.0, 10.0, 70.0, 0.0])[:, None]).to(DEVICE)
    for columns in (32, rows.GATE_FLOATS):  # three times over a row, and once
        monkeypatch.setattr(rows, "GATE_FLOATS", columns)
        whole = torch.full((5, K), float("nan"), device=DEVICE)
        made = rows.silu_activations(guarded(gate_up), order, whole)
        assert_as_accurate(whole.cpu(), gate(gate_up, torch.float64).cpu(), gate(gate_up).cpu())
        assert_prepared_alike(made, whole, order)


def assert_prepared_alike(made, whole: torch.Tensor, order: FeatureOrder) -> None:
    """A producer and `prepare` of what it produced give the same bits."""
    expected = prepare(whole, order)
    assert made.order is order and made.values.dtype == order.dtype
    assert torch.equal(made.values, expected.values)
    assert (made.scale is None) == (not order.scaled)
    assert made.scale is None or torch.equal(made.scale, expected.scale)


def test_rows_that_would_overflow_float16_are_scaled_and_keep_their_digits() -> None:
    order = ORDERS["permuted"]
    x, weight = on_device(normal(3, K), torch.full((K,), 1e6))
    made = rows.norm_activations(x, weight, EPS, order, None)
    assert made.values.isfinite().all() and (made.scale > 1).all()
    wanted = norm(x, weight, torch.float64)[:, order.order[order.order >= 0].long()]
    found = made.values[:, order.order >= 0].double() * made.scale[:, None].double()
    assert ((found - wanted).abs() <= 2.0**-11 * wanted.abs() + 1e-3).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_own_row(value: float) -> None:
    gate_up = normal(3, 2 * K).to(DEVICE)
    gate_up[1, K + 4] = value
    made = rows.silu_activations(gate_up, ORDERS["plain"], None)
    finite = made.values.isfinite()
    assert finite[0].all() and finite[2].all() and not finite[1, 4] and finite[1].sum() == K - 1


def test_rows_have_the_same_bits_beside_any_others() -> None:
    order = ORDERS["permuted"]
    x, weight, gate_up = on_device(normal(9, K), normal(K, seed=1), normal(9, 2 * K, seed=2))
    for produce in (
        lambda part: rows.norm_activations(x[part], weight, EPS, order, None),
        lambda part: rows.silu_activations(gate_up[part], order, None),
    ):
        together = produce(slice(None))
        for part in (slice(0, 1), slice(3, 8), slice(8, 9)):
            made = produce(part)
            assert torch.equal(made.values, together.values[part]) and torch.equal(made.scale, together.scale[part])


def test_the_float32_form_changes_no_bit_of_the_other() -> None:
    x, weight, gate_up = on_device(normal(2, K), normal(K, seed=1), normal(2, 2 * K, seed=2))
    whole = torch.empty(2, K, device=DEVICE)
    for order in ORDERS.values():
        for produce in (
            lambda out, order=order: rows.norm_activations(x, weight, EPS, order, out),
            lambda out, order=order: rows.silu_activations(gate_up, order, out),
        ):
            assert torch.equal(produce(None).values, produce(whole).values)


@pytest.mark.parametrize("size", [7, 64, 1500])
def test_the_residual_stream_takes_in_weighted_rows(size: int) -> None:
    x, y = on_device(normal(3, size), normal(3, size, seed=1))
    for weight in (1.0, -0.25):
        expected = x + weight * y
        rows.add_residual_(x, guarded(y), weight)
        assert same_bits(x, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [6, 1500])
def test_embeddings_are_widened_rows_of_the_table(dtype: torch.dtype, size: int) -> None:
    table, ids = normal(10, size).to(DEVICE, dtype), torch.tensor([9, 0, 9, 3], device=DEVICE)
    assert same_bits(rows.embed(table, ids), table[ids].float())
    assert rows.embed(table, ids[:0]).shape == (0, size)


@interpreted_only
def test_every_address_is_one_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, gate_up, table = (guarded(normal(*shape)) for shape in ((3, K), (1, K), (3, 2 * K), (5, K)))
    with inside_arguments(monkeypatch):
        for order in ORDERS.values():
            rows.norm_activations(x, weight[0], EPS, order, torch.empty(3, K))
            rows.silu_activations(gate_up, order, torch.empty(3, K))
        rows.rms_norm_(x.unflatten(1, (3, K // 3)), weight[0, : K // 3], EPS, torch.empty(3, 3, K // 3))
        rows.add_residual_(torch.zeros(3, K), x, 1.0)
        rows.embed(table.contiguous(), torch.tensor([4, 0]))


def test_no_rows_are_no_launch() -> None:
    order = ORDERS["permuted"]
    nothing = torch.empty(0, K, device=DEVICE)
    assert rows.norm_activations(nothing, torch.ones(K, device=DEVICE), EPS, order, None).values.shape == (0, WIDTH)
    assert rows.silu_activations(torch.empty(0, 2 * K, device=DEVICE), order, None).values.shape == (0, WIDTH)
    rows.add_residual_(nothing, nothing, 1.0)
    rows.rms_norm_(nothing[:, None], torch.ones(K, device=DEVICE), EPS, nothing[:, None])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, order = torch.zeros(2, K, device=DEVICE), torch.ones(K, device=DEVICE), ORDERS["plain"]
    with pytest.raises(ShapeError, match=rf"norm_activations: x must be \[T, {K}\], got \[2, {K - 1}\]"):
        rows.norm_activations(x[:, 1:], weight, EPS, order, None)
    with pytest.raises(ShapeError, match="norm: weight must be contiguous float32"):
        rows.norm_activations(x, weight.half(), EPS, order, None)
    with pytest.raises(ShapeError, match="out_float32 must be contiguous"):
        rows.norm_activations(x, weight, EPS, order, torch.zeros(1, K, device=DEVICE))
    with pytest.raises(ShapeError, match=rf"gate_up must be \[T, {2 * K}\]"):
        rows.silu_activations(x, order, None)
    with pytest.raises(ShapeError, match="values of a row next to each other"):
        rows.rms_norm_(x.view(2, K, 1)[:, ::2], weight[:1], EPS, torch.zeros(2, K // 2, 1, device=DEVICE))
    with pytest.raises(ShapeError, match="add_residual: 2 and 1 rows"):
        rows.add_residual_(x, x[:1], 1.0)
    with pytest.raises(ShapeError, match="token_ids"):
        rows.embed(x, torch.zeros(2, dtype=torch.int32, device=DEVICE))
