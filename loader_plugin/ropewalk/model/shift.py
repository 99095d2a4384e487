"""Context shift: positions are taken out of a cache, and those after them move down, without being read again.

    keep | drop | rest    ->    keep | rest

Keys of the rest are turned to their new positions (model/rotation.py); values stay as they are. The layers above the
first computed the rest with the dropped tokens in sight, so it still knows something of them, and no fresh computation
gives the same bits: a shifted cache has an origin of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.base.errors import RequestError
from ropewalk.model.cache import HeldPage, KvCache, num_pages
from ropewalk.model.rotation import shift_tables

if TYPE_CHECKING:
    from ropewalk.model.model import Model


@dataclass(frozen=True, slots=True)
class Removed:
    """A stretch that is missing in a newer prompt: new[:keep + rest] = old[:keep] + old[keep + drop:][:rest]."""

    keep: int
    drop: int
    rest: int


def shift_(model: Model, cache: KvCache, keep: int, drop: int) -> int:
    """Take `drop` positions out of a cache, from `keep` on; returns how many were moved down.

    Raises:
        RequestError: the cache does not hold these positions; or its format has a recent window that would reach back
            over positions that it does not hold in float16. CacheFullError: pages are shared, and there is no memory
            for others. The cache is as it was.
    """
    _check(cache, keep, drop)
    num_rows = cache.length - keep - drop
    if not drop:
        return 0
    if not num_rows:
        cache.truncate(keep)
        return 0
    _check_window(cache, keep, drop)
    source = cache.pages
    target, recent = model.store.targets_of(cache, keep, keep + num_rows)
    tables = shift_tables(cache.frequencies, model.rope.sliding_frequencies(), drop, num_rows)
    cos, sin = (torch.from_numpy(table).to(model.backend.device) for table in tables)  # [tables, num_rows, R/2]
    try:
        model.backend.move_rows_(
            [held.page for held in source],
            keep + drop,
            [held.page for held in target],
            keep,
            num_rows,
            cos,
            sin,
            model.rotations,
        )
        for index, held in recent.items():
            _fill_recent_(model, cache, index, held, keep, drop, cos, sin)
        cache.hold_(target, recent)
        cache.record_shift_(keep, drop)
    except BaseException:  # interrupted: what is before `keep` is as it was
        cache.truncate(cache.continuable(keep))
        raise
    return num_rows


def _fill_recent_(
    model: Model,
    cache: KvCache,
    index: int,
    target: HeldPage,
    keep: int,
    drop: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """A page in float16 of the shifted cache: positions before `keep` as they were, later ones moved. cos, sin: of all
    rows that move, which are turned alike."""
    first, end = PAGE_TOKENS * index, min(PAGE_TOKENS * (index + 1), cache.length - drop)
    held = cache.recent
    if first < keep:
        num_rows = min(keep, end) - first
        still = torch.ones_like(cos[:, :num_rows]), torch.zeros_like(cos[:, :num_rows])
        model.backend.move_rows_([held[index].page], 0, [target.page], 0, num_rows, *still, model.rotations)
    start = max(first, keep)
    if start < end:
        low = (start + drop) // PAGE_TOKENS
        pages = [held[place].page for place in range(low, num_pages(end + drop))]
        place, num_rows = start + drop - PAGE_TOKENS * low, end - start
        tables = cos[:, :num_rows].contiguous(), sin[:, :num_rows].contiguous()
        model.backend.move_rows_(pages, place, [target.page], start - first, num_rows, *tables, model.rotations)


def _check_window(cache: KvCache, keep: int, drop: int) -> None:
    """Raises:
    RequestError: a token after the shift would read positions in float16 that are held in codes alone.
    """
    end = cache.length - drop
    needed: set[int] = set()
    for index in cache.exact_pages(end, end):
        first, last = PAGE_TOKENS * index, min(PAGE_TOKENS * (index + 1), end)
        needed.update([index] if first < keep else [])
        moved = range((max(first, keep) + drop) // PAGE_TOKENS, num_pages(last + drop))
        needed.update(moved if max(first, keep) < last else [])
    if not needed.issubset(cache.recent):
        raise RequestError(
            f"cannot shift: after it the {cache.cache_format.recent} recent positions of the {cache.cache_format} "
            f"cache would begin before {keep}, where it holds none in float16: keep fewer at the start, or drop fewer"
        )


def find_removed(new: Sequence[int], old: Sequence[int]) -> Removed | None:
    """The stretch by whose removal `old` gives the longest beginning of `new`; None where that gives no more than
    their common beginning does.

    All that can be kept is kept: `keep` is the whole common beginning. Of several stretches that give as much, the
    shortest. Time and memory are linear in the lengths.
    """
    keep = common(new, old)
    rest = list(new[keep:])
    if not rest or keep == len(old):
        return None
    lengths = _matches(rest, list(old[keep + 1 :]))
    best = max(lengths, default=0)
    if not best:
        return None
    return Removed(keep, lengths.index(best) + 1, best)


def common(new: Sequence[int], old: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    limit = min(len(new), len(old))
    if new[:limit] == old[:limit]:
        return limit
    return next(index for index in range(limit) if new[index] != old[index])


def _matches(pattern: list[int], text: list[int]) -> list[int]:
    """How many leading elements of `pattern` stand at each place of `text`: the Z algorithm (Gusfield 1997)."""
    whole = [*pattern, -1, *text]  # no token id is -1
    found = [0] * len(whole)
    left = right = 0
    for place in range(1, len(whole)):
        length = min(right - place, found[place - left]) if place < right else 0
        while place + length < len(whole) and whole[length] == whole[place + length]:
            length += 1
        found[place] = length
        if place + length > right:
            left, right = place, place + length
    return found[len(pattern) + 1 :]


def _check(cache: KvCache, keep: Any, drop: Any) -> None:
    for name, value in (("keep", keep), ("drop", drop)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise RequestError(f"{name} must be an integer of at least 0, got {value!r}")
    if keep + drop > cache.length:
        raise RequestError(f"cannot take {drop} positions out from {keep} on: the cache holds {cache.length} positions")
