"""Rows by themselves: norms, the gate, the residual stream, embeddings, rotation, keys and values kept in pages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from gpu_pages import INSTANCE, INSTANCES, nan_pages, new_pool, step_of
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import rows
from ropewalk.backends.gpu.activations import FeatureOrder, prepare
from ropewalk.backends.protocol import RowSpan
from ropewalk.backends.reference import layers
from ropewalk.backends.reference.attention import rotate_ as reference_rotate_
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


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys and values of fused rows: q, k, v: [T, H, D] views; cos, sin: [T, R/2]."""

    fused: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    num_heads: int
    num_kv_heads: int

    @property
    def views(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.fused.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)

    def copy(self) -> Heads:
        return dataclasses.replace(self, fused=guarded(self.fused))


def heads_of(num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, half: int) -> Heads:
    fused = guarded(normal(num_rows, num_heads + 2 * num_kv_heads, head_dim).to(DEVICE))
    angles = normal(num_rows, half, seed=3) * 1e4
    return Heads(fused, angles.cos().to(DEVICE), angles.sin().to(DEVICE), num_heads, num_kv_heads)


def kept(pages: tuple, start: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of INSTANCE at start..start + num_rows: [num_rows, Hkv, D] each."""
    places = [divmod(position, 64) for position in range(start, start + num_rows)]
    return tuple(
        torch.stack([getattr(pages[i], name)[INSTANCE, :, j] for i, j in places]) for name in ("keys", "values")
    )


SHAPES = [(4, 2, 16, 8), (9, 3, 20, 6), (1, 1, 33, 16), (10, 1, 64, 0), (2, 2, 8, 3)]


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, half", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_queries_are_rotated_and_keys_and_values_kept(num_heads, num_kv_heads, head_dim, half, dtype) -> None:
    pool = new_pool(num_kv_heads, head_dim, dtype)
    spans = [RowSpan(4, 62, nan_pages(pool, 66)), RowSpan(0, 0, ()), RowSpan(5, 1, nan_pages(pool, 70))]
    given = heads_of(9, num_heads, num_kv_heads, head_dim, half)
    expected = given.copy()
    q, k, v = expected.views
    reference_rotate_(q, given.cos, given.sin)
    rotated = k.clone()
    reference_rotate_(rotated, given.cos, given.sin)
    step = step_of(spans, given.cos, given.sin)
    rows.rotate_append_(step, *given.views, INSTANCE)
    assert same_bits(given.fused, expected.fused)  # the queries alone have changed
    for span, part in ((spans[0], slice(0, 4)), (spans[2], slice(4, 9))):
        keys, values = kept(span.pages, span.start, span.num_rows)
        assert torch.equal(keys, rotated[part].to(dtype)) and torch.equal(values, v[part].to(dtype))
        written = sum((~page.tensor.isnan()).sum().item() for page in span.pages)
        assert written == 2 * span.num_rows * num_kv_heads * head_dim  # of this instance, and nothing beside


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, half", SHAPES)
def test_rotating_and_keeping_apart_gives_the_same_bits(num_heads, num_kv_heads, head_dim, half) -> None:
    pool = new_pool(num_kv_heads, head_dim)
    together, apart = (RowSpan(3, 63, nan_pages(pool, 66)) for _ in range(2))
    given = heads_of(3, num_heads, num_kv_heads, head_dim, half)
    other = given.copy()
    rows.rotate_append_(step_of([together], given.cos, given.sin), *given.views, INSTANCE)
    step, (q, k, v) = step_of([apart], given.cos, given.sin), other.views
    rows.rotate_(step, q)
    rows.rotate_(step, k)
    rows.append_(step, k, v, INSTANCE)
    assert same_bits(q, given.views[0]) and room_around(other.fused).isnan().all()
    for one, two in zip(kept(together.pages, 63, 3), kept(apart.pages, 63, 3), strict=True):
        assert torch.equal(one, two)


def test_positions_at_the_far_end_are_kept_in_their_page() -> None:
    pool = new_pool(1, 8)
    pages = nan_pages(pool, 64)
    span = RowSpan(1, 131071, (*nan_pages(pool, 64) * 2047, *pages))
    k, v = on_device(normal(1, 1, 8), normal(1, 1, 8, seed=1))
    rows.append_(step_of([span]), k, v, 0)
    assert torch.equal(pages[0].keys[0, 0, 63], k[0, 0].half()) and torch.equal(
        pages[0].values[0, 0, 63], v[0, 0].half()
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_spans_and_heads_are_kept_where_they_belong(data: st.DataObject) -> None:
    head_dim, num_kv_heads = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    num_heads, half = num_kv_heads * data.draw(st.integers(1, 5)), data.draw(st.integers(0, head_dim // 2))
    places = data.draw(st.lists(st.tuples(st.integers(0, 130), st.integers(0, 5)), min_size=1, max_size=3))
    assume(any(count for _, count in places))
    pool = new_pool(num_kv_heads, head_dim, data.draw(st.sampled_from([torch.float16, torch.float32])))
    spans = [RowSpan(count, start, nan_pages(pool, start + count)) for start, count in places]
    given = heads_of(sum(count for _, count in places), num_heads, num_kv_heads, head_dim, half)
    expected = given.copy()
    for view in expected.views[:2]:
        reference_rotate_(view, given.cos, given.sin)
    rows.rotate_append_(step_of(spans, given.cos, given.sin), *given.views, INSTANCE)
    assert same_bits(given.views[0], expected.views[0])
    first = 0
    for span in spans:
        part = slice(first, first + span.num_rows)
        first = part.stop
        if span.num_rows:
            for found, wanted in zip(kept(span.pages, span.start, span.num_rows), expected.views[1:], strict=True):
                assert torch.equal(found, wanted[part].to(found.dtype))
        written = sum((~page.tensor.isnan()).sum().item() for page in span.pages)
        assert written == 2 * span.num_rows * num_kv_heads * head_dim


@interpreted_only
def test_every_address_is_one_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [RowSpan(3, 62, nan_pages(new_pool(3, 20), 65))]
    pages = [page.tensor for page in spans[0].pages]
    x, weight, gate_up, table = (guarded(normal(*shape)) for shape in ((3, K), (1, K), (3, 2 * K), (5, K)))
    given = heads_of(3, 9, 3, 20, 6)
    with inside_arguments(monkeypatch, pages):
        for order in ORDERS.values():
            rows.norm_activations(x, weight[0], EPS, order, torch.empty(3, K))
            rows.silu_activations(gate_up, order, torch.empty(3, K))
        rows.rms_norm_(x.unflatten(1, (3, K // 3)), weight[0, : K // 3], EPS, torch.empty(3, 3, K // 3))
        rows.add_residual_(torch.zeros(3, K), x, 1.0)
        rows.embed(table.contiguous(), torch.tensor([4, 0]))
        step = step_of(spans, given.cos, given.sin)
        rows.rotate_append_(step, *given.views, INSTANCE)
        rows.rotate_(step, given.views[1])
        rows.append_(step, *given.views[1:], INSTANCE)


def test_no_rows_are_no_launch() -> None:
    order, step = ORDERS["permuted"], step_of([])
    nothing = torch.empty(0, K, device=DEVICE)
    assert rows.norm_activations(nothing, torch.ones(K, device=DEVICE), EPS, order, None).values.shape == (0, WIDTH)
    assert rows.silu_activations(torch.empty(0, 2 * K, device=DEVICE), order, None).values.shape == (0, WIDTH)
    rows.add_residual_(nothing, nothing, 1.0)
    rows.rms_norm_(nothing[:, None], torch.ones(K, device=DEVICE), EPS, nothing[:, None])
    heads = torch.empty(0, 2, 8, device=DEVICE)
    rows.rotate_(step, heads)
    rows.rotate_append_(step, heads, heads, heads, 0)


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


def test_heads_that_do_not_fit_the_tables_or_pages_of_a_step_are_refused() -> None:
    spans = [RowSpan(2, 0, nan_pages(new_pool(2, 8), 2))]
    table = torch.zeros(2, 5, device=DEVICE)
    q, k = torch.zeros(2, 4, 8, device=DEVICE), torch.zeros(2, 2, 8, device=DEVICE)
    with pytest.raises(ShapeError, match=r"rotate: tables \[2, 5\] do not fit x \[2, 4, 8\]"):
        rows.rotate_(step_of(spans, table, table), q)
    step = step_of(spans)
    with pytest.raises(ShapeError, match="x has 1 rows, the step 2"):
        rows.rotate_(step, q[:1])
    for keys, values, instance in ((q, q, 0), (k, k[:, :1], 0), (k, k, INSTANCES), (k, k, -1)):
        with pytest.raises(ShapeError, match=r"do not fit pages of 2 instances, 2 heads of 8"):
            rows.append_(step, keys, values, instance)
