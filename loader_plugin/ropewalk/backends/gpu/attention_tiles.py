"""Tiles of attention as tables: rows, warps and keys of a program, by head size, format and card. Nothing is tuned."""

from __future__ import annotations

from dataclasses import dataclass

from ropewalk.backends.gpu.layout import PageLayout

CHUNK = 512  # keys whose state is computed from nothing: part of the order of summation
SCRATCH_BYTES = 1 << 26  # bound for the states of chunks; where it is exceeded, there are rows enough without them
STATES_AT_ONCE = (4, 16)  # of a head that merge_chunks loads together: contexts up to 2048, and longer ones


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a program and its warps."""

    rows: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of programs that walk over all chunks of many rows, and of those for short spans; BLOCK of the kernels.

    Results depend on the block alone, so all forms have the same.
    """

    long: Tile
    short: Tile
    block: int
    num_stages: int = 2


# By head size, products in float16: the widest that keep everything in registers (gpu_compile_matrix.py).
TILES = {
    64: Tiles(Tile(128, 8), Tile(16, 4), 64),
    128: Tiles(Tile(128, 8), Tile(16, 4), 64),
    256: Tiles(Tile(64, 8), Tile(16, 4), 32),
}
# Where a head is padded, its masks take registers; so does what decodes large heads or caps their scores, and the
# bounds of a part of the keys. Heads of 256 have less than 64 rows then, on all cards; those of 128 on 8.x and 12.x.
PADDED = {
    128: Tiles(Tile(64, 8), Tile(16, 4), 64),
    256: Tiles(Tile(32, 8), Tile(16, 8), 32),
}
# Beside caps of scores, few rows of large heads want the registers of four warps.
CAPPED = Tiles(Tile(32, 8), Tile(16, 4), 32)
# The older part of the keys, in codes, takes the most of them.
OLDER_PART = Tiles(Tile(32, 4), Tile(16, 4), 32)
# On 9.x and 10.x products of 64 rows have instructions of their own, which need not round like those of 16 rows: there
# all tiles of a head size are of one kind.
TILES_OF_WARPGROUPS = {
    64: Tiles(Tile(128, 8), Tile(64, 4), 64),
    128: Tiles(Tile(64, 4), Tile(64, 4), 32),
    256: Tiles(Tile(64, 8), Tile(64, 8), 16),
}
WARPGROUPS = (9, 10)  # compute capabilities; 12.x has the instructions of 8.x
FLOAT32 = Tiles(Tile(16, 4), Tile(16, 4), 16, 1)


def tiles(layout: PageLayout, fp16: bool, major: int, is_part: bool = False, is_capped: bool = False) -> Tiles:
    """The tiles for pages of a layout, products in float16 or float32, on a card of that compute capability.

    is_part: for one part of the keys of a format with a recent window. is_capped: with a cap of scores.
    """
    head_dim, size = layout.head_dim, max(64, layout.columns)
    if not fp16:
        return FLOAT32
    is_coded = layout.cache_format.is_coded
    if size == 256 and is_capped:
        return CAPPED
    if size == 256 and (head_dim < 256 or is_coded):
        return PADDED[size]
    if major in WARPGROUPS:
        return TILES_OF_WARPGROUPS[size]
    if size == 128 and is_part and is_coded:
        return OLDER_PART
    narrow = size == 128 and (head_dim < 128 or is_part)
    return PADDED[size] if narrow else TILES[size]
