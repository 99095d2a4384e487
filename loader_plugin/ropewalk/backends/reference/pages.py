"""Pages of keys and values as torch tensors, and the pool that counts them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.protocol import PAGE_TOKENS, RowSpan
from ropewalk.backends.reference.attention import rotate_
from ropewalk.backends.reference.codes import decode, encode, hadamard, pack, padded_dim, unpack
from ropewalk.backends.shared import PageCount
from ropewalk.base.errors import ShapeError
from ropewalk.config.cache_format import BLOCK, CODE_BITS, CacheFormat, is_rotated

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, eq=False)
class FloatRows:
    """Rows of heads as they are. stored: [instances, Hkv, PAGE_TOKENS, D] float16 or float32."""

    stored: torch.Tensor

    def write_(self, instance: int, first: int, rows: torch.Tensor) -> None:
        """rows: [Hkv, T, D] float32, at places first.. of the page."""
        self.stored[instance, :, first : first + rows.shape[1]] = rows

    def read(self, instance: int) -> torch.Tensor:
        """[Hkv, PAGE_TOKENS, D] float32."""
        return self.stored[instance].float()

    def take_over_(self, place: int, rows: FloatRows, from_place: int, instances: slice) -> None:
        """One place of another page, of some instances, as it is."""
        self.stored[instances, :, place] = rows.stored[instances, :, from_place].clone()


@dataclass(frozen=True, slots=True, eq=False)
class CodeRows:
    """Rows of heads in codes. packed: [instances, Hkv, PAGE_TOKENS, P * bits / 8] uint8; scales: P/32 float16 a row."""

    packed: torch.Tensor
    scales: torch.Tensor
    kind: str
    head_dim: int

    def write_(self, instance: int, first: int, rows: torch.Tensor) -> None:
        """rows: [Hkv, T, D] float32, at places first.. of the page."""
        bits, places = CODE_BITS[self.kind], slice(first, first + rows.shape[1])
        codes, scales = encode(hadamard(rows) if is_rotated(self.kind) else rows, bits)
        self.packed[instance, :, places] = pack(codes, bits)
        self.scales[instance, :, places] = scales

    def read(self, instance: int) -> torch.Tensor:
        """[Hkv, PAGE_TOKENS, D] float32."""
        bits = CODE_BITS[self.kind]
        rows = decode(unpack(self.packed[instance], bits), self.scales[instance], bits, self.head_dim)
        return hadamard(rows) if is_rotated(self.kind) else rows

    def take_over_(self, place: int, rows: CodeRows, from_place: int, instances: slice) -> None:
        """One place of another page, of some instances, as it is."""
        self.packed[instances, :, place] = rows.packed[instances, :, from_place].clone()
        self.scales[instances, :, place] = rows.scales[instances, :, from_place].clone()


class ReferencePage:
    """Keys and values of PAGE_TOKENS positions in one piece of memory. memory: [bytes] uint8."""

    def __init__(self, pool: ReferencePool, memory: torch.Tensor, cache_format: CacheFormat, shape: Shape) -> None:
        self.memory = memory
        self.num_instances = shape[0]
        self.pool = pool
        middle = memory.numel() - _num_bytes(cache_format.values, shape)
        self.keys = _rows(memory[:middle], cache_format.keys, shape)
        self.values = _rows(memory[middle:], cache_format.values, shape)

    def __del__(self) -> None:
        self.pool.give_back(self.memory.numel())


Shape = tuple[int, int, int]  # layer instances, Hkv, D


class ReferencePool:
    """Counts the bytes of its pages; torch provides the memory."""

    def __init__(
        self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int, device: torch.device
    ) -> None:
        self.num_bytes = num_bytes
        self.cache_format = cache_format
        self._count = PageCount(num_bytes)
        self.heads = num_kv_heads, head_dim
        self._device = device

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use."""
        return self._count.used_bytes

    @property
    def layout(self) -> str:
        """What the bytes of a page mean."""
        return f"reference-1 {self.cache_format} heads={self.heads[0]} dim={self.heads[1]}"

    def page_bytes(self, num_instances: int, recent: bool = False) -> int:
        """Memory of a page for that many layer instances."""
        kind, shape = self._kind(recent), (num_instances, *self.heads)
        return _num_bytes(kind.keys, shape) + _num_bytes(kind.values, shape)

    def take(self, num_instances: int, recent: bool = False) -> ReferencePage:
        """A page whose keys and values are not initialised."""
        size = self.page_bytes(num_instances, recent)
        self._count.take_(size)
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as a RuntimeError
            self.give_back(size)
            raise MemoryError(f"a page of {size} bytes could not be allocated") from error
        return ReferencePage(self, memory, self._kind(recent), (num_instances, *self.heads))

    def copy(self, page: ReferencePage) -> ReferencePage:
        """Another page with the same keys and values."""
        recent = page.memory.numel() != self.page_bytes(page.num_instances)
        made = self.take(page.num_instances, recent)
        made.memory.copy_(page.memory)
        return made

    def parts_of(self, page: ReferencePage) -> list[torch.Tensor]:
        """The memory of a page, in one part."""
        return [page.memory]

    def written_(self, page: ReferencePage, parts: list[torch.Tensor]) -> None:
        """They are the memory itself."""

    def give_back(self, num_bytes: int) -> None:
        """Count a page as free."""
        self._count.give_back_(num_bytes)

    def _kind(self, recent: bool) -> CacheFormat:
        return self.cache_format.exact if recent else self.cache_format


def append_(pages: Sequence[ReferencePage], instance: int, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
    """k, v: [T, Hkv, D] float32, written to positions start..start+T in the format of the pages."""
    num_rows, heads = k.shape[0], pages[0].pool.heads
    if k.shape != v.shape or k.shape[1:] != heads or start < 0 or start + num_rows > PAGE_TOKENS * len(pages):
        raise ShapeError(
            f"append: k {list(k.shape)}, v {list(v.shape)} at {start} do not fit {len(pages)} pages of {PAGE_TOKENS} "
            f"positions, {heads[0]} heads of {heads[1]}"
        )
    for index, place, rows in pieces(start, num_rows):
        pages[index].keys.write_(instance, place, k[rows].transpose(0, 1))  # [Hkv, rows, D]
        pages[index].values.write_(instance, place, v[rows].transpose(0, 1))  # [Hkv, rows, D]


def gathered(pages: Sequence[ReferencePage], instance: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions 0..end of one layer instance: [Hkv, end, D] float32 each."""
    used = pages[: num_pages(end)]
    keys = torch.cat([page.keys.read(instance) for page in used], dim=1)[:, :end]  # [Hkv, end, D]
    values = torch.cat([page.values.read(instance) for page in used], dim=1)[:, :end]  # [Hkv, end, D]
    return keys, values


def as_seen(span: RowSpan) -> Iterator[tuple[slice, tuple[ReferencePage, ...]]]:
    """(rows of the span, the pages that they read): those that read the same pages in float16 together."""
    cache_format = span.pages[0].pool.cache_format
    if not cache_format.recent:
        yield slice(0, span.num_rows), span.pages
        return
    first = 0
    while first < span.num_rows:
        exact = cache_format.first_exact_page(span.start + first)
        end = first + 1
        while end < span.num_rows and cache_format.first_exact_page(span.start + end) == exact:
            end += 1
        recent = span.recent[exact : num_pages(span.start + end)]
        if len(recent) != num_pages(span.start + end) - exact or None in recent:
            raise ShapeError(f"attend: position {span.start + first} reads pages from {exact} on in float16, not given")
        yield slice(first, end), (*span.pages[:exact], *recent)
        first = end


def num_pages(length: int) -> int:
    """The pages that `length` positions take."""
    return -(-length // PAGE_TOKENS)


def move_rows_(
    source: Sequence[ReferencePage],
    source_start: int,
    target: Sequence[ReferencePage],
    target_start: int,
    num_rows: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotations: Sequence[int | None],
) -> None:
    """Positions source_start.. of `source` to target_start.. of `target`, keys turned by tables of cos, sin."""
    for row in range(num_rows):  # one by one: a page may be read and written, at lower places than it is read
        from_page, from_place = divmod(source_start + row, PAGE_TOKENS)
        to_page, to_place = divmod(target_start + row, PAGE_TOKENS)
        read, written = source[from_page], target[to_page]
        for instance, rotation in enumerate(rotations):
            if rotation is None:
                written.keys.take_over_(to_place, read.keys, from_place, slice(instance, instance + 1))
                continue
            key = read.keys.read(instance)[:, from_place].clone()[None]  # [1, Hkv, D]
            rotate_(key, cos[rotation, row, None], sin[rotation, row, None])
            written.keys.write_(instance, to_place, key.transpose(0, 1))  # [Hkv, 1, D]
        written.values.take_over_(to_place, read.values, from_place, slice(None))


def pieces(start: int, num_rows: int) -> list[tuple[int, int, slice]]:
    """(page, first place in it, rows) for rows at positions start.. that lie in one page each."""
    found, row = [], 0
    while row < num_rows:
        index, place = divmod(start + row, PAGE_TOKENS)
        end = min(row + PAGE_TOKENS - place, num_rows)
        found.append((index, place, slice(row, end)))
        row = end
    return found


def _num_bytes(kind: str, shape: Shape) -> int:
    num_rows, head_dim = shape[0] * shape[1] * PAGE_TOKENS, shape[2]
    if kind in DTYPES:
        return num_rows * head_dim * DTYPES[kind].itemsize
    padded = padded_dim(head_dim)
    return num_rows * (padded * CODE_BITS[kind] // 8 + padded // BLOCK * torch.float16.itemsize)


def _rows(memory: torch.Tensor, kind: str, shape: Shape) -> FloatRows | CodeRows:
    num_instances, num_heads, head_dim = shape
    page = (num_instances, num_heads, PAGE_TOKENS)
    if kind in DTYPES:
        return FloatRows(memory.view(DTYPES[kind]).view(*page, head_dim))
    padded = padded_dim(head_dim)
    middle = math.prod(page) * padded * CODE_BITS[kind] // 8
    scales = memory[middle:].view(torch.float16).view(*page, padded // BLOCK)
    return CodeRows(memory[:middle].view(*page, -1), scales, kind, head_dim)
