"""The key/value cache of one sequence: which tokens it holds, and how their keys and values were computed.

The backend owns the memory and its layout; this module counts positions. It also remembers, span by span, the origin
of keys and values: the adapters in use, and the frequencies that rotated the keys (RoPE methods that depend on the
length, dynamic NTK and longrope, choose them by the length that the whole call reaches). The spans of a cache can
differ; a prefix is reused only up to the first span whose origin is not that of the new call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ropewalk.backends.protocol import Backend, KvStore
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.base.memory import available_bytes, format_bytes, physical_bytes
from ropewalk.config.layer_order import LayerOrder
from ropewalk.config.model import ModelConfig

logger = logging.getLogger(__name__)

CACHE_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # of base/choices.CACHE_TYPE


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Inverse frequencies (float64 bytes) and attention scale: equal exactly when the rotation tables are equal."""

    inverse_frequencies: bytes
    attention_scale: float


@dataclass(frozen=True, slots=True)
class Origin:
    """Equal exactly when equal tokens give equal keys and values.

    adapters: (number of the loaded adapter, weight, instances or None for all) of each, in the order of the numbers.
    """

    frequencies: Frequencies
    adapters: tuple[tuple[int, float, tuple[int, ...] | None], ...] = ()


class KvCache:
    """Keys and values of one sequence, per layer instance. Made by `Model.new_cache`, filled by `Model.forward`."""

    def __init__(
        self, owner: object, stores: Sequence[KvStore], capacity: int, layer_order: LayerOrder | None = None
    ) -> None:
        self.owner = owner
        self.layer_order = layer_order  # each of its instances has one store
        self.stores = tuple(stores)
        self.capacity = capacity
        self._token_ids: list[int] = []
        self._spans: list[tuple[int, Origin]] = []  # (first position, origin up to the next span)

    @property
    def length(self) -> int:
        """The number of cached positions."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """A copy of the ids of the cached tokens."""
        return list(self._token_ids)

    @property
    def num_bytes(self) -> int:
        """Memory reserved; the system provides it as positions are filled."""
        return sum(store.num_bytes for store in self.stores)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on.

        Raises:
            RequestError: the cache does not hold that many positions.
        """
        if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= self.length:
            raise RequestError(f"cannot truncate to {length!r}: the cache holds {self.length} positions (0 empties it)")
        del self._token_ids[length:]
        self._spans = [span for span in self._spans if span[0] < length]

    def record_(self, token_ids: Sequence[int], origin: Origin) -> None:
        """Count positions whose keys and values have just been written to every store."""
        if not self._spans or self._spans[-1][1] != origin:
            self._spans.append((self.length, origin))
        self._token_ids.extend(token_ids)

    def common_prefix(self, token_ids: Sequence[int], origin: Origin) -> int:
        """How many leading positions hold exactly these tokens, computed in exactly this way."""
        differing = (start for start, used in self._spans if used != origin)
        limit = min(next(differing, self.length), len(token_ids))
        pairs = zip(self._token_ids[:limit], token_ids[:limit], strict=True)
        return next((position for position, (ours, theirs) in enumerate(pairs) if ours != theirs), limit)


def cache_bytes(config: ModelConfig, num_instances: int, length: int, cache_type: str) -> int:
    """Memory of keys and values of `length` positions, known before anything is allocated."""
    per_position = 2 * config.num_kv_heads * config.head_dim * CACHE_DTYPES[cache_type].itemsize
    return per_position * num_instances * length


def new_stores(
    backend: Backend, config: ModelConfig, num_instances: int, capacity: int, cache_type: str
) -> list[KvStore]:
    """One store per layer instance. Memory is taken as positions are filled, so more than is free now only warns.

    Raises:
        ConfigError: the machine does not have the memory; says how much is needed and how many positions would fit.
    """
    needed = cache_bytes(config, num_instances, capacity, cache_type)
    on_cpu = backend.device.type == "cpu"
    limit, free = (physical_bytes(), available_bytes()) if on_cpu else (None, None)
    if limit is not None and needed > limit:
        raise ConfigError(_too_large(config, num_instances, capacity, cache_type, limit))
    if free is not None and needed > free:
        logger.warning(
            "the %s cache of %d positions takes %s once it is full, and %s are free: ask for a smaller max_seq_len",
            cache_type,
            capacity,
            format_bytes(needed),
            format_bytes(free),
        )
    dtype = CACHE_DTYPES[cache_type]
    try:
        return [backend.new_kv(config.num_kv_heads, config.head_dim, capacity, dtype) for _ in range(num_instances)]
    except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as a RuntimeError
        raise ConfigError(_too_large(config, num_instances, capacity, cache_type, limit)) from error


def _too_large(config: ModelConfig, num_instances: int, capacity: int, cache_type: str, limit: int | None) -> str:
    needed = cache_bytes(config, num_instances, capacity, cache_type)
    per_position = cache_bytes(config, num_instances, 1, cache_type)
    have = "could not be allocated" if limit is None else f"this machine has {format_bytes(limit)}"
    advice = "" if limit is None else f" (at most {limit // per_position})"
    return (
        f"max_seq_len: a {cache_type} cache of {capacity} positions takes {format_bytes(needed)} "
        f"({format_bytes(per_position)} per position), {have}; ask for a smaller max_seq_len{advice}"
    )
