"""Pages of keys and values as torch tensors, and the pool that counts them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.backends.shared import PageCount
from ropewalk.base.errors import ShapeError


class ReferencePage:
    """keys, values: [instances, Hkv, PAGE_TOKENS, D] float16 or float32, row-major."""

    def __init__(self, pool: ReferencePool, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values
        self._pool = pool

    def __del__(self) -> None:
        self._pool.give_back(self.keys.shape[0])


class ReferencePool:
    """Counts the bytes of its pages; torch provides the memory."""

    def __init__(
        self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_bytes: int, device: torch.device
    ) -> None:
        self.num_bytes = num_bytes
        self._count = PageCount(num_bytes)
        self._shape = (num_kv_heads, PAGE_TOKENS, head_dim)
        self._dtype = dtype
        self._device = device

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use."""
        return self._count.used_bytes

    def page_bytes(self, num_instances: int) -> int:
        """Memory of a page for that many layer instances."""
        num_kv_heads, num_positions, head_dim = self._shape
        return 2 * num_instances * num_kv_heads * num_positions * head_dim * self._dtype.itemsize

    def take(self, num_instances: int) -> ReferencePage:
        """A page whose keys and values are not initialised."""
        size = self.page_bytes(num_instances)
        self._count.take_(size)
        try:
            shape = (2, num_instances, *self._shape)
            keys, values = torch.empty(shape, dtype=self._dtype, device=self._device)
        except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as a RuntimeError
            self.give_back(num_instances)
            raise MemoryError(f"a page of {size} bytes could not be allocated") from error
        return ReferencePage(self, keys, values)

    def copy(self, page: ReferencePage) -> ReferencePage:
        """Another page with the same keys and values."""
        made = self.take(page.keys.shape[0])
        made.keys.copy_(page.keys)
        made.values.copy_(page.values)
        return made

    @property
    def layout(self) -> str:
        """A name for the bytes of a page."""
        num_kv_heads, _, head_dim = self._shape
        return f"reference-1 {self._dtype} heads={num_kv_heads} dim={head_dim}"

    def parts_of(self, page: ReferencePage) -> list[torch.Tensor]:
        """The memory of a page."""
        return [torch.as_strided(page.keys, (2 * page.keys.numel(),), (1,)).view(torch.uint8)]

    def give_back(self, num_instances: int) -> None:
        """Count a page of that many layer instances as free."""
        self._count.give_back_(self.page_bytes(num_instances))


def append_(pages: Sequence[ReferencePage], instance: int, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
    """k, v: [T, Hkv, D] float32, written to positions start..start+T and rounded to the dtype of the pages."""
    num_rows = k.shape[0]
    shape = pages[0].keys.shape[1], pages[0].keys.shape[3]
    if k.shape != v.shape or k.shape[1:] != shape or start < 0 or start + num_rows > PAGE_TOKENS * len(pages):
        raise ShapeError(
            f"append: k {list(k.shape)}, v {list(v.shape)} at {start} do not fit {len(pages)} pages of {PAGE_TOKENS} "
            f"positions, {shape[0]} heads of {shape[1]}"
        )
    row = 0
    while row < num_rows:
        index, first = divmod(start + row, PAGE_TOKENS)
        end = min(PAGE_TOKENS, first + num_rows - row)
        rows = slice(row, row + end - first)
        pages[index].keys[instance, :, first:end] = k[rows].transpose(0, 1)  # [Hkv, rows, D]
        pages[index].values[instance, :, first:end] = v[rows].transpose(0, 1)  # [Hkv, rows, D]
        row += end - first


def gathered(pages: Sequence[ReferencePage], instance: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions 0..end of one layer instance: [Hkv, end, D] each."""
    used = pages[: -(-end // PAGE_TOKENS)]
    keys = torch.cat([page.keys[instance] for page in used], dim=1)[:, :end]  # [Hkv, end, D]
    values = torch.cat([page.values[instance] for page in used], dim=1)[:, :end]  # [Hkv, end, D]
    return keys, values
