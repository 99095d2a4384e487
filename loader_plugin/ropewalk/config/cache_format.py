"""In which numbers keys and values are cached: "fp16", "q8", "q8_q4", "q4+256".

    q8_q4+256
    |  |   |
    |  |   the last 256 positions are kept in float16 besides
    |  values in 4 bits
    keys in 8 bits

Codes ("q8", "q6", "q4"; b bits). The D numbers of a head are padded with zeros to whole blocks of 32. Each block has a
scale d in float16, and a number x has the code

    c = clamp(round(x / d + z), 0, 2^b - 1)    and reads    d (c - z)    with  z = (2^b - 1) / 2,  d = max|x| / z

so that all 2^b values are used, evenly to both sides of zero. Rounding is half to even; a block of zeros has d = 0.

Below 8 bits a head is rotated by a Hadamard matrix first (keys after RoPE), which spreads what single dimensions stand
out by over all of them (Ashkboos et al. 2024, arXiv:2404.00456, for caches): H of Sylvester's construction, of the
largest power of two that divides D, divided by its square root, on each such piece of the head. It is its own inverse:
queries are turned alike before their products with the keys, and the weighted sum of the values is turned back.

The recent window ("+256"): a query at position i reads the page of 64 positions that holds i - 255, and all later ones,
in float16, and the pages before in codes. Every position has codes, too, for the queries after.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from ropewalk.base.errors import ConfigError

FLOAT_BITS = MappingProxyType({"fp32": 32, "fp16": 16})
CODE_BITS = MappingProxyType({"q8": 8, "q6": 6, "q4": 4})
KINDS = (*FLOAT_BITS, *CODE_BITS)
BLOCK = 32  # numbers of a head that share a scale
SCALE_BITS = 16
WINDOW_STEP = 64  # positions of a page
MOST_RECENT = 1 << 16
MOST_DIGITS = 18  # of a number of positions: what is too many is said of it, and not that it is no number


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """keys, values: one of KINDS each. recent: how many positions are kept in float16 besides; 0 for none.

    Raises:
        ConfigError: another kind, or a window that is not a multiple of 64 or has no codes to stand beside.
    """

    keys: str
    values: str
    recent: int = 0

    def __post_init__(self) -> None:
        wrong = [kind for kind in (self.keys, self.values) if kind not in KINDS]
        if wrong:
            raise ConfigError(f"cache_type: there is no {wrong[0]!r}; {accepted()}")
        if not 0 <= self.recent <= MOST_RECENT or self.recent % WINDOW_STEP:
            raise ConfigError(
                f"cache_type: a window of {self.recent} recent positions; it must be a multiple of {WINDOW_STEP}, at "
                f"most {MOST_RECENT}"
            )
        if self.recent and not self.is_coded:
            raise ConfigError(f"cache_type: {self} would keep recent positions in float16 beside {self.keys} ones")

    @classmethod
    def parse(cls, text: str) -> CacheFormat:
        """The format that is spelled like this.

        Raises:
            ConfigError: it is not a format; the message says what is accepted.
        """
        if not isinstance(text, str):
            raise ConfigError(f"cache_type must be a text, got {type(text).__name__}; {accepted()}")
        kinds, plus, recent = text.partition("+")
        keys, both, values = kinds.partition("_")
        whole = recent.isascii() and recent.isdigit() and len(recent) <= MOST_DIGITS and int(recent) > 0
        if plus and not whole:
            raise ConfigError(f"cache_type: {text!r:.80}: '+' is followed by a number of positions; {accepted()}")
        if any(kind not in KINDS for kind in (keys, values if both else keys)):
            raise ConfigError(f"cache_type: there is no {text!r:.80}; {accepted()}")
        return cls(keys, values if both else keys, int(recent) if plus else 0)

    def __str__(self) -> str:
        kinds = self.keys if self.keys == self.values else f"{self.keys}_{self.values}"
        return f"{kinds}+{self.recent}" if self.recent else kinds

    @property
    def is_coded(self) -> bool:
        """True if keys or values are codes."""
        return self.keys in CODE_BITS or self.values in CODE_BITS

    @property
    def exact(self) -> CacheFormat:
        """What recent positions are kept in."""
        return CacheFormat("fp16", "fp16")

    def position_bytes(self, num_kv_heads: int, head_dim: int) -> int:
        """Memory of the keys and values of one position in one layer instance; recent ones take `exact` besides."""
        return num_kv_heads * sum(_row_bits(kind, head_dim) for kind in (self.keys, self.values)) // 8

    def first_exact_page(self, position: int) -> int:
        """The first page that a query at this position reads in float16."""
        return max(0, position + 1 - self.recent) // WINDOW_STEP


def is_rotated(kind: str) -> bool:
    """True if a head is turned by a Hadamard matrix before it is rounded to this kind."""
    return CODE_BITS.get(kind, 8) < 8


def hadamard_size(head_dim: int) -> int:
    """The largest power of two that divides a head: the size of the matrix."""
    return head_dim & -head_dim


def accepted() -> str:
    """What may be given, for messages."""
    return (
        f"accepted are {', '.join(KINDS)}, two of them as keys_values such as q8_q4, and with codes a window of recent "
        "positions such as q4+256"
    )


def _row_bits(kind: str, head_dim: int) -> int:
    if kind in FLOAT_BITS:
        return FLOAT_BITS[kind] * head_dim
    num_blocks = -(-head_dim // BLOCK)
    return num_blocks * (BLOCK * CODE_BITS[kind] + SCALE_BITS)
