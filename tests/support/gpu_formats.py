"""What tests of cache formats on the GPU backend share: sequences in pages of a format, and what pages hold.

Bytes of pages are written and read here as layout.py and formats_kernel.py describe them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_pages import INSTANCE, nan_pages
from gpu_support import DEVICE, normal
from ropewalk.backends.gpu.pages import GpuPage, GpuPagePool
from ropewalk.backends.protocol import PAGE_TOKENS, RowSpan
from ropewalk.backends.reference import codes as reference
from ropewalk.config.cache_format import CODE_BITS, is_rotated


@dataclass(frozen=True)
class Appended:
    """k, v: [end, Hkv, D] float32, all of them in `pages` and `recent` as INSTANCE; rows of steps are at start..end."""

    start: int
    k: torch.Tensor
    v: torch.Tensor
    pages: tuple[GpuPage, ...]
    recent: tuple[GpuPage, ...]

    @property
    def num_rows(self) -> int:
        return len(self.k) - self.start

    def span(self, first: int = 0, end: int | None = None) -> RowSpan:
        """Some of its rows; recent pages as a cache holds them."""
        start = self.start + first
        recent: tuple[GpuPage | None, ...] = ()
        if self.recent:
            exact = self.pages[0].layout.cache_format.first_exact_page(start)
            recent = (*[None] * exact, *self.recent[exact:])
        return RowSpan((self.num_rows if end is None else end) - first, start, self.pages, recent)


def sequence(pool: GpuPagePool, start: int, num_rows: int, seed: int = 0, room: int = 70) -> Appended:
    """Random keys and values written as the reference backend rounds them, and NaN in what the pages have beyond."""
    layout = pool.take(1).layout
    end = start + num_rows
    k, v = (normal(end, layout.num_kv_heads, layout.head_dim, seed=2 * seed + i).to(DEVICE) for i in (0, 1))
    k[:, :, 0] *= 20  # a dimension that stands out, as those of keys do
    pages = nan_pages(pool, end + room)
    recent = nan_pages(pool, end + room, recent=True) if layout.cache_format.recent else ()
    for held in (pages, recent):
        for number, page in enumerate(held):
            here = slice(number * PAGE_TOKENS, min(end, (number + 1) * PAGE_TOKENS))
            if here.start < end:
                write_(page.keys, page.layout.cache_format.keys, k[here])
                write_(page.values, page.layout.cache_format.values, v[here])
    return Appended(start, k, v, pages, recent)


def write_(part: torch.Tensor, kind: str, rows: torch.Tensor) -> None:
    """rows: [T, Hkv, D] float32 to the first places of keys or values of a page; a launch would take too long."""
    rows = rows.transpose(0, 1)  # [Hkv, T, D]
    if kind not in CODE_BITS:
        part[INSTANCE, :, : rows.shape[1]] = rows
        return
    bits, padded, end = CODE_BITS[kind], reference.padded_dim(rows.shape[2]), rows.shape[1]
    codes, scales = reference.encode(reference.hadamard(rows) if is_rotated(kind) else rows, bits)
    pieces = [scales.contiguous().view(torch.uint8)]  # [Hkv, T, bytes] each
    if bits == 8:
        pieces.insert(0, codes)
    else:
        pairs = (codes & 15).unflatten(2, (-1, 2))  # [Hkv, T, P/2, 2]
        pieces.insert(0, pairs[..., 0] | pairs[..., 1] << 4)
    if bits == 6:
        fours = (codes >> 4).unflatten(2, (-1, 4))  # [Hkv, T, P/4, 4]
        pieces.insert(1, sum(fours[..., i] << 2 * i for i in range(4)))
    first = 0
    for piece in pieces:
        width = piece.shape[2]
        place = part[INSTANCE, :, first : first + PAGE_TOKENS * width].unflatten(1, (PAGE_TOKENS, width))
        place[:, :end] = piece
        first += PAGE_TOKENS * width
    assert first == part.shape[2] == PAGE_TOKENS * (padded * bits // 8 + padded // 16)


def head_rows(memory: torch.Tensor, kind: str, head_dim: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One head of one page: [64, D] floats, or codes [64, P] uint8 and scales [64, P/32] float16. memory: its bytes."""
    if kind not in CODE_BITS:
        return memory.view(torch.float16 if kind == "fp16" else torch.float32).view(PAGE_TOKENS, head_dim)
    bits, padded = CODE_BITS[kind], reference.padded_dim(head_dim)
    scales = memory[PAGE_TOKENS * padded * bits // 8 :].view(torch.float16).view(PAGE_TOKENS, -1)
    if bits == 8:
        return memory[: PAGE_TOKENS * padded].view(PAGE_TOKENS, padded), scales
    first = memory[: PAGE_TOKENS * padded // 2].view(PAGE_TOKENS, -1)  # two dims a byte, the first one lower
    codes = torch.stack([first & 15, first >> 4], dim=-1).flatten(1)  # [64, P]
    if bits == 6:
        high = memory[PAGE_TOKENS * padded // 2 :][: PAGE_TOKENS * padded // 4].view(PAGE_TOKENS, -1)
        codes = codes | torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1) << 4
    return codes, scales


def as_read(pages: Sequence[GpuPage], name: str, end: int) -> torch.Tensor:
    """What positions 0..end of INSTANCE are: [Hkv, end, D] float32. name: "keys" or "values"."""
    found, kind = as_held(pages, name, end), getattr(pages[0].layout.cache_format, name)
    return reference.hadamard(found) if is_rotated(kind) else found


def as_held(pages: Sequence[GpuPage], name: str, end: int) -> torch.Tensor:
    """As `as_read`, in formats that rotate heads as these are rotated."""
    layout = pages[0].layout
    kind = getattr(layout.cache_format, name)
    found = []
    for head in range(layout.num_kv_heads):
        rows = []
        for page in pages:
            part = getattr(page, name)[INSTANCE, head].contiguous()
            held = head_rows(part.flatten().view(torch.uint8).cpu(), kind, layout.head_dim)
            rows.append(
                reference.decode(*held, CODE_BITS[kind], layout.head_dim) if kind in CODE_BITS else held.float()
            )
        found.append(torch.cat(rows)[:end])
    return torch.stack(found)
