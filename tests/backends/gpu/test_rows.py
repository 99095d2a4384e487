"""Rows by themselves: norms, the residual stream, embeddings."""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_as_accurate
from gpu_orders import ORDERS, WIDTH, K, assert_prepared_alike, on_device
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import feed_forward, rows
from ropewalk.backends.gpu.activations import FeatureOrder
from ropewalk.backends.gpu.rows import Norm
from ropewalk.backends.reference import layers
from ropewalk.base.errors import ShapeError
from ropewalk.families.program import Activation
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around

EPS = 1e-5
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def rms(weight: torch.Tensor) -> Norm:
    return Norm(weight, None, EPS, centred=False)


def by_hand(x: torch.Tensor, given: Norm, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x: [T, heads, size]."""
    weight, bias = (
        None if each is None else each.to(dtype).view(-1, x.shape[2]) for each in (given.weight, given.bias)
    )
    if given.centred:
        return layers.layer_norm(x.to(dtype), weight, bias, EPS)
    return layers.rms_norm(x.to(dtype), weight, EPS)


@pytest.mark.parametrize("heads, size", [(1, 72), (3, 20), (2, 128), (5, 7)])
@pytest.mark.parametrize("kind", ["root mean square", "centred", "with bias", "of each head"])
def test_norms_of_heads_within_wider_rows_follow_the_formula(heads: int, size: int, kind: str) -> None:
    num_weights = size * (heads if kind == "of each head" else 1)
    weight, bias = on_device(normal(num_weights), normal(num_weights, seed=1))
    with_bias = kind in ("with bias", "of each head")
    given = Norm(weight, bias if with_bias else None, EPS, centred=kind != "root mean square")
    (x,) = on_device(normal(4, heads, size) * torch.tensor([1e-3, 1.0, 30.0, 0.0])[:, None, None] + 0.5)
    x, out = guarded(x), guarded(torch.zeros_like(x))
    rows.norm_(x, given, out)
    assert room_around(out).isnan().all()
    assert_as_accurate(out.cpu(), by_hand(x, given, torch.float64).cpu(), by_hand(x, given).cpu())


@every_order
@pytest.mark.parametrize("centred", [False, True])
def test_norms_are_written_as_a_linear_reads_them(order: FeatureOrder, centred: bool) -> None:
    x, weight, bias = on_device(normal(5, K) + 0.5, normal(K, seed=1) * 100, normal(K, seed=2))
    given = Norm(weight, bias if centred else None, EPS, centred)
    whole = torch.full((5, K), float("nan"), device=DEVICE)
    made = rows.norm_activations(guarded(x), given, order, whole)
    exact, plain = (by_hand(x[:, None], given, dtype)[:, 0].cpu() for dtype in (torch.float64, torch.float32))
    assert_as_accurate(whole.cpu(), exact, plain)
    assert_prepared_alike(made, whole, order)


def test_rows_that_would_overflow_float16_are_scaled_and_keep_their_digits() -> None:
    order = ORDERS["permuted"]
    x, weight = on_device(normal(3, K), torch.full((K,), 1e6))
    made = rows.norm_activations(x, rms(weight), order, None)
    assert made.values.isfinite().all() and (made.scale > 1).all()
    wanted = by_hand(x[:, None], rms(weight), torch.float64)[:, 0, order.order[order.order >= 0].long()]
    found = made.values[:, order.order >= 0].double() * made.scale[:, None].double()
    assert ((found - wanted).abs() <= 2.0**-11 * wanted.abs() + 1e-3).all()


def test_rows_have_the_same_bits_beside_any_others() -> None:
    order = ORDERS["permuted"]
    x, weight, gate_up = on_device(normal(9, K), normal(K, seed=1), normal(9, 2 * K, seed=2))
    for produce in (
        lambda part: rows.norm_activations(x[part], rms(weight), order, None),
        lambda part: feed_forward.inner_activations(gate_up[part], Activation.SILU, True, order, None),
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
            lambda out, order=order: rows.norm_activations(x, rms(weight), order, out),
            lambda out, order=order: feed_forward.inner_activations(gate_up, Activation.SILU, True, order, out),
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
    x, weight, table = (guarded(normal(*shape)) for shape in ((3, K), (1, K), (5, K)))
    with inside_arguments(monkeypatch):
        for order in ORDERS.values():
            rows.norm_activations(x, rms(weight[0]), order, torch.empty(3, K))
        rows.norm_(x.unflatten(1, (3, K // 3)), Norm(weight[0], weight[0], EPS, True), torch.empty(3, 3, K // 3))
        rows.add_residual_(torch.zeros(3, K), x, 1.0)
        rows.embed(table.contiguous(), torch.tensor([4, 0]))


def test_no_rows_are_no_launch() -> None:
    order = ORDERS["permuted"]
    nothing = torch.empty(0, K, device=DEVICE)
    assert rows.norm_activations(nothing, rms(torch.ones(K, device=DEVICE)), order, None).values.shape == (0, WIDTH)
    rows.add_residual_(nothing, nothing, 1.0)
    rows.norm_(nothing[:, None], rms(torch.ones(K, device=DEVICE)), nothing[:, None])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, order = torch.zeros(2, K, device=DEVICE), torch.ones(K, device=DEVICE), ORDERS["plain"]
    with pytest.raises(ShapeError, match=rf"norm_activations: x must be \[T, {K}\], got \[2, {K - 1}\]"):
        rows.norm_activations(x[:, 1:], rms(weight), order, None)
    with pytest.raises(ShapeError, match="norm: weight must be contiguous float32"):
        rows.norm_activations(x, rms(weight.half()), order, None)
    with pytest.raises(ShapeError, match="out_float32 must be contiguous"):
        rows.norm_activations(x, rms(weight), order, torch.zeros(1, K, device=DEVICE))
    with pytest.raises(ShapeError, match="norm: bias must be contiguous float32"):
        rows.norm_(x[:, None], Norm(weight, weight[1:], EPS, True), x[:, None])
    with pytest.raises(ShapeError, match="values of a row next to each other"):
        rows.norm_(x.view(2, K, 1)[:, ::2], rms(weight[:1]), torch.zeros(2, K // 2, 1, device=DEVICE))
    with pytest.raises(ShapeError, match="add_residual: 2 and 1 rows"):
        rows.add_residual_(x, x[:1], 1.0)
    with pytest.raises(ShapeError, match="token_ids"):
        rows.embed(x, torch.zeros(2, dtype=torch.int32, device=DEVICE))
