"""The command `ropewalk`, which is also `python -m ropewalk`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"  # the file that Python names for the frames of its import system


def main() -> int:
    """Run the command line; returns the exit code."""
    with _interruptible_imports():
        from ropewalk.faces.cli.main import main as run

        return run()


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Within this context Ctrl-C ends the process where a module is being imported, which takes a moment at the start.
    Native modules make of a KeyboardInterrupt what they like: advice about a broken installation, or an abort."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it may be ignored
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
