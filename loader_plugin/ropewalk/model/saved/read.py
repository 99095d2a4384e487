"""From a file to a cache: everything is checked before a page is taken.

head -> version, model, layer order, RoPE, adapters, room -> checksum of the pages -> pages taken and filled
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ropewalk import __version__
from ropewalk.base.errors import RequestError, SavedCacheError
from ropewalk.base.json import shown
from ropewalk.model.cache import KvCache, Origin, Segment, common_length
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
    model.store.reserve_([(cache, len(file.token_ids))])
    try:
        _fill_(model, cache, file, lambda done: report(file.num_steps + done, total))
    except BaseException:
        cache.hold_(())
        raise
    cache.restore_(file.token_ids, segments)
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
    if len(file.token_ids) > model.max_seq_len:
        raise SavedCacheError(
            f"{file.path} has {len(file.token_ids)} positions, and the model was loaded for {model.max_seq_len}: load "
            f"it with max_seq_len={len(file.token_ids) + 256} or more"
        )
    if any(not 0 <= token_id < model.config.vocab_size for token_id in file.token_ids):
        raise SavedCacheError(f"{file.path} is damaged (it has tokens that the model does not know): {REMEDY}")
    return [
        Segment(segment.start, _origin(model, file, i), segment.seq_len)
        for i, segment in enumerate(description.segments)
    ]


def usable_prefix(model: Model, file: SavedFile, token_ids: list[int], origin: Origin) -> int:
    """How many leading positions of the file hold these tokens, computed in this way.

    Raises:
        SavedCacheError: as `fitting_segments`.
    """
    segments = fitting_segments(model, file)
    end = next((segment.start for segment in segments if segment.origin != origin), len(file.token_ids))
    return common_length(file.token_ids[:end], token_ids)


def _origin(model: Model, file: SavedFile, index: int) -> Origin:
    segment = file.description.segments[index]
    if segment.frequencies != model.frequencies(segment.seq_len):
        raise SavedCacheError(
            f"{file.path} has keys that were rotated in another way ({file.description.rope}) than this model rotates "
            f"them ({model.rope.describe()}): load the model with the same RoPE options, or read the text anew"
        )
    try:
        return Origin(segment.frequencies, model.key_of_saved(segment.adapters))
    except RequestError as error:
        raise SavedCacheError(f"{file.path} does not fit the adapters of the model: {error}") from error


def _fill_(model: Model, cache: KvCache, file: SavedFile, report: Callable[[int], None]) -> None:
    """Read every part of every page into the pages of the cache."""
    done = 0
    for place, size in enumerate(file.description.part_bytes):
        staged = torch.empty(size, dtype=torch.uint8)
        for index, held in enumerate(cache.pages):
            part = model.store.parts_of(held)[place]
            if len(part) != size:
                raise SavedCacheError(
                    f"{file.path} has pages of {size} bytes, and those of the model have {len(part)}: {REMEDY}"
                )
            if part.device.type == "cpu":
                file.read_page_(place, index, part)
            else:
                file.read_page_(place, index, staged)
                part.copy_(staged)
            done += 1
            report(done)


def _ignored(done: int, total: int) -> None:
    pass
