"""A file that appears whole or not at all: written under another name in the same folder, then renamed."""

from __future__ import annotations

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
        OSError: no permission, a full disk, or no such folder.
    """
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
