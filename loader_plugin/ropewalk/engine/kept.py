"""Prompts that are read once: kept in files, found again by requests that begin like them.

    keep:    prompt -> read (or found in memory) -> file
    recall:  prompt -> the file with the longest beginning of it -> pages, shared -> the request attaches to them

A file is looked at only if it has at least a page of tokens that memory has not. What it holds goes to the prefixes
that all requests share, and is forgotten like them when memory is short; the file stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ropewalk.adapters.request import Request
from ropewalk.base.errors import CacheFullError, RequestError, SavedCacheError
from ropewalk.engine.kept_folder import KeptFile, KeptFolder
from ropewalk.engine.turn_queue import Ticket
from ropewalk.generate.generate import Cancelled, Progress
from ropewalk.generate.scheduler.plan import INTERACTIVE, PAGE_ROWS
from ropewalk.model.cache import KvCache, common_length
from ropewalk.model.saved.read import fitting_segments, open_saved
from ropewalk.model.saved.write import check_writable

logger = logging.getLogger(__name__)

HEAD_BYTES = 1 << 16  # more than the head of a file takes beside its tokens


@dataclass(frozen=True, slots=True)
class Kept:
    """A prompt in a file. num_bytes: of the file. about: texts that are kept with it."""

    path: Path
    token_ids: list[int] = field(repr=False)
    num_bytes: int
    about: Mapping[str, str]

    @property
    def num_tokens(self) -> int:
        """The number of its tokens."""
        return len(self.token_ids)


class Reader(Protocol):
    """What is needed of an engine."""

    @property
    def model(self) -> Any: ...
    def encode(self, text: str) -> list[int]: ...
    def read(
        self,
        prompt: str | Sequence[int],
        cancelled: Cancelled | None = None,
        progress: Progress | None = None,
        adapters: Request | None = None,
        ticket: Ticket | None = None,
        client: Hashable = None,
        priority: str = INTERACTIVE,
    ) -> Any: ...


class KeptPrompts:
    """What an engine keeps in files. folder: where requests find prompts again by themselves, if there is one.
    num_recalled: how often they did."""

    def __init__(self, engine: Reader, folder: KeptFolder | None) -> None:
        self._engine = engine
        self.folder = folder
        self.num_recalled = 0
        self._loading = threading.Lock()  # one file at a time: the next request may need the same

    def save(
        self, prompt: str | Sequence[int], path: str | Path, about: Mapping[str, str] | None = None, **reading: Any
    ) -> Kept | None:
        """Read a prompt, or find it in memory, and write it to a file; None if cancelled.

        about: texts to be kept with it, such as a title. reading: cancelled, progress, adapters, ticket, client and
        priority, as for `Engine.stream`.

        Raises:
            RequestError, QueueFullError: as `Engine.stream`. SavedCacheError: the file cannot be written.
        """
        check_writable(path)
        cache = self._engine.read(prompt, **reading)
        if cache is None:
            return None
        num_bytes = cache.save(path, about=about)
        return Kept(Path(path), cache.token_ids, num_bytes, dict(about or {}))

    def load(self, path: str | Path, progress: Callable[[int, int], None] | None = None) -> Kept:
        """Take what a file holds into memory: prompts that begin with it start from it from now on.

        progress: called with (steps done, steps in all).

        Raises:
            SavedCacheError, CacheFullError: as `Model.load_cache`.
        """
        model = self._engine.model
        with self._loading:
            cache = model.load_cache(path, progress)
            model.share(cache)
        saved = open_saved(path)
        return Kept(saved.path, cache.token_ids, saved.num_bytes, saved.description.about)

    def save_as(
        self, name: str, prompt: str | Sequence[int], about: Mapping[str, str] | None = None, **reading: Any
    ) -> Kept | None:
        """As `save`, in the folder: in place of what has that name, and of what was not used for the longest time.

        Raises:
            RequestError: also as `check`.
        """
        ids = self._engine.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.check(name, ids, about)
        cache = self._engine.read(ids, **reading)
        return None if cache is None else self.write_as(name, cache, about)

    def check(self, name: str, prompt_ids: Sequence[int], about: Mapping[str, str] | None = None) -> None:
        """Whether a prompt can be kept under that name, before it is read.

        Raises:
            RequestError: there is no folder, it is not a name, or the folder may not hold so much.
        """
        self.require_folder().path_of(name)
        self.folder.check_size(self._file_bytes(len(prompt_ids), about))

    def write_as(self, name: str, cache: KvCache, about: Mapping[str, str] | None = None) -> Kept:
        """Write a prompt that has been read (`Engine.read`, `TextStream.prompt_cache`) to the folder; what is there
        already is left as it is.

        Raises:
            RequestError: as `check`. SavedCacheError: the file cannot be written, or no room be made for it.
        """
        folder, ids = self.require_folder(), cache.token_ids
        there = folder.find(name)
        if there is not None and self._holds(there, cache, about):
            folder.touch(there)
            return Kept(there.path, ids, there.num_bytes, there.saved.description.about)
        folder.make_room(self._file_bytes(len(ids), about), name)
        num_bytes = cache.save(folder.path_of(name), about=about)
        return Kept(folder.path_of(name), ids, num_bytes, dict(about or {}))

    def problem_of(self, kept: KeptFile) -> str | None:
        """Why a file of the folder cannot be used by the model as it is loaded; None if it can."""
        if kept.saved is None:
            return kept.problem
        try:
            self._engine.model.check_saved(kept.saved)
        except SavedCacheError as error:
            return str(error)
        return None

    def recall(self, prompt_ids: Sequence[int], adapters: Request | None = None) -> KeptFile | None:
        """Before a prompt is read: take the file of the folder with the longest beginning of it into memory.

        None if there is none, or memory has as much. A file that cannot be used is reported in the log and left alone:
        the prompt is then read as if it were not there.
        """
        if self.folder is None:
            return None
        ids = list(prompt_ids)
        try:
            if not self._longer(ids, adapters):
                return None
            with self._loading:  # another request may have taken the same file into memory meanwhile
                return next((kept for kept in self._longer(ids, adapters) if self._take(kept)), None)
        except SavedCacheError as error:  # of the folder
            logger.warning("%s", error)
            return None

    def require_folder(self) -> KeptFolder:
        """Raises:
        RequestError: the engine was made without a folder.
        """
        if self.folder is None:
            raise RequestError("no folder for kept prompts was given: start with --cache-folder DIR")
        return self.folder

    def _longer(self, ids: list[int], adapters: Request | None) -> list[KeptFile]:
        """The files with a page or more of the prompt that memory has not, those with the most first.

        Raises:
            SavedCacheError: the folder cannot be read.
        """
        model = self._engine.model
        known = model.shared_length(ids, adapters)
        found = []
        for kept in self.folder.list():
            if kept.saved is None or common_length(kept.saved.token_ids, ids) < known + PAGE_ROWS:
                continue
            try:
                length = model.usable_prefix(kept.saved, ids, adapters)
            except SavedCacheError as error:
                logger.info("a kept prompt is not used: %s", error)
                continue
            if length >= known + PAGE_ROWS:
                found.append((length, kept))
        return [kept for _, kept in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def _take(self, kept: KeptFile) -> bool:
        """Take a file into memory, for the requests that share prefixes; False if that cannot be done."""
        model = self._engine.model
        try:
            model.share(model.load_cache(kept.path))
        except CacheFullError as error:
            logger.warning("a kept prompt is not used: %s", error)
            return False
        except SavedCacheError as error:
            self.folder.set_aside(kept, str(error))
            return False
        self.folder.touch(kept)
        self.num_recalled += 1
        return True

    def _holds(self, kept: KeptFile, cache: KvCache, about: Mapping[str, str] | None) -> bool:
        """Whether a file holds exactly this already."""
        if kept.saved is None or kept.saved.token_ids != cache.token_ids:
            return False
        try:
            segments = fitting_segments(self._engine.model, kept.saved)
        except SavedCacheError:
            return False
        return tuple(segments) == cache.whole_segments and kept.saved.description.about == dict(about or {})

    def _file_bytes(self, num_tokens: int, about: Mapping[str, str] | None) -> int:
        """Of a file, or a little more."""
        return self._engine.model.cache_bytes(num_tokens) + 4 * num_tokens + HEAD_BYTES + _size(about)


def _size(about: Mapping[str, str] | None) -> int:
    return sum(12 * len(text) for pair in (about or {}).items() for text in pair)  # at most, as JSON within JSON


def opening(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The tokens that two prompts share at their beginning: what does not depend on the text in which they differ."""
    return list(one[: common_length(one, other)])
