"""How much memory the pages of keys and values may take: what is chosen, and what is refused at load."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ropewalk.backends.protocol import PAGE_TOKENS, Backend
from ropewalk.base.choices import ROPE_GROWTH
from ropewalk.base.errors import ConfigError
from ropewalk.base.memory import available_bytes, format_bytes, physical_bytes
from ropewalk.config.cache_format import CacheFormat
from ropewalk.config.model import ModelConfig
from ropewalk.model.cache import num_pages
from ropewalk.model.recent import most_pages, window_pages

logger = logging.getLogger(__name__)

WINDOW_CHUNK = 512  # rows of a prompt that are computed at once with a recent window
MOST_CONTEXTS = 16  # by default the pool holds no more contexts than this,
CARD_RESERVE = 1 << 29  # of a card, or a twentieth if that is more: buffers of a chunk, logits, graphs, other programs
LEAST_BOUND = 4 << 30  # unless they are small: then up to 4 GiB, so that many short prefixes stay


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model was loaded for: the longest sequence, the rows of a chunk, the format of keys and values, and bytes
    for all pages of them (default: see `pages.choose_cache_memory`)."""

    max_seq_len: int
    max_input_len: int
    cache_format: CacheFormat
    cache_memory: int | None = None
    rope_growth: str = ROPE_GROWTH.default

    @property
    def chunk_rows(self) -> int:
        """The rows of a sequence that are computed at once: with a recent window all are held in float16 meanwhile."""
        return min(self.max_input_len, WINDOW_CHUNK) if self.cache_format.recent else self.max_input_len


@dataclass(frozen=True, slots=True)
class ContextPages:
    """The pages of one sequence that fills the context. recent_bytes: of those in float16 besides, if there are any."""

    max_seq_len: int
    cache_format: CacheFormat
    page_bytes: int
    recent_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory of one context, in whole pages."""
        return num_pages(self.max_seq_len) * self.page_bytes + self.recent_bytes

    def fitting(self, num_bytes: int) -> int:
        """The positions for which that much memory is enough."""
        return max(0, num_bytes - self.recent_bytes) // self.page_bytes * PAGE_TOKENS


def planned_bytes(config: ModelConfig, num_instances: int, length: int, cache_format: CacheFormat) -> int:
    """Memory of the pages of `length` positions, known without a backend; one may pad heads of an odd size."""
    in_codes, in_float16 = (
        num_instances * PAGE_TOKENS * kind.position_bytes(config.num_kv_heads, config.head_dim)
        for kind in (cache_format, cache_format.exact)
    )
    return in_codes * num_pages(length) + in_float16 * window_pages(cache_format, length)


def context_pages(backend: Backend, config: ModelConfig, num_instances: int, limits: ModelLimits) -> ContextPages:
    """The pages of one context as the backend lays them out."""
    cache_format, max_seq_len = limits.cache_format, limits.max_seq_len
    pool = backend.new_pool(config.num_kv_heads, config.head_dim, cache_format, 0)
    recent = most_pages(cache_format, max_seq_len, limits.chunk_rows)
    recent_bytes = recent * pool.page_bytes(num_instances, recent=True) if recent else 0
    return ContextPages(max_seq_len, cache_format, pool.page_bytes(num_instances), recent_bytes)


def check_cache_memory(context: ContextPages, cache_memory: int | None, backend: Backend) -> None:
    """Refuse what cannot work on this machine, before a weight is read.

    cache_memory: bytes for all pages; None: chosen later, at least one context.

    Raises:
        ConfigError: more than the machine has, or less than one context takes.
    """
    machine = _most_bytes(backend)
    if cache_memory is None:
        if machine is not None and context.num_bytes > machine:
            raise ConfigError(_too_long(context, machine))
        return
    if machine is not None and cache_memory > machine:
        raise ConfigError(
            f"cache_memory: {cache_memory} bytes ({format_bytes(cache_memory)}) are more than this machine has "
            f"({format_bytes(machine)}); leave it out, or give at most what is left beside the weights"
        )
    check_holds_one(context, cache_memory)


def check_holds_one(context: ContextPages, cache_memory: int) -> None:
    """Raises:
    ConfigError: `cache_memory` bytes do not hold one sequence that fills the context; says what would.
    """
    if cache_memory < context.num_bytes:
        fitting = context.fitting(cache_memory)
        shorter = f", or ask for a max_seq_len of at most {fitting}" if fitting else ""
        raise ConfigError(
            f"cache_memory: {cache_memory} bytes hold {fitting} positions of the {context.cache_format} cache in pages "
            f"of {PAGE_TOKENS}, and one context of {context.max_seq_len} takes {context.num_bytes} "
            f"({format_bytes(context.num_bytes)}); give cache_memory={context.num_bytes} or more{shorter}"
        )


def choose_cache_memory(context: ContextPages, cache_memory: int | None, backend: Backend) -> int:
    """Bytes for all pages: as given, or by default what is left beside the weights within a sensible bound.

    The default is half of what is free on a machine, or what is free on a card but for a reserve; at most
    MOST_CONTEXTS contexts or LEAST_BOUND, whichever is more, and never less than one context. Memory is taken as pages
    are written, so a context that is more than is free only warns.

    Raises:
        ConfigError: as `check_cache_memory`.
    """
    check_cache_memory(context, cache_memory, backend)
    if cache_memory is not None:
        return cache_memory
    free, usable = _free_bytes(backend, 1), _free_bytes(backend, 2)
    if free is None or usable is None:
        return MOST_CONTEXTS * context.num_bytes
    if context.num_bytes > free:
        logger.warning(
            "the %s cache of %d positions takes %s once it is full, and %s are free: ask for a smaller max_seq_len",
            context.cache_format,
            context.max_seq_len,
            format_bytes(context.num_bytes),
            format_bytes(free),
        )
    return max(context.num_bytes, min(usable, max(MOST_CONTEXTS * context.num_bytes, LEAST_BOUND)))


def _most_bytes(backend: Backend) -> int | None:
    """What all pages may take at most, were there nothing else in the memory of their devices; None: not known."""
    found = [(_device_bytes(device), share) for device, share in backend.shares]
    return min((int(size / share) for size, share in found if size is not None), default=None)


def _free_bytes(backend: Backend, machine_part: int) -> int | None:
    """What pages could take of what is free; None: not known. machine_part: 2 for half of the machine's memory, which
    others need as well; a card is this program's own."""
    found = [(_free_on(device, machine_part), share) for device, share in backend.shares]
    return min((int(size / share) for size, share in found if size is not None), default=None)


def _device_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return physical_bytes() if device.type == "cpu" else None


def _free_on(device: torch.device, machine_part: int) -> int | None:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for tensors to come
        return max(0, free + held - max(CARD_RESERVE, total // 20))
    if device.type != "cpu":
        return None
    # What is free on a machine may be more than its container may have.
    free, machine = available_bytes(), physical_bytes()
    return None if free is None else (free if machine is None else min(free, machine)) // machine_part


def _too_long(context: ContextPages, machine: int) -> str:
    fitting = context.fitting(machine)
    return (
        f"max_seq_len: a {context.cache_format} cache of {context.max_seq_len} positions takes "
        f"{format_bytes(context.num_bytes)} ({format_bytes(context.page_bytes / PAGE_TOKENS)} per position), this "
        f"machine has {format_bytes(machine)}; ask for a smaller max_seq_len (at most {fitting})"
    )
