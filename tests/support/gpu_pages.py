"""What the tests of the GPU backend share about pages: sequences with keys and values, and NaN wherever none are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_support import DEVICE, normal
from ropewalk.backends.gpu.pages import GpuPage, GpuPagePool
from ropewalk.backends.gpu.step import GpuStep
from ropewalk.backends.protocol import PAGE_TOKENS, RowSpan
from ropewalk.config.cache_format import CacheFormat

NAN = float("nan")
INSTANCES, INSTANCE = 2, 1  # layer instances of a page, and the one that the tests use


def new_pool(num_kv_heads: int, head_dim: int, cache_type: str = "fp16", num_bytes: int = 1 << 30) -> GpuPagePool:
    return GpuPagePool(num_kv_heads, head_dim, CacheFormat.parse(cache_type), num_bytes, DEVICE)


def nan_pages(pool: GpuPagePool, num_positions: int, recent: bool = False) -> tuple[GpuPage, ...]:
    """Pages for that many positions, with NaN, as floats and as scales of codes, where nothing was written."""
    pages = tuple(pool.take(INSTANCES, recent) for _ in range(-(-num_positions // PAGE_TOKENS)))
    for page in pages:
        page.memory.fill_(255)
    return pages


def num_written(pages: Sequence[GpuPage]) -> int:
    """Numbers of pages of floats that are not as `nan_pages` left them."""
    return sum(int((~part.isnan()).sum()) for page in pages for part in (page.keys, page.values))


@dataclass(frozen=True)
class Cached:
    """A sequence whose pages hold keys, values: [Hkv, end, D] as INSTANCE; its rows are at start..end."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor
    pages: tuple[GpuPage, ...]

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1] - self.start

    def span(self, first: int = 0, end: int | None = None) -> RowSpan:
        """Some of its rows."""
        return RowSpan((self.num_rows if end is None else end) - first, self.start + first, self.pages)


def cached(pool: GpuPagePool, start: int, num_rows: int, seed: int = 0, room: int = 0) -> Cached:
    """A sequence of random keys and values. room: positions that its pages have beyond, with NaN."""
    _, heads, _, head_dim = pool.take(1).keys.shape
    end, dtype = start + num_rows, pool.take(1).keys.dtype
    keys, values = (normal(heads, end, head_dim, seed=2 * seed + i).to(DEVICE, dtype) for i in (0, 1))
    pages = nan_pages(pool, end + room)
    for index, page in enumerate(pages):
        here = slice(index * PAGE_TOKENS, min(end, (index + 1) * PAGE_TOKENS))
        num = max(0, here.stop - here.start)
        page.keys[INSTANCE, :, :num] = keys[:, here]
        page.values[INSTANCE, :, :num] = values[:, here]
    return Cached(start, keys, values, pages)


def step_of(spans: Sequence[RowSpan], cos: torch.Tensor | None = None, sin: torch.Tensor | None = None) -> GpuStep:
    """A step for operations that do not look at the residual stream. cos, sin: [T, R/2], or more of them."""
    num_rows = sum(span.num_rows for span in spans)
    x = torch.zeros(num_rows, 1, device=DEVICE)
    empty = torch.zeros(1, num_rows, 0, device=DEVICE)
    tables = [empty if table is None else table if table.ndim == 3 else table[None] for table in (cos, sin)]
    return GpuStep(x, *tables, spans)
