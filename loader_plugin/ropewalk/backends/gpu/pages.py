"""Pages of keys and values on the device, and the pool that counts them.

One page is one allocation: [instances, 2, Hkv, PAGE_TOKENS, D], keys before values, so that its address and an
instance say where everything is:

    page ---> instance 0: keys   [Hkv, 64, D]
                          values [Hkv, 64, D]
              instance 1: keys   ...
"""

from __future__ import annotations

import torch

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.backends.shared import PageCount
from ropewalk.base.memory import available_bytes, format_bytes


class GpuPage:
    """tensor: [instances, 2, Hkv, PAGE_TOKENS, D] float16 or float32, row-major. address: of its first byte."""

    __slots__ = ("_pool", "address", "tensor")

    def __init__(self, pool: GpuPagePool, tensor: torch.Tensor) -> None:
        self._pool = pool
        self.tensor = tensor
        self.address = tensor.data_ptr()

    @property
    def keys(self) -> torch.Tensor:
        """[instances, Hkv, PAGE_TOKENS, D]."""
        return self.tensor[:, 0]

    @property
    def values(self) -> torch.Tensor:
        """[instances, Hkv, PAGE_TOKENS, D]."""
        return self.tensor[:, 1]

    def __del__(self) -> None:
        self._pool.give_back(self.tensor.shape[0])


class GpuPagePool:
    """Counts the bytes of its pages; torch provides the memory and keeps what was freed for the next page."""

    def __init__(
        self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_bytes: int, device: torch.device
    ) -> None:
        self.num_bytes = num_bytes
        self._count = PageCount(num_bytes)
        self._shape = (2, num_kv_heads, PAGE_TOKENS, head_dim)
        self._dtype = dtype
        self._device = device

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use."""
        return self._count.used_bytes

    def page_bytes(self, num_instances: int) -> int:
        """Memory of a page for that many layer instances."""
        pair, num_kv_heads, num_positions, head_dim = self._shape
        return pair * num_instances * num_kv_heads * num_positions * head_dim * self._dtype.itemsize

    def take(self, num_instances: int) -> GpuPage:
        """A page whose keys and values are not initialised."""
        size = self.page_bytes(num_instances)
        self._count.take_(size)
        try:
            tensor = torch.empty((num_instances, *self._shape), dtype=self._dtype, device=self._device)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self.give_back(num_instances)
            raise MemoryError(self._refused(size)) from error
        return GpuPage(self, tensor)

    def copy(self, page: GpuPage) -> GpuPage:
        """Another page with the same keys and values."""
        made = self.take(page.tensor.shape[0])
        made.tensor.copy_(page.tensor)
        return made

    def give_back(self, num_instances: int) -> None:
        """Count a page of that many layer instances as free."""
        self._count.give_back_(self.page_bytes(num_instances))

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
