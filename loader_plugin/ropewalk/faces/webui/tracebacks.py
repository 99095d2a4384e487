"""Keeps our hooks out of the tracebacks of other loaders' errors, which pass through them: people look for the fault in
the files that a traceback names."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from ropewalk.base.errors import RopewalkError

HOOKS = Path(__file__).parent  # as the frames name it, through links or not
PACKAGE = HOOKS.parents[1]


def drop_our_frames(error: BaseException) -> None:
    """Take the frames of this folder out of the traceback of an error that was not raised in ropewalk.

    To be called in an `except` block that ends with a bare `raise`, which adds no entry for its own frame.
    """
    entries = _entries(error.__traceback__)
    if not entries or isinstance(error, RopewalkError) or _raised_here(entries):
        return
    following: TracebackType | None = None
    for entry in reversed(entries):
        if not _is_below(entry, HOOKS):
            entry.tb_next = following
            following = entry
    error.__traceback__ = following


def _raised_here(entries: list[TracebackType]) -> bool:
    """True if ropewalk itself failed, and not a function that a hook called."""
    return _is_below(entries[-1], HOOKS) or any(
        _is_below(entry, PACKAGE) and not _is_below(entry, HOOKS) for entry in entries
    )


def _entries(traceback: TracebackType | None) -> list[TracebackType]:
    entries = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    return entries


def _is_below(entry: TracebackType, folder: Path) -> bool:
    return Path(entry.tb_frame.f_code.co_filename).is_relative_to(folder)
