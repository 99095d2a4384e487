"""What a step tells the kernels: positions, addresses of pages, blocks of rows."""

from __future__ import annotations

import pytest
import torch

from gpu_pages import DEVICE, nan_pages, new_pool, step_of
from ropewalk.backends.gpu.layout import PageLayout
from ropewalk.backends.gpu.step import LONG_ROWS, SHORT_ROWS, GpuStep
from ropewalk.backends.protocol import RowSpan
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CacheFormat

POOL = new_pool(2, 8)


def spans_of(*places: tuple[int, int], room: int = 0) -> list[RowSpan]:
    """(start, number of rows) of each span, each with pages of its own."""
    return [RowSpan(rows, start, nan_pages(POOL, start + rows + room)) for start, rows in places]


def test_every_row_has_its_position_and_the_pages_of_its_span() -> None:
    spans = spans_of((70, 3), (0, 1), (600, 2), room=100)
    step = step_of(spans)
    assert step.positions.tolist() == [70, 71, 72, 0, 600, 601]
    assert step.span_of_row.tolist() == [0, 0, 0, 1, 2, 2]
    assert step.pages.shape == (3, 16)  # whole chunks of 8 pages
    for row, (span, used) in enumerate(zip(spans, (2, 1, 10), strict=True)):
        assert step.pages[row].tolist() == [page.address for page in span.pages[:used]] + [0] * (16 - used)
    assert (step.layout, step.num_instances) == (PageLayout(2, 8, CacheFormat("fp16", "fp16")), 2)
    assert step.recent is None


def test_everything_on_the_device_is_one_tensor() -> None:
    step = step_of(spans_of((0, 40), (3, 2)))
    views = (step.pages, step.positions, step.span_of_row, step.short.table, step.long.table)
    assert step.numbers.dtype == torch.int64 and step.numbers.device == DEVICE
    assert sum(view.numel() for view in views) == step.numbers.numel()
    start, end = step.numbers.data_ptr(), step.numbers.data_ptr() + 8 * step.numbers.numel()
    assert all(start <= view.data_ptr() <= end for view in views)


def test_short_spans_are_a_block_each_and_long_ones_are_cut_with_most_keys_first() -> None:
    step = step_of(spans_of((5, 1), (0, 2 * LONG_ROWS + 5), (7, SHORT_ROWS), (200, SHORT_ROWS + 1)))
    assert step.short.table.tolist() == [[0, 0, 1], [2, 6 + 2 * LONG_ROWS, SHORT_ROWS]]
    cut = [[1, 1 + 2 * LONG_ROWS, 5], [1, 1 + LONG_ROWS, LONG_ROWS], [1, 1, LONG_ROWS]]
    ends = [2 * LONG_ROWS + 5, 2 * LONG_ROWS, LONG_ROWS]
    last = [3, 6 + 2 * LONG_ROWS + SHORT_ROWS, SHORT_ROWS + 1]
    expected = sorted([*zip(ends, cut, strict=True), (200 + SHORT_ROWS + 1, last)], reverse=True)
    assert step.long.table.tolist() == [block for _, block in expected]
    assert (step.short.most_rows, step.long.most_rows) == (SHORT_ROWS, LONG_ROWS)


def test_a_step_may_be_empty_and_so_may_a_span() -> None:
    assert step_of([]).num_rows == 0
    step = step_of([*spans_of((5, 2)), RowSpan(0, 0, ()), *spans_of((9, 1))])
    assert step.positions.tolist() == [5, 6, 9] and step.span_of_row.tolist() == [0, 0, 2]
    assert step.short.table.tolist() == [[0, 0, 2], [2, 2, 1]] and step.long.num_blocks == 0


def test_rows_tables_and_spans_that_do_not_fit_are_refused() -> None:
    x, table = torch.zeros(3, 4, device=DEVICE), torch.zeros(1, 3, 2, device=DEVICE)
    spans = spans_of((0, 3))
    with pytest.raises(ShapeError, match=r"begin_step: x \[3, 4\] .* do not fit 4 rows"):
        GpuStep(x, table, table, spans_of((0, 4)))
    with pytest.raises(ShapeError, match=r"\[1, 3, 2\], \[1, 3, 1\] do not fit 3 rows"):
        GpuStep(x, table, table[..., :1], spans)
    for start in (-1, 62):
        with pytest.raises(ShapeError, match=rf"span 0: positions {start} to {start + 3} lie outside its 1 pages"):
            GpuStep(x, table, table, [RowSpan(3, start, spans[0].pages)])
    with pytest.raises(ShapeError, match="sin must be contiguous float32"):
        GpuStep(x, table, table.double(), spans)
    with pytest.raises(ShapeError, match="cos must be contiguous float32"):
        GpuStep(x, torch.zeros(1, 3, 4, device=DEVICE)[..., ::2], table, spans)


def test_pages_of_another_shape_in_one_step_are_refused() -> None:
    other = RowSpan(1, 0, nan_pages(new_pool(1, 8), 1))
    with pytest.raises(ShapeError, match="the pages of the spans differ"):
        step_of([*spans_of((0, 1)), other])
