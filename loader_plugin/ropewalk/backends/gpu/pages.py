"""Pages of keys and values on the device, and the pool that counts them.

One page is one allocation; what lies where is in layout.py.
"""

from __future__ import annotations

import torch

from ropewalk.backends.gpu.layout import DTYPES, PageLayout
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.backends.shared import PageCount
from ropewalk.base.memory import available_bytes, format_bytes
from ropewalk.config.cache_format import CacheFormat


class GpuPage:
    """memory: [instances, bytes of an instance] uint8. address: of its first byte."""

    __slots__ = ("_pool", "address", "layout", "memory")

    def __init__(self, pool: GpuPagePool, layout: PageLayout, memory: torch.Tensor) -> None:
        self._pool = pool
        self.layout = layout
        self.memory = memory
        self.address = memory.data_ptr()

    @property
    def num_instances(self) -> int:
        """Layer instances whose keys and values the page has."""
        return self.memory.shape[0]

    @property
    def keys(self) -> torch.Tensor:
        """[instances, Hkv, PAGE_TOKENS, D] floats, or [instances, Hkv, bytes of a head] uint8 in codes."""
        constants = self.layout.constants
        end = constants["HKV"] * constants["K_BYTES"]
        return self._part(self.memory[:, :end], self.layout.cache_format.keys)

    @property
    def values(self) -> torch.Tensor:
        """As `keys`."""
        constants = self.layout.constants
        start = constants["HKV"] * constants["K_BYTES"]
        return self._part(self.memory[:, start:], self.layout.cache_format.values)

    def _part(self, memory: torch.Tensor, kind: str) -> torch.Tensor:
        heads, head_dim = self.layout.num_kv_heads, self.layout.head_dim
        if kind not in DTYPES:
            return memory.unflatten(1, (heads, -1))  # [instances, Hkv, bytes]
        return memory.view(DTYPES[kind]).unflatten(1, (heads, PAGE_TOKENS, head_dim))  # [instances, Hkv, 64, D]

    def __del__(self) -> None:
        self._pool.give_back(self.memory.numel())


class GpuPagePool:
    """Counts the bytes of its pages, of both kinds; torch provides the memory and keeps what was freed for the next."""

    def __init__(
        self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int, device: torch.device
    ) -> None:
        self.num_bytes = num_bytes
        self._count = PageCount(num_bytes)
        self._layout = PageLayout(num_kv_heads, head_dim, cache_format)
        self._device = device

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use."""
        return self._count.used_bytes

    @property
    def layout(self) -> str:
        """What the bytes of a page mean."""
        return f"gpu-1 {self._layout}"

    def page_bytes(self, num_instances: int, recent: bool = False) -> int:
        """Memory of a page for that many layer instances."""
        return num_instances * self._kind(recent).instance_bytes

    def take(self, num_instances: int, recent: bool = False) -> GpuPage:
        """A page whose keys and values are not initialised."""
        return self._take(num_instances, self._kind(recent))

    def copy(self, page: GpuPage) -> GpuPage:
        """Another page with the same keys and values."""
        made = self._take(page.num_instances, page.layout)
        made.memory.copy_(page.memory)
        return made

    def parts_of(self, page: GpuPage) -> list[torch.Tensor]:
        """The memory of a page, in one part."""
        return [page.memory.view(-1)]

    def written_(self, page: GpuPage, parts: list[torch.Tensor]) -> None:
        """They are the memory itself."""

    def give_back(self, num_bytes: int) -> None:
        """Count a page as free."""
        self._count.give_back_(num_bytes)

    def _kind(self, recent: bool) -> PageLayout:
        return self._layout.exact if recent else self._layout

    def _take(self, num_instances: int, layout: PageLayout) -> GpuPage:
        size = num_instances * layout.instance_bytes
        self._count.take_(size)
        try:
            memory = torch.empty((num_instances, layout.instance_bytes), dtype=torch.uint8, device=self._device)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self.give_back(size)
            raise MemoryError(self._refused(size)) from error
        return GpuPage(self, layout, memory)

    def _refused(self, size: int) -> str:
        free = free_bytes(self._device)
        left = "" if free is None else f"; {format_bytes(free)} are free"
        return (
            f"a page of {size} bytes ({format_bytes(size)}) could not be allocated on {self._device}{left}, and pages "
            f"hold {format_bytes(self.used_bytes)} of at most {format_bytes(self.num_bytes)}: ask for a smaller "
            "cache_memory or max_seq_len"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that nobody uses; None where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
