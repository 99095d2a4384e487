"""Cached keys follow the RoPE: turned by the difference of angles, or computed anew from their tokens.

    rotate      keys of a layer are turned in place: what a fresh call would give, up to rounding, had the layers below
                not seen the old rotation; the first layer has not, the others have
    recompute   keys and values of all layers from the token ids: the bits of a fresh call

Both happen for two reasons: somebody gives the model another RoPE (`rescale`), or a sequence outgrows the length that
its frequencies are for, with a method that follows the length (`follow_length_`).

Pages that the prefix tree or another cache holds are never written: the caches that are turned get copies. A page that
several of them share is turned once, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.base.choices import RECOMPUTE, RESCALE_MODE, ROTATE
from ropewalk.base.errors import ConfigError, RequestError
from ropewalk.model.cache import Frequencies, HeldPage, KvCache, Origin
from ropewalk.model.pages import check_holds_one, context_pages
from ropewalk.model.rotation import check_turns, turn_tables
from ropewalk.model.step import Cancelled, Checked, Progress, run_checked
from ropewalk.rope.rope import Rope

if TYPE_CHECKING:
    from ropewalk.model.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What a cache is to be turned to. reach: the length that the frequencies are for."""

    cache: KvCache
    frequencies: Frequencies
    reach: int
    grows: bool = False


def rescale(
    model: Model,
    rope: Rope,
    mode: str,
    caches: Iterable[KvCache] | None,
    max_seq_len: int | None,
    progress: Progress | None,
    cancelled: Cancelled | None,
) -> bool:
    """Give the model another RoPE, and bring caches along; False once cancelled: then everything is as it was.

    Raises:
        ConfigError, RequestError: as `Model.rescale`. Everything is as it was.
    """
    RESCALE_MODE.check(mode)
    chosen = _chosen(model, caches)
    length = model.max_seq_len if max_seq_len is None else max_seq_len
    _check_length(model, length, chosen)
    before, limit = model.rope, model.max_seq_len
    follow = _recomputed if mode == RECOMPUTE else _turned
    try:
        model.set_rope_(rope, length)
        is_done = follow(model, [cache for cache in chosen if cache.length], progress, cancelled or _never)
    except BaseException:
        model.set_rope_(before, limit)
        raise
    if not is_done:
        model.set_rope_(before, limit)
        return False
    for cache in chosen:
        cache.rope = rope
        if cache.capacity == limit:
            cache.capacity = length
    return True


def follow_length_(model: Model, spans: Sequence[Checked]) -> None:
    """Bring along the keys of the caches that outgrow their length with these spans, whose pages are reserved.

    Raises:
        CacheFullError: pages are shared, and there is no memory for copies. All caches are as they were.
    """
    outgrown = [span for span in spans if span.cache.length and span.cache.frequencies != span.origin.frequencies]
    if not outgrown:
        return
    if model.rope_growth == ROTATE:
        turn_(model, [Turn(span.cache, span.origin.frequencies, span.seq_len, True) for span in outgrown])
        return
    for span in outgrown:
        fresh = _computed_anew(model, span.cache, span.seq_len, None, _never)
        span.cache.become_(fresh)
        model.store.reserve_([(span.cache, span.cache.length + len(span.ids))])


def turn_(model: Model, turns: Sequence[Turn], progress: Progress | None = None) -> None:
    """Turn the keys of these caches.

    Raises:
        ConfigError: as `check_turns`. CacheFullError: no memory for copies of shared pages. Nothing has been written.
    """
    turns = [turn for turn in turns if turn.cache.length and turn.cache.frequencies != turn.frequencies]
    for turn in turns:
        check_turns(turn.cache.frequencies, turn.frequencies)
    model.store.own_([(turn.cache, turn.frequencies) for turn in turns])
    filled: dict[HeldPage, int] = {}
    for turn in turns:
        for index, held in (*enumerate(turn.cache.pages), *turn.cache.recent.items()):
            rows = min(PAGE_TOKENS, turn.cache.length - PAGE_TOKENS * index)
            filled[held] = max(filled.get(held, 0), rows)
    done: set[HeldPage] = set()
    total = sum(turn.cache.length for turn in turns)
    counted = 0
    try:
        for turn in turns:
            _turn_pages_(model, turn, filled, done)
            counted += turn.cache.length
            if progress is not None:
                progress(counted, total)
        for turn in turns:
            turn.cache.record_turn_(turn.frequencies, turn.reach, turn.grows)
    except BaseException:  # interrupted: some keys are turned, others are not
        for turn in turns:
            turn.cache.truncate(0)
        raise


def _turn_pages_(model: Model, turn: Turn, filled: dict[HeldPage, int], done: set[HeldPage]) -> None:
    """Turn the pages of one cache that no other has brought along yet, in runs of neighbours of a kind."""
    recent = sorted(turn.cache.recent.items())
    for numbered in (list(enumerate(turn.cache.pages)), recent):  # pages in float16 have neighbours of theirs
        _turn_runs_(model, turn, numbered, filled, done)


def _turn_runs_(
    model: Model,
    turn: Turn,
    numbered: Sequence[tuple[int, HeldPage]],
    filled: dict[HeldPage, int],
    done: set[HeldPage],
) -> None:
    for is_done, run in groupby(numbered, key=lambda pair: pair[1] in done):
        if is_done:
            continue
        held = list(run)
        start = held[0][0] * PAGE_TOKENS
        num_rows = (len(held) - 1) * PAGE_TOKENS + filled[held[-1][1]]
        tables = turn_tables(turn.cache.frequencies, turn.frequencies, start, start + num_rows)
        cos, sin = (torch.from_numpy(table)[None].to(model.backend.device) for table in tables)  # [1, num_rows, R/2]
        pages = [page.page for _, page in held]
        # Only the first table follows the length, or another RoPE.
        rotations = [rotation if rotation == 0 else None for rotation in model.rotations]
        model.backend.move_rows_(pages, 0, pages, 0, num_rows, cos, sin, rotations)
        done.update(page for _, page in held)


def _turned(model: Model, caches: Sequence[KvCache], progress: Progress | None, cancelled: Cancelled) -> bool:
    if cancelled():
        return False
    turn_(model, [Turn(cache, model.frequencies(cache.length), cache.length) for cache in caches], progress)
    for cache in caches:
        cache.set_reach_(cache.length)  # of those, too, whose frequencies are as before
    return True


def _recomputed(model: Model, caches: Sequence[KvCache], progress: Progress | None, cancelled: Cancelled) -> bool:
    """Compute the caches beside the old ones, which are replaced when all are ready."""
    total, done, fresh = sum(cache.length for cache in caches), 0, []
    for cache in caches:
        report = None if progress is None else _counting(progress, done, total)
        made = _computed_anew(model, cache, cache.length, report, cancelled)
        if made is None:
            return False
        fresh.append(made)
        done += cache.length
    for cache, made in zip(caches, fresh, strict=True):
        cache.become_(made)
    return True


def _computed_anew(
    model: Model, cache: KvCache, seq_len: int, progress: Progress | None, cancelled: Cancelled
) -> KvCache | None:
    """A new cache of the same tokens, each computed with the adapters that it was; None once cancelled.

    Raises:
        RequestError: one of these adapters has been unloaded. CacheFullError: no memory for it beside the old one.
    """
    fresh = model.new_cache_like(cache)
    ids = cache.token_ids
    for adapters, alike in groupby(cache.stretches, key=lambda stretch: stretch[2].origin.adapters):
        stretches = list(alike)
        start, end = stretches[0][0], stretches[-1][1]
        change = model.change_of(adapters)
        span = Checked(0, ids[start:end], fresh, change, Origin(model.frequencies(seq_len), change.key), seq_len, None)
        report = None if progress is None else _counting(progress, start, len(ids))
        if run_checked(model, [span], report, cancelled, named=False) is None:
            return None
    return fresh


def _counting(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _chosen(model: Model, caches: Iterable[KvCache] | None) -> list[KvCache]:
    """The caches to be brought along: each once, all of this model and of its layer order."""
    if caches is None:
        with model.store.lock:
            return [cache for cache in model.caches if cache.layer_order == model.layer_order]
    chosen = list(dict.fromkeys(caches))
    for cache in chosen:
        model.check_maker(cache)
    return chosen


def _check_length(model: Model, max_seq_len: int, caches: Sequence[KvCache]) -> None:
    if not isinstance(max_seq_len, int) or isinstance(max_seq_len, bool) or max_seq_len < 1:
        raise ConfigError(f"max_seq_len must be a positive integer, got {max_seq_len!r}")
    longest = max((cache.length for cache in caches), default=0)
    if max_seq_len < longest:
        raise RequestError(
            f"max_seq_len: {max_seq_len} is less than the {longest} positions of a cache that is to be brought along: "
            "truncate or shift it first, or leave it out"
        )
    if max_seq_len > model.max_seq_len:
        limits = replace(model.limits, max_seq_len=max_seq_len)
        context = context_pages(model.backend, model.config, len(model.instances), limits)
        check_holds_one(context, model.cache_memory)


def _never() -> bool:
    return False
