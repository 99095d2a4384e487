"""Pages in parts: rank 0 has the keys and values of its own instances, and a number for what the other ranks have."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from ropewalk.backends.pipeline.chain import Chain
from ropewalk.backends.pipeline.messages import Read, Write
from ropewalk.backends.pipeline.shares import Shares
from ropewalk.backends.protocol import Page, PagePool
from ropewalk.backends.shared import PageCount
from ropewalk.config.cache_format import CacheFormat


class PipelinePage:
    """number: by which the other ranks know it. local: the part of rank 0; None where it runs no instance."""

    __slots__ = ("__weakref__", "_size", "local", "num_instances", "number", "pool", "recent")

    def __init__(
        self, pool: PipelinePool, number: int, local: Page | None, num_instances: int, recent: bool, size: int
    ) -> None:
        self.pool, self.number, self.local = pool, number, local
        self.num_instances, self.recent, self._size = num_instances, recent, size

    def __del__(self) -> None:
        self.pool.drop_(self.number, self._size)


class PipelinePool:
    """Counts the bytes of its pages on all ranks; nothing waits for another rank but reading a page's memory.

    local: for the parts of rank 0. heads: Hkv, D. layout: what the parts mean, one rank's after the other's.
    """

    def __init__(
        self,
        chain: Chain,
        shares: Shares,
        local: PagePool,
        heads: tuple[int, int],
        cache_format: CacheFormat,
        num_bytes: int,
        layout: str,
    ) -> None:
        self.num_bytes, self.layout = num_bytes, layout
        self._chain, self._shares, self._local = chain, shares, local
        self._described = (*heads, str(cache_format))
        self._count = PageCount(num_bytes)
        self._number: int | None = None  # once a page has been taken: pools without pages are made to ask for sizes

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use, on all ranks."""
        return self._count.used_bytes

    def page_bytes(self, num_instances: int, recent: bool = False) -> int:
        """Memory of a page, on all ranks."""
        return self._local.page_bytes(num_instances, recent)

    def take(self, num_instances: int, recent: bool = False) -> PipelinePage:
        """A page whose parts the other ranks take before the next step."""

        def made() -> tuple[Page | None, int]:
            mine = self._shares.counts(num_instances)[0]
            local = self._local.take(mine, recent) if mine else None
            number = self._chain.new_number()
            self._chain.change_("take", number, self._known(), num_instances, int(recent))
            return local, number

        return self._counted(made, num_instances, recent)

    def copy(self, page: PipelinePage) -> PipelinePage:
        """Each rank copies its part, before the next step."""

        def made() -> tuple[Page | None, int]:
            local = None if page.local is None else self._local.copy(page.local)
            number = self._chain.new_number()
            self._chain.change_("copy", number, page.number)
            return local, number

        return self._counted(made, page.num_instances, page.recent)

    def parts_of(self, page: PipelinePage) -> list[torch.Tensor]:
        """A copy of the memory on all ranks, as one part; `written_` takes back what was written to it."""
        number = self._chain.new_number()
        self._chain.send_(Read(number, page.number, torch.empty(0, dtype=torch.uint8)))
        rest = self._chain.answer(number).values
        return [torch.cat([*(part.cpu() for part in self._parts_here(page)), rest])]

    def written_(self, page: PipelinePage, parts: list[torch.Tensor]) -> None:
        """Each rank takes its part."""
        (values,) = parts
        for part in self._parts_here(page):
            part.copy_(values[: len(part)])
            values = values[len(part) :]
        self._chain.send_(Write(page.number, values.contiguous()))

    def drop_(self, number: int, size: int) -> None:
        """A page is no longer used."""
        self._chain.change_("drop", number)
        self._count.give_back_(size)

    def _parts_here(self, page: PipelinePage) -> list[torch.Tensor]:
        return [] if page.local is None else self._local.parts_of(page.local)

    def _counted(self, make: Callable[[], tuple[Page | None, int]], num_instances: int, recent: bool) -> PipelinePage:
        size = self.page_bytes(num_instances, recent)
        self._count.take_(size)
        try:
            local, number = make()
        except BaseException:
            self._count.give_back_(size)
            raise
        return PipelinePage(self, number, local, num_instances, recent, size)

    def _known(self) -> int:
        """The pool's number, which the other ranks hear of with its first page."""
        if self._number is None:
            self._number = self._chain.new_number()
            self._chain.change_("pool", self._number, *self._described)
            weakref.finalize(self, self._chain.change_, "unpool", self._number).atexit = False
        return self._number
