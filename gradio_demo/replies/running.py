"""The replies that run now, by the browser tab that asked: one each, so that Stop ends the right one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ropewalk.base.errors import RequestError

BUSY = "this page is still busy with a reply: stop it first"
PATIENCE_S = 10.0


class Cancellable(Protocol):
    """A reply or a measurement."""

    def cancel(self) -> None: ...


class Running:
    """Safe to use from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_tab: dict[str, Cancellable] = {}

    def __len__(self) -> int:
        return len(self._by_tab)

    @contextmanager
    def hold(self, tab: str, work: Cancellable) -> Iterator[None]:
        """Count `work` as what this tab is doing, within this context.

        Raises:
            RequestError: the tab is already doing something else.
        """
        with self._changed:
            if tab in self._by_tab:
                raise RequestError(BUSY)
            self._by_tab[tab] = work
        try:
            yield
        finally:
            with self._changed:
                self._by_tab.pop(tab, None)
                self._changed.notify_all()

    def stop(self, tab: str) -> bool:
        """End what this tab is doing; False if it is doing nothing."""
        with self._changed:
            work = self._by_tab.get(tab)
        if work is not None:
            work.cancel()
        return work is not None

    def end(self, tab: str) -> None:
        """As `stop`, and wait until it has ended: the tab is free for something else, unless it takes very long."""
        self.stop(tab)
        with self._changed:
            self._changed.wait_for(lambda: tab not in self._by_tab, PATIENCE_S)
