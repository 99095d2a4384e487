"""What every command does at a terminal: lines for people, a bar of progress, a text that is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ropewalk.base.errors import RequestError


def note(text: str) -> None:
    """Print a line for people, apart from the output. If nobody can read it, the work goes on."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(what: str, unit: str, at_least: int = 0) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) that draws a bar on stderr; None if stderr is not a terminal.

    at_least: nothing is drawn for smaller totals.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and total >= at_least:
            bar = tqdm(desc=what, unit=f" {unit}", total=total, file=sys.stderr, leave=False)
        if bar is not None:
            bar.update(done - bar.n)
            if done >= total:
                bar.close()

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def check_spares(option: str, path: Path, text: str | Path | None) -> None:
    """text: a file that is read ("-" or None: none is), which what is written must not take the place of.

    Raises:
        RequestError: both are the same file, also by another name.
    """
    if text not in (None, "-", Path("-")) and path.exists() and Path(text).exists() and path.samefile(text):
        raise RequestError(f"{option} {path} is the text itself, which would be overwritten: give another file")


def read_text(path: str) -> str:
    """A UTF-8 text file; "-" is standard input.

    Raises:
        RequestError: it cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise RequestError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
