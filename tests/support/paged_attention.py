"""Attention over pages of the CPU backend, as a layer that does nothing else: what the model's steps call."""

from __future__ import annotations

import math

import numpy as np
import torch

from cpu_pages import Half, halves_of
from ropewalk import _core, native
from ropewalk.backends.cpu import CpuBackend
from ropewalk.config.cache_format import CacheFormat


class PagedAttention:
    """One sequence: rows are appended and attended to in one step, as a model does it.

    A row of the residual stream holds q, k, v and room for the result, which an identity brings there exactly.
    """

    def __init__(
        self,
        text: str,
        heads: tuple[int, int, int],
        *,
        isa: str | None = None,
        compute: str = "int8",
        window: int | None = None,
        threads: int = 1,
        instances: int = 1,
        fill: int = 0,
    ) -> None:
        """heads: Hq, Hkv, D. fill: of the memory of fresh pages."""
        self.heads, self.instances, self.fill = heads, instances, fill
        num_heads, num_kv_heads, dim = heads
        self.format = CacheFormat.parse(text)
        self.backend = CpuBackend(compute, isa, threads)
        self.pool = self.backend.new_pool(num_kv_heads, dim, self.format, 1 << 30)
        self.pages: list[_core.Page] = []
        self.recent: list[_core.Page] = []
        q_size, kv_size = num_heads * dim, num_kv_heads * dim
        self.width = 2 * (q_size + kv_size)
        # The identity is kept: a dense linear is used where it lies.
        self.place = np.zeros((self.width, q_size), np.float32)
        self.place[self.width - q_size :] = np.eye(q_size, dtype=np.float32)
        self.core = _core.Layer([self.width, q_size, self.width], compute)
        self.core.append((0, q_size, num_kv_heads, dim), (0, q_size + kv_size, num_kv_heads, dim))
        self.core.attend((0, 0, num_heads, dim), (1, 0, num_heads, dim), window or 0, 1.0 / math.sqrt(dim), 0.0)
        identity = native.Linear(self.backend.runtime, [native.dense_linear(self.place)]).core
        self.core.linear((1, 0, 1, q_size), identity, (2, 0, 1, self.width))
        self.core.add_residual((2, 0, 1, self.width), 1.0)
        self.core.finish()

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, instance: int = 0) -> torch.Tensor:
        """Append k, v [T, Hkv, D] at `start` and attend with q [T, Hq, D]: [T, Hq * D]."""
        self.reserve(start + len(q))
        first = self.format.first_exact_page(start) if self.format.recent else 0
        recent = [None] * first + self.recent[first:]
        x = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1), torch.zeros_like(q).flatten(1)], dim=1).contiguous()
        tables = np.zeros((1, len(q), 0), np.float32)
        step = _core.Step(x.numpy(), tables, tables, [(len(q), start, self.pages, recent if self.recent else [])])
        self.core.run(self.backend.runtime.core, step, instance, 1.0, [])
        return x[:, self.width - q.flatten(1).shape[1] :].clone()

    def reserve(self, length: int) -> None:
        """Pages for so many positions."""
        while len(self.pages) * 64 < length:
            for pages, recent in ((self.pages, False), (self.recent, True))[: 2 if self.format.recent else 1]:
                pages.append(self.pool.take(self.instances, recent))
                self.pool.parts_of(pages[-1])[0].fill_(self.fill)

    def halves(self, instance: int = 0, recent: bool = False) -> list[tuple[Half, Half]]:
        """Keys and values of each page, as numpy reads its bytes."""
        kind = self.format.exact if recent else self.format
        pages = self.recent if recent else self.pages
        _, num_kv_heads, dim = self.heads
        return [halves_of(self.pool.parts_of(page)[0].numpy(), kind, num_kv_heads, dim, instance) for page in pages]

    def numbers(self, field: str = "numbers", recent: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of all positions of the pages, [Hkv, S, D] float64 each. field: of `Half`."""
        halves = self.halves(recent=recent)
        return tuple(np.concatenate([getattr(pair[part], field) for pair in halves], axis=1) for part in (0, 1))
