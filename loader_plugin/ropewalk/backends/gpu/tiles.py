"""How the linears are cut into tiles, warps and parts: tables, nothing is tried at run time.

The parts of K decide in which order a product is summed, so they depend on the weights alone: never on the number of
rows, nor on the card.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HOPPER = 9  # its generation
COLUMNS = 64  # output columns are padded to a multiple of this
SPLIT_ROWS = 64  # up to so many rows every part of K is a program of its own: there are too few tiles to fill a card
PROGRAMS = 512  # that a product of few rows should have at least: 132 multiprocessors, about four on each
MOST_SPLITS = 16
SUM_COLUMNS = 256  # of a row, whose parts one program adds up
SUM_WARPS = 2
DENSE_FEATURES = 32  # features of dense weights at a time: in every tile, the order of the sums depends on it
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


def generation(device: torch.device) -> int:
    """The major number of an NVIDIA card's capability; 0 of other makers' cards; 8 where kernels are interpreted."""
    if device.type != "cuda":
        return 8
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def has_tf32(device: torch.device) -> bool:
    """Whether matrix instructions take TF32: all of NVIDIA's that are supported, of AMD's those of the MI300."""
    if device.type != "cuda" or torch.version.hip is None:
        return True
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94")


def linear_tile(num_rows: int, padded_columns: int, bits: int, group: int, exact: bool, generation: int) -> Tile:
    """The tile of a product of quantised weights; group: rows of a block that share their scales.

    NVIDIA's matrix instructions take 8 rows of x at least, those of others 16. Accumulators of 128 rows fit the
    registers on Hopper alone, where x is read from shared memory, and beside few words and scales. Tiles make no
    difference to the bits of a result.
    """
    columns = 128 if padded_columns % 128 == 0 else 64
    few = 8 if num_rows <= 8 and generation else 16
    if exact:
        return Tile(few, 64, 8, 2) if num_rows <= 16 else Tile(32, 64, 4, 2)
    if num_rows <= 16:
        return Tile(few, columns, 4, 4)
    if num_rows <= 32:
        return Tile(32, 64, 4, 2)
    if columns == 64 or num_rows <= 64:
        return Tile(64, 64, 4, 3)
    if generation == HOPPER and (bits, group) in ((4, 128), (8, 64)):  # one scale for a whole block
        return Tile(128, 128, 8, 3)
    return Tile(64, 128, 8, 3)


def dense_tile(num_rows: int, ieee: bool, generation: int) -> Tile:
    """The tile of a product of dense weights."""
    few = 8 if num_rows <= 8 and generation else 16
    if ieee:
        return Tile(few, 64, 4, 2) if num_rows <= 16 else Tile(32, 64, 8, 3)
    if num_rows <= 16:
        return Tile(few, 128, 4, 4)
    return Tile(32 if num_rows <= 32 else 64, 64, 4, 2)
