"""Perplexity by position: how well the tokens at each part of one long context are predicted.

    perplexity(bin) = exp( mean over windows and the positions i of the bin of  -log p(token i | tokens 0..i-1) )

The windows are those of `evaluate.perplexity` at one length, and what is kept of them serves both. Perplexity by length
averages over all positions up to the length; this tells where in the context a model loses its way, as the curves of
exllama issue 92 do, which follow long sequences token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ropewalk.base.errors import RequestError
from ropewalk.base.estimate import estimate
from ropewalk.generate.evaluate import BLOCK, BlockSums, exp_or_inf, stretches

MOST_BINS = 16  # by default


@dataclass(frozen=True, slots=True)
class PositionRow:
    """The positions start..end-1 of all windows. nll_error: standard error of mean_nll, None if it cannot be told."""

    start: int
    end: int
    num_windows: int
    num_scored: int
    mean_nll: float
    nll_error: float | None

    @property
    def perplexity(self) -> float:
        """exp(mean_nll), or infinity."""
        return exp_or_inf(self.mean_nll)

    @property
    def error(self) -> float | None:
        """The standard error of the perplexity."""
        return None if self.nll_error is None else self.perplexity * self.nll_error


def check_bin(size: int, length: int) -> None:
    """Raises:
    RequestError: not a multiple of `BLOCK` within the length.
    """
    if size < BLOCK or size % BLOCK or size > length:
        raise RequestError(f"a bin of positions must be a multiple of {BLOCK} of at most {length} tokens, got {size}")


def default_bin(length: int) -> int:
    """The smallest multiple of BLOCK that makes at most MOST_BINS bins."""
    return BLOCK * max(1, -(-length // (BLOCK * MOST_BINS)))


def by_position(windows: Sequence[BlockSums], size: int) -> list[PositionRow]:
    """Windows of one length, in bins of `size` positions; the last bin may be shorter.

    Raises:
        RequestError: as `check_bin`.
    """
    length = windows[0].length
    check_bin(size, length)
    rows = []
    for start in range(0, length, size):
        end = min(length, start + size)
        found = estimate(*stretches(windows, start, end))
        rows.append(PositionRow(start, end, len(windows), found.count, found.mean, found.error))
    return rows
