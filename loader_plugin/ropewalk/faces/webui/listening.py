"""The warnings of ropewalk, for the page: its users do not see the console."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """The warnings that ropewalk gives in this thread within this context, each once; the console gets them too."""
    logger, ear = logging.getLogger("ropewalk"), _Ear()
    logger.addHandler(ear)
    try:
        yield ear.heard
    finally:
        logger.removeHandler(ear)


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.partition(".")[0] == "ropewalk" and record.thread == self._thread
        text = record.getMessage()
        if ours and record.levelno == logging.WARNING and text not in self.heard:
            self.heard.append(text)
