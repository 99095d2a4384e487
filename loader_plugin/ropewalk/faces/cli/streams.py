"""The three standard streams, which a caller may have closed, filled up or given a poor encoding."""

from __future__ import annotations

import errno
import os
import stat
import sys

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def prepare_streams() -> None:
    """Make all three usable: one that was closed when the process began is as if it led nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a character that the terminal lacks becomes a mark, not an error


def is_piped() -> bool:
    """Whether standard input is a pipe or a file, so that somebody may have put a text into it."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or an object of Python's
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def is_of_output(error: OSError) -> bool:
    """Whether an error is that of writing to a stream, such as on a full disk: those of files have names, or are turned
    into errors of ours where they are written."""
    return error.filename is None and error.errno in WRITING


def discard_output() -> None:
    """Forget what was not written: Python would try again at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
