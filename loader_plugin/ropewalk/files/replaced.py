"""A file that appears whole or not at all: written under another name in the same folder, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # the end of such another name; what bears it was left by a process that was killed


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Write to what is given; when the block ends, `path` is that file. After an error it is what it was before.

    Raises:
        OSError: as `check_replaceable`; a full disk.
    """
    check_replaceable(path)
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Find out before long work that a file could not appear there.

    Raises:
        OSError: its folder does not exist or may not be written to, or what is there is no file (a folder, a device).
    """
    check_place(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "what is there is no file", str(path))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "there is no permission to write to its folder", str(path))


def check_place(path: Path) -> None:
    """The same for what may be written in place, a device too.

    Raises:
        OSError: its folder does not exist, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
