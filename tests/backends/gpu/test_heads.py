"""Heads by themselves: rotation, and keys and values kept in pages of floats. Codes: test_formats.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpu_pages import INSTANCE, INSTANCES, nan_pages, new_pool, num_written, step_of
from gpu_support import DEVICE, normal, same_bits
from ropewalk.backends.gpu import heads
from ropewalk.backends.protocol import RowSpan
from ropewalk.backends.reference.attention import rotate_ as reference_rotate_
from ropewalk.base.errors import ShapeError
from triton_interpreter import guarded, inside_arguments, interpreted_only, room_around


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
@pytest.mark.parametrize("cache_type", ["fp16", "fp32"])
def test_queries_are_rotated_and_keys_and_values_kept(num_heads, num_kv_heads, head_dim, half, cache_type) -> None:
    pool = new_pool(num_kv_heads, head_dim, cache_type)
    spans = [RowSpan(4, 62, nan_pages(pool, 66)), RowSpan(0, 0, ()), RowSpan(5, 1, nan_pages(pool, 70))]
    given = heads_of(9, num_heads, num_kv_heads, head_dim, half)
    expected = given.copy()
    q, k, v = expected.views
    reference_rotate_(q, given.cos, given.sin)
    rotated = k.clone()
    reference_rotate_(rotated, given.cos, given.sin)
    step = step_of(spans, given.cos, given.sin)
    heads.rotate_append_(step, *given.views, INSTANCE)
    assert same_bits(given.fused, expected.fused)  # the queries alone have changed
    for span, part in ((spans[0], slice(0, 4)), (spans[2], slice(4, 9))):
        keys, values = kept(span.pages, span.start, span.num_rows)
        assert torch.equal(keys, rotated[part].to(keys.dtype)) and torch.equal(values, v[part].to(keys.dtype))
        assert num_written(span.pages) == 2 * span.num_rows * num_kv_heads * head_dim


@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, half", SHAPES)
def test_rotating_and_keeping_apart_gives_the_same_bits(num_heads, num_kv_heads, head_dim, half) -> None:
    pool = new_pool(num_kv_heads, head_dim)
    together, apart = (RowSpan(3, 63, nan_pages(pool, 66)) for _ in range(2))
    given = heads_of(3, num_heads, num_kv_heads, head_dim, half)
    other = given.copy()
    heads.rotate_append_(step_of([together], given.cos, given.sin), *given.views, INSTANCE)
    step, (q, k, v) = step_of([apart], given.cos, given.sin), other.views
    heads.rotate_(step, q)
    heads.rotate_(step, k)
    heads.append_(step, k, v, INSTANCE)
    assert same_bits(q, given.views[0]) and room_around(other.fused).isnan().all()
    for one, two in zip(kept(together.pages, 63, 3), kept(apart.pages, 63, 3), strict=True):
        assert torch.equal(one, two)


def test_positions_at_the_far_end_are_kept_in_their_page() -> None:
    pool = new_pool(1, 8)
    pages = nan_pages(pool, 64)
    span = RowSpan(1, 131071, (*nan_pages(pool, 64) * 2047, *pages))
    k, v = normal(1, 1, 8).to(DEVICE), normal(1, 1, 8, seed=1).to(DEVICE)
    heads.append_(step_of([span]), k, v, 0)
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
    pool = new_pool(num_kv_heads, head_dim, data.draw(st.sampled_from(["fp16", "fp32"])))
    spans = [RowSpan(count, start, nan_pages(pool, start + count)) for start, count in places]
    given = heads_of(sum(count for _, count in places), num_heads, num_kv_heads, head_dim, half)
    expected = given.copy()
    for view in expected.views[:2]:
        reference_rotate_(view, given.cos, given.sin)
    heads.rotate_append_(step_of(spans, given.cos, given.sin), *given.views, INSTANCE)
    assert same_bits(given.views[0], expected.views[0])
    first = 0
    for span in spans:
        part = slice(first, first + span.num_rows)
        first = part.stop
        if span.num_rows:
            for found, wanted in zip(kept(span.pages, span.start, span.num_rows), expected.views[1:], strict=True):
                assert torch.equal(found, wanted[part].to(found.dtype))
        assert num_written(span.pages) == 2 * span.num_rows * num_kv_heads * head_dim


@interpreted_only
def test_every_address_is_one_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [RowSpan(3, 62, nan_pages(new_pool(3, 20), 65))]
    given = heads_of(3, 9, 3, 20, 6)
    with inside_arguments(monkeypatch, [page.memory for page in spans[0].pages]):
        step = step_of(spans, given.cos, given.sin)
        heads.rotate_append_(step, *given.views, INSTANCE)
        heads.rotate_(step, given.views[1])
        heads.append_(step, *given.views[1:], INSTANCE)


def test_no_rows_are_no_launch() -> None:
    nothing, step = torch.empty(0, 2, 8, device=DEVICE), step_of([])
    heads.rotate_(step, nothing)
    heads.rotate_append_(step, nothing, nothing, nothing, 0)


def test_heads_that_do_not_fit_the_tables_or_pages_of_a_step_are_refused() -> None:
    spans = [RowSpan(2, 0, nan_pages(new_pool(2, 8), 2))]
    table = torch.zeros(2, 5, device=DEVICE)
    q, k = torch.zeros(2, 4, 8, device=DEVICE), torch.zeros(2, 2, 8, device=DEVICE)
    with pytest.raises(ShapeError, match=r"rotate: tables \[1, 2, 5\] and table 0 do not fit x \[2, 4, 8\]"):
        heads.rotate_(step_of(spans, table, table), q)
    step = step_of(spans)
    with pytest.raises(ShapeError, match="x has 1 rows, the step 2"):
        heads.rotate_(step, q[:1])
    for keys, values, instance in ((q, q, 0), (k, k[:, :1], 0), (k, k, INSTANCES), (k, k, -1)):
        with pytest.raises(ShapeError, match=r"do not fit pages of 2 instances, 2 heads of 8"):
            heads.append_(step, keys, values, instance)
