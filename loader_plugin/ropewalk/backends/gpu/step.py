"""The rows of a step, with everything that kernels need to know of them in one tensor on the device.

    numbers: pages [spans, width] | recent [spans, width] | positions [T] | spans [T] | short, long blocks [., 3]

All are int64; `recent` is there in formats with a recent window alone. Kernels read positions and page addresses from
there, so a captured step is replayed for other tokens by copying the numbers of a step of the same layout over those of
the captured one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ropewalk.backends.gpu.layout import PageLayout
from ropewalk.backends.protocol import PAGE_TOKENS, RowSpan
from ropewalk.backends.shared import check_step
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import CacheFormat

SHORT_ROWS = 16  # spans of up to so many rows have their keys split among programs
LONG_ROWS = 128  # rows of a longer span that one block has: the most that a tile of attention takes
CHUNK_PAGES = 8  # the table is wide enough for whole chunks of 512 keys, see attention_kernel.py


@dataclass(frozen=True, slots=True, eq=False)
class RowBlocks:
    """Rows that attend together. table: [num_blocks, 3] int64 (span, first row of the step, number of rows).

    most_rows: of one block; end: the last position of all, plus 1, or more.
    """

    table: torch.Tensor
    most_rows: int
    end: int

    @property
    def num_blocks(self) -> int:
        """Blocks in the table."""
        return self.table.shape[0]


class GpuStep:
    """Rows of several sequences on their way through the layers.

    x: [T, C] float32; cos, sin: [tables, T, R/2] float32. pages: [spans, width] int64 addresses; recent: of the same
    pages in float16, None in a format without a recent window; positions, span_of_row: [T] int64. layout: of the pages.
    short, long: blocks of spans of up to SHORT_ROWS rows and of longer ones.
    """

    def __init__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> None:
        _check(x, cos, sin, spans)
        self.x, self.cos, self.sin = x, cos, sin
        self.spans = tuple(spans)
        ends = [span.start + span.num_rows for span in spans]
        width = CHUNK_PAGES * max((-(-end // (CHUNK_PAGES * PAGE_TOKENS)) for end in ends), default=0)
        self.layout, self.num_instances = _page_layout(spans)
        tables = [_addresses(spans, width)]
        if self.layout.cache_format.recent:
            tables.append(_recent_addresses(spans, width, self.layout.cache_format))
        short, long = _blocks(spans)
        parts = [*tables, *_rows(spans), short, long]
        self.numbers = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(x.device)
        *pages, self.positions, self.span_of_row, short_table, long_table = torch.split(
            self.numbers, [part.size for part in parts]
        )
        self.pages, self.recent = (*(table.view(len(spans), width) for table in pages), None)[:2]  # [spans, width]
        end = width * PAGE_TOKENS
        self.short = RowBlocks(short_table.view(-1, 3), int(short[:, 2].max(initial=0)), end)
        self.long = RowBlocks(long_table.view(-1, 3), int(long[:, 2].max(initial=0)), end)

    @property
    def num_rows(self) -> int:
        """T."""
        return self.x.shape[0]


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> None:
    check_step(x, cos, sin, spans)
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device != x.device:
            raise ShapeError(
                f"begin_step: {name} must be contiguous float32 on {x.device}, got {tensor.dtype} with strides "
                f"{list(tensor.stride())} on {tensor.device}"
            )


def _page_layout(spans: Sequence[RowSpan]) -> tuple[PageLayout, int]:
    """The layout of the pages, and how many instances each has. Those of a span are alike."""
    first = [span.pages[0] for span in spans if span.pages]
    layouts = {page.layout for page in first}
    if len(layouts) > 1:
        raise ShapeError(f"begin_step: the pages of the spans differ: {sorted(map(str, layouts))}")
    if not layouts:
        return PageLayout(1, 1, CacheFormat("fp16", "fp16")), 0
    return layouts.pop(), min(page.num_instances for page in first)


def _addresses(spans: Sequence[RowSpan], width: int) -> np.ndarray:
    """[spans, width]; 0 where a span has no such page."""
    table = np.zeros((len(spans), width), np.int64)
    for index, span in enumerate(spans):
        num_pages = -(-(span.start + span.num_rows) // PAGE_TOKENS)
        table[index, :num_pages] = [page.address for page in span.pages[:num_pages]]
    return table


def _recent_addresses(spans: Sequence[RowSpan], width: int, cache_format: CacheFormat) -> np.ndarray:
    """[spans, width]; of the pages that some row of a span reads in float16, and 0 elsewhere."""
    table = np.zeros((len(spans), width), np.int64)
    for index, span in enumerate(spans):
        if not span.num_rows:
            continue
        first, end = cache_format.first_exact_page(span.start), -(-(span.start + span.num_rows) // PAGE_TOKENS)
        pages = span.recent[first:end]
        if len(pages) < end - first or None in pages:
            raise ShapeError(
                f"begin_step: span {index} reads pages {first} to {end} in float16, and not all of them are given"
            )
        table[index, first:end] = [page.address for page in pages]
    return table


def _rows(spans: Sequence[RowSpan]) -> tuple[np.ndarray, np.ndarray]:
    """Position and span of every row, [T] each."""
    lengths = [span.num_rows for span in spans]
    ranges = [np.arange(span.start, span.start + span.num_rows) for span in spans]
    return np.concatenate([np.zeros(0, np.int64), *ranges]), np.repeat(np.arange(len(spans)), lengths)


def _blocks(spans: Sequence[RowSpan]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of short and of long spans, [., 3] each; of the long ones, those with most keys come first."""
    short: list[tuple[int, int, int]] = []
    long: list[tuple[int, int, int, int]] = []
    row = 0
    for index, span in enumerate(spans):
        if 0 < span.num_rows <= SHORT_ROWS:
            short.append((index, row, span.num_rows))
        else:
            for first in range(0, span.num_rows, LONG_ROWS):
                num_rows = min(LONG_ROWS, span.num_rows - first)
                long.append((-(span.start + first + num_rows), index, row + first, num_rows))
        row += span.num_rows
    blocks = [block[1:] for block in sorted(long)]
    return np.array(short, np.int64).reshape(-1, 3), np.array(blocks, np.int64).reshape(-1, 3)
