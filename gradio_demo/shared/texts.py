"""Text files that people drop on the page."""

from __future__ import annotations

from pathlib import Path

from ropewalk.base.errors import RequestError

MAX_TEXT_BYTES = 4 * 2**20


def read_text_file(path: Path) -> str:
    """A UTF-8 text.

    Raises:
        RequestError: too large, not text, or unreadable.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise RequestError(f"{path.name} is larger than the {MAX_TEXT_BYTES // 2**20} MiB that a text may have")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        raise RequestError(f"{path.name} is not text: it holds NUL characters")
    return text.replace("\r\n", "\n")
