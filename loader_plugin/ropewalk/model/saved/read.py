"""From a file to a cache: everything is checked before a page is taken.

head -> version, model, layer order, RoPE, adapters, room -> checksum of the pages -> pages taken and filled
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ropewalk import __version__
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.base.errors import RequestError, SavedCacheError
from ropewalk.base.json import shown
from ropewalk.model.cache import KvCache, Origin, Segment, common_length, num_pages
from ropewalk.model.saved.file import REMEDY, Progress, SavedFile
from ropewalk.model.saved.identity import differences, model_facts

if TYPE_CHECKING:
    from ropewalk.model.model import Model


def open_saved(path: str | Path) -> SavedFile:
    """The head of a saved cache, checked: what it is, without its pages and without a model.

    Raises:
        SavedCacheError: missing, cut short, damaged, of another version, or something else than a saved cache.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise RequestError(f"path must be that of a saved cache, got {shown(path)}")
    return SavedFile(Path(path))


def load_cache(model: Model, path: str | Path, progress: Progress | None = None) -> KvCache:
    """The cache that a file holds, as if it had just been computed.

    progress: called with (parts of pages done, all of them twice: once to check them, once to read them).

    Raises:
        SavedCacheError: the file is damaged, or was saved with another model or other settings; names what differs.
        CacheFullError: there is no room for its pages.
    """
    file = open_saved(path)
    segments = fitting_segments(model, file)
    report = progress or _ignored
    total = 2 * file.num_steps
    file.check_pages(lambda done, _: report(done, total))
    cache = model.new_cache()
    model.store.take_(cache, len(file.token_ids), file.description.recent)
    try:
        _fill_(model, cache, file, lambda done: report(file.num_steps + done, total))
    except BaseException:
        cache.hold_((), {})
        raise
    cache.restore_(file.token_ids, segments, file.description.reach, file.description.turned_at)
    return cache


def fitting_segments(model: Model, file: SavedFile) -> list[Segment]:
    """How the positions of the file were computed, in terms of this model.

    Raises:
        SavedCacheError: this model, with its present settings, would have computed them in another way.
    """
    description = file.description
    if description.ropewalk != __version__:
        raise SavedCacheError(
            f"{file.path} was saved by ropewalk {description.ropewalk}, this is {__version__}, which may compute other "
            f"bits: {REMEDY}"
        )
    found = differences(description.facts, model_facts(model))
    if found:
        raise SavedCacheError(
            f"{file.path} was saved with another model or other settings ({'; '.join(found)}): load the model that it "
            f"belongs to in the same way, or {REMEDY.split(', or ')[-1]}"
        )
    segments = enumerate(description.segments)
    fitting = [Segment(segment.start, _origin(model, file, index), segment.seq_len) for index, segment in segments]
    if len(file.token_ids) > model.max_seq_len:
        raise SavedCacheError(
            f"{file.path} has {len(file.token_ids)} positions, and the model was loaded for {model.max_seq_len}: load "
            f"it with max_seq_len={len(file.token_ids) + 256} or more"
        )
    if any(not 0 <= token_id < model.config.vocab_size for token_id in file.token_ids):
        raise SavedCacheError(f"{file.path} is damaged (it has tokens that the model does not know): {REMEDY}")
    if not _continuable(model, len(file.token_ids), description.recent):
        raise SavedCacheError(f"{file.path} lacks pages of the recent window of a {model.cache_type} cache: {REMEDY}")
    return fitting


def usable_prefix(model: Model, file: SavedFile, token_ids: list[int], origin: Origin) -> int:
    """How many leading positions of the file hold these tokens, computed in this way.

    Raises:
        SavedCacheError: as `fitting_segments`.
    """
    segments = fitting_segments(model, file)
    end = next((segment.start for segment in segments if segment.origin != origin), len(file.token_ids))
    length = common_length(file.token_ids[:end], token_ids)
    ends = [length, *range((length - 1) // PAGE_TOKENS * PAGE_TOKENS, 0, -PAGE_TOKENS)]
    shared = [index for index in _window(model, end) if index in file.description.recent]  # see `PrefixTree.add`
    return next((end for end in ends if _continuable(model, end, shared)), 0)


def _window(model: Model, length: int) -> range:
    """The pages that a token after so many positions reads in float16, for a format with a recent window."""
    recent = model.cache_format.recent
    return range(model.cache_format.first_exact_page(length), num_pages(length)) if recent else range(0)


def _continuable(model: Model, length: int, recent: Collection[int]) -> bool:
    """Whether a token after so many positions finds what it reads in float16 among these pages."""
    return all(index in recent for index in _window(model, length))


def _origin(model: Model, file: SavedFile, index: int) -> Origin:
    segment = file.description.segments[index]
    if segment.frequencies != model.frequencies(file.description.reach):  # all keys are rotated by those
        raise SavedCacheError(
            f"{file.path} has keys that were rotated in another way ({file.description.rope}) than this model rotates "
            f"them ({model.rope.describe()}): load the model with the same RoPE options, or read the text anew"
        )
    try:
        return Origin(segment.frequencies, model.key_of_saved(segment.adapters), segment.moves)
    except RequestError as error:
        raise SavedCacheError(f"{file.path} does not fit the adapters of the model: {error}") from error


def _fill_(model: Model, cache: KvCache, file: SavedFile, report: Callable[[int], None]) -> None:
    """Read every part of every page into the pages of the cache."""
    exact = [cache.recent[index] for index in file.description.recent]
    pages = {"pages": cache.pages, "recent": exact}
    done = 0
    for name, _, size in file.description.parts:
        kind, _, place = name.partition(".")
        staged = torch.empty(size, dtype=torch.uint8)
        for index, held in enumerate(pages[kind]):
            parts = model.store.parts_of(held)
            part = parts[int(place)] if int(place) < len(parts) else None
            if part is None or len(part) != size:
                raise SavedCacheError(f"{file.path} has pages of other parts than those of the model: {REMEDY}")
            if part.device.type == "cpu":
                file.read_part_(name, index, part)
            else:
                file.read_part_(name, index, staged)
                part.copy_(staged)
            model.store.written_(held, parts)
            done += 1
            report(done)


def _ignored(done: int, total: int) -> None:
    pass
