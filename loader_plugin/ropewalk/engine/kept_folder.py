"""A folder of saved caches under names, of a bounded size: what was not used for the longest time goes first.

A file's time of access says when it was last of use; it is set here, so the options of the file system do not matter.
Several processes may share a folder: each file appears whole or not at all, and one that another process has removed is
no longer there. The folder holds what people wrote: only its owner can read one that is made here.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ropewalk.base.errors import ConfigError, RequestError, SavedCacheError
from ropewalk.base.json import shown
from ropewalk.base.memory import format_bytes
from ropewalk.files.replaced import PARTIAL
from ropewalk.model.saved.file import SavedFile
from ropewalk.model.saved.read import open_saved

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
NAMES = "1 to 100 letters, digits, dots, dashes and underscores, not beginning with a dot or a dash"
MOST_BYTES = 32 << 30  # by default
STALE_S = 3600.0  # a partial file that old belongs to a process that was killed


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file of the folder. used_s: when it was last of use. saved: its head; None if it cannot be read: `problem`."""

    name: str
    path: Path
    num_bytes: int
    used_s: float
    saved: SavedFile | None
    problem: str | None = None


class KeptFolder:
    """The saved caches in `folder`, which is made if it does not exist. May be used from any thread.

    most_bytes: of all its files together.

    Raises:
        ConfigError: no such folder can be made, or it may not be written to; most_bytes is not positive.
    """

    def __init__(self, folder: str | Path, most_bytes: int = MOST_BYTES) -> None:
        if not isinstance(most_bytes, int) or isinstance(most_bytes, bool) or most_bytes < 1:
            raise ConfigError(f"the size of the cache folder must be a positive number of bytes, got {most_bytes!r}")
        self.folder, self.most_bytes = Path(folder), most_bytes
        self._lock = threading.Lock()
        self._heads: dict[tuple[str, int, int], SavedFile | str] = {}  # by name, size and time: read once
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the cache folder {self.folder} cannot be made: {error.strerror or error}") from error
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"the cache folder {self.folder} cannot be used: there is no permission to write to it")
        self._remove_partial()

    def path_of(self, name: str) -> Path:
        """Where the file of that name is, or would be.

        Raises:
            RequestError: not a name that a file may have.
        """
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise RequestError(f"the name of a kept prompt must have {NAMES}, got {shown(name)}")
        return self.folder / (name + SUFFIX)

    def list(self) -> list[KeptFile]:
        """All files, those of use most recently first. Heads are read once, and checked."""
        with self._lock:
            found = [self._kept(path, status) for path, status in self._files()]
        return sorted(found, key=lambda kept: kept.used_s, reverse=True)

    def find(self, name: str) -> KeptFile | None:
        """The file of that name, if there is one.

        Raises:
            RequestError: as `path_of`.
        """
        path = self.path_of(name)
        return next((kept for kept in self.list() if kept.path == path), None)

    def remove(self, name: str) -> bool:
        """Delete the file of that name; False if there is none.

        Raises:
            RequestError: as `path_of`. SavedCacheError: it may not be deleted.
        """
        return self._remove(self.path_of(name))

    def touch(self, kept: KeptFile) -> None:
        """It was of use just now. Its time of writing stays, which shows whether it has changed."""
        with suppress(OSError):
            os.utime(kept.path, ns=(time.time_ns(), kept.path.stat().st_mtime_ns))

    def set_aside(self, kept: KeptFile, problem: str) -> None:
        """Its pages turned out to be damaged: it is not looked at again until it is replaced."""
        logger.warning("%s", problem)
        with self._lock:
            self._heads = {key: problem if key[0] == kept.path.name else head for key, head in self._heads.items()}

    def check_size(self, num_bytes: int) -> None:
        """Raises:
        RequestError: a file of that size is more than the folder may hold.
        """
        if num_bytes > self.most_bytes:
            raise RequestError(
                f"keeping this takes {format_bytes(num_bytes)}, and the cache folder may hold "
                f"{format_bytes(self.most_bytes)}: keep less, or allow it more"
            )

    def make_room(self, num_bytes: int, name: str) -> None:
        """Delete files, least recently used first, until one of that size fits; that of the same name is replaced.

        Raises:
            RequestError: as `check_size`. SavedCacheError: a file may not be deleted.
        """
        self.check_size(num_bytes)
        others = [kept for kept in self.list() if kept.path != self.path_of(name)]
        used = sum(kept.num_bytes for kept in others)
        while others and used + num_bytes > self.most_bytes:
            oldest = others.pop()
            used -= oldest.num_bytes
            logger.info("removing the kept prompt %s: it was not used for the longest time", oldest.name)
            self._remove(oldest.path)

    @property
    def used_bytes(self) -> int:
        """The size of all files."""
        return sum(status.st_size for _, status in self._files())

    def _kept(self, path: Path, status: os.stat_result) -> KeptFile:
        """The file, with its head, which is read if it is not known yet."""
        key = path.name, status.st_size, status.st_mtime_ns
        if key not in self._heads:
            self._heads = {known: head for known, head in self._heads.items() if known[0] != path.name}
            try:
                self._heads[key] = open_saved(path)
            except SavedCacheError as error:
                logger.warning("%s", error)
                self._heads[key] = str(error)
        head, used_s = self._heads[key], max(status.st_atime, status.st_mtime)
        name = path.name.removesuffix(SUFFIX)
        if isinstance(head, str):
            return KeptFile(name, path, status.st_size, used_s, None, head)
        return KeptFile(name, path, status.st_size, used_s, head)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            entries = list(os.scandir(self.folder))
        except OSError as error:
            raise SavedCacheError(
                f"the cache folder {self.folder} cannot be read: {error.strerror or error}"
            ) from error
        for entry in entries:
            stem = entry.name.removesuffix(SUFFIX)
            if stem == entry.name or NAME.fullmatch(stem) is None:
                continue
            with suppress(OSError):  # removed meanwhile
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SavedCacheError(f"{path} cannot be deleted: {error.strerror or error}") from error
        return True

    def _remove_partial(self) -> None:
        """What processes that were killed left behind."""
        for path in self.folder.glob(f".*{PARTIAL}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
