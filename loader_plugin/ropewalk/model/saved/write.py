"""From a cache to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ropewalk import __version__
from ropewalk.base.errors import RequestError, SavedCacheError
from ropewalk.base.json import shown
from ropewalk.files.names import shown_name
from ropewalk.files.replaced import check_replaceable
from ropewalk.model.cache import HeldPage, KvCache
from ropewalk.model.saved.description import Description, SavedSegment
from ropewalk.model.saved.file import Progress, write_file
from ropewalk.model.saved.identity import model_facts

if TYPE_CHECKING:
    from ropewalk.model.model import Model

MOST_ABOUT = 4 << 20  # characters: in JSON within JSON they may take 20 times as much, and a header holds 100 MB


def save_cache(
    model: Model,
    cache: KvCache,
    path: str | Path,
    progress: Progress | None = None,
    about: Mapping[str, str] | None = None,
) -> int:
    """Write what `cache` holds to a file, for `load_cache`; returns the size of the file.

    The file appears whole or not at all. about: texts to be kept with it, such as a title; the result does not depend
    on them. progress: called with (parts of pages done, parts of pages).

    Raises:
        RequestError: an empty cache, or one of another model or layer order. SavedCacheError: it cannot be written.
    """
    _check_path(path)
    texts = dict(about or {})
    if not all(isinstance(item, str) for pair in texts.items() for item in pair):
        raise RequestError(f"about must map texts to texts, got {shown(texts)}")
    if sum(len(item) for pair in texts.items() for item in pair) > MOST_ABOUT:
        raise RequestError(f"about may have {MOST_ABOUT} characters in all: keep long texts elsewhere")
    model.check_owner(cache)
    copy = cache.fork()  # whatever happens to the cache meanwhile, these pages stay as they are
    if not copy.length:
        raise RequestError("the cache is empty: there is nothing to save")
    exact = [copy.recent[index] for index in sorted(copy.recent)]
    description = Description(
        ropewalk=__version__,
        model=shown_name(Path(model.config.source).parent),
        facts=model_facts(model),
        rope=model.rope.describe().partition("; decided by ")[0],  # not the paths of this machine
        num_tokens=copy.length,
        part_bytes=_part_bytes(model, copy.pages),
        segments=tuple(_segments(model, copy)),
        reach=copy.reach,
        turned_at=copy.turned_at,
        about=texts,
        recent=tuple(sorted(copy.recent)),
        recent_bytes=_part_bytes(model, exact),
    )
    parts = chain(_parts(model, copy.pages), _parts(model, exact))
    with _named(path):
        return write_file(Path(path), description, copy.token_ids, parts, progress or _ignored)


def check_writable(path: str | Path) -> None:
    """Find out before a text is read that it could not be written there.

    Raises:
        SavedCacheError: the message says why. RequestError: it is no path.
    """
    _check_path(path)
    with _named(path):
        check_replaceable(Path(path))


def _check_path(path: object) -> None:
    if not isinstance(path, (str, Path)) or not str(path):
        raise RequestError(f"path must be that of a file to write, got {shown(path)}")


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors of a file, as errors of ours."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SavedCacheError(f"{path} cannot be written: {reason}") from error


def _segments(model: Model, cache: KvCache) -> Iterator[SavedSegment]:
    for segment in cache.whole_segments:
        origin = segment.origin
        uses = model.saved_uses(origin.adapters)
        yield SavedSegment(segment.start, segment.seq_len, origin.frequencies, uses, origin.moves)


def _part_bytes(model: Model, pages: Sequence[HeldPage]) -> tuple[int, ...]:
    """The size of each part of these pages, which are alike."""
    return tuple(len(part) for part in model.store.parts_of(pages[0])) if pages else ()


def _parts(model: Model, pages: Sequence[HeldPage]) -> Iterator[torch.Tensor]:
    """The memory of the pages, those of the first place first."""
    for place in range(len(_part_bytes(model, pages))):
        for held in pages:
            yield model.store.parts_of(held)[place]


def _ignored(done: int, total: int) -> None:
    pass
