"""Where keys and values lie in a page, in every format: what kernels are compiled for.

    page ---> instance 0: keys   head 0, head 1, ...     each [64 positions] as formats_kernel.py has it
                          values head 0, head 1, ...
              instance 1: keys   ...

An address and an instance say where everything is, and all addresses of heads are multiples of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.config.cache_format import BLOCK, CODE_BITS, FLOAT_BITS, CacheFormat, hadamard_size, is_rotated

BITS = {**FLOAT_BITS, **CODE_BITS}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The pages of one kind: key/value heads of head_dim numbers in a format."""

    num_kv_heads: int
    head_dim: int
    cache_format: CacheFormat

    def __str__(self) -> str:
        return f"{self.cache_format} heads={self.num_kv_heads} dim={self.head_dim}"

    @property
    def exact(self) -> PageLayout:
        """That of the pages that hold recent positions besides."""
        return PageLayout(self.num_kv_heads, self.head_dim, self.cache_format.exact)

    @property
    def instance_bytes(self) -> int:
        """Keys and values of a page in one layer instance."""
        return self.num_kv_heads * sum(self._head_bytes())

    @property
    def hadamard(self) -> int:
        """The size of the matrix that turns heads in rotated formats; 1 where it would change nothing."""
        return hadamard_size(self.head_dim)

    @property
    def turns_keys(self) -> bool:
        """Whether keys are rotated, and queries have to be."""
        return self.hadamard > 1 and is_rotated(self.cache_format.keys)

    @property
    def turns_values(self) -> bool:
        """Whether values are rotated, and sums of them have to be turned back."""
        return self.hadamard > 1 and is_rotated(self.cache_format.values)

    @property
    def turns(self) -> dict[str, int | float]:
        """Sizes of the matrices that keys and values are rotated by before codes, 1 for none; 1 / sqrt of the size."""
        keys, values = (self.hadamard if turns else 1 for turns in (self.turns_keys, self.turns_values))
        return {"H_KEYS": keys, "H_VALUES": values, "ROOT": self.hadamard**-0.5}

    @property
    def has_float32(self) -> bool:
        """Whether keys or values are float32: products of them are, too."""
        return "fp32" in (self.cache_format.keys, self.cache_format.values)

    @property
    def columns(self) -> int:
        """DP, columns of a tile that holds a head: a power of two, 16 or more, whole blocks of codes."""
        return max(BLOCK if self.cache_format.is_coded else 16, triton.next_power_of_2(self.head_dim))

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel that reads or writes pages has to know of them."""
        key_bytes, value_bytes = self._head_bytes()
        return {
            "HKV": self.num_kv_heads,
            "D": self.head_dim,
            "DP": self.columns,
            "PAGE": PAGE_TOKENS,
            "K_BITS": BITS[self.cache_format.keys],
            "V_BITS": BITS[self.cache_format.values],
            "K_BYTES": key_bytes,
            "V_BYTES": value_bytes,
        }

    def _head_bytes(self) -> tuple[int, int]:
        """Keys and values of one head of a page."""
        return tuple(_head_bytes(kind, self.head_dim) for kind in (self.cache_format.keys, self.cache_format.values))


def _head_bytes(kind: str, head_dim: int) -> int:
    return PAGE_TOKENS * CacheFormat(kind, kind).position_bytes(1, head_dim) // 2
