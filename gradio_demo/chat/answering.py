"""Which conversations are being answered: each is changed in one place at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ropewalk.base.errors import RequestError
from ropewalk.gradio_demo.shared.visitors import Visitor

HERE = "a reply is being written: stop it first, or wait until it has ended"
ELSEWHERE = "a reply to this conversation is being written in another tab: stop it there, or wait until it has ended"


class BusyError(RequestError):
    """Not now: a reply is being written."""


class Answering:
    """Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tabs: dict[tuple[str, str], str] = {}  # by person and conversation

    @contextmanager
    def hold(self, visitor: Visitor, conversation_id: str) -> Iterator[None]:
        """Nobody else changes this conversation within this context.

        Raises:
            BusyError: somebody does already.
        """
        key = visitor.person, conversation_id
        with self._lock:
            if key in self._tabs:
                raise BusyError(HERE if self._tabs[key] == visitor.tab else ELSEWHERE)
            self._tabs[key] = visitor.tab
        try:
            yield
        finally:
            with self._lock:
                del self._tabs[key]

    def require_idle(self, visitor: Visitor) -> None:
        """A tab that shows a reply as it grows can show nothing else.

        Raises:
            BusyError: this tab does.
        """
        with self._lock:
            if any(person == visitor.person and tab == visitor.tab for (person, _), tab in self._tabs.items()):
                raise BusyError(HERE)
