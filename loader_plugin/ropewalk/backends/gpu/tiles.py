"""How the linears are cut into tiles, warps and parts: tables, nothing is tried at run time.

The parts of K decide in which order a product is summed, so they depend on the weights alone: never on the number of
rows, nor on the card.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 64  # output columns are padded to a multiple of this
SPLIT_ROWS = 64  # up to so many rows every part of K is a program of its own: there are too few tiles to fill a card
PROGRAMS = 512  # that a product of few rows should have at least: 132 multiprocessors, about four on each
MOST_SPLITS = 16
SUM_COLUMNS = 256  # of a row, whose parts one program adds up
SUM_WARPS = 2
DENSE_FEATURES = 64  # features of dense weights at a time
LOW_RANK_ROWS, LOW_RANK_COLUMNS, LOW_RANK_WARPS = 16, 64, 4  # of the second product of a low-rank change


@dataclass(frozen=True, slots=True)
class Tile:
    """rows, columns: of the result, by one program of `warps` warps. stages: blocks of weights on their way at once."""

    rows: int
    columns: int
    warps: int
    stages: int


def splits(blocks: int, padded_columns: int) -> int:
    """Into how many parts K is cut: a power of two, at most one for each block of rows."""
    parts = 1
    while parts < MOST_SPLITS and 2 * parts <= blocks and parts * (padded_columns // COLUMNS) < PROGRAMS:
        parts *= 2
    return parts


def linear_tile(num_rows: int, padded_columns: int, exact: bool) -> Tile:
    """The tile of a product of quantised weights."""
    columns = 128 if padded_columns % 128 == 0 else 64
    if num_rows <= 16:
        return Tile(16, 64, 8, 2) if exact else Tile(16, columns, 4, 4)
    if num_rows <= 32 or exact:
        return Tile(32, 64, 4, 2)
    return Tile(64, columns, 8 if columns == 128 else 4, 3)


def dense_tile(num_rows: int, ieee: bool) -> Tile:
    """The tile of a product of dense weights."""
    if num_rows <= 16:
        return Tile(16, 64, 4, 2 if ieee else 4)
    if num_rows <= 32 or ieee:
        return Tile(32, 64, 8 if ieee else 4, 2)
    return Tile(64, 64, 4, 3)
