"""The replies that run now, by the browser tab that asked: one each, so that Stop ends the right one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ropewalk.base.errors import RequestError


class Cancellable(Protocol):
    """A reply or a measurement."""

    def cancel(self) -> None: ...


class Running:
    """Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_tab: dict[str, Cancellable] = {}

    def __len__(self) -> int:
        return len(self._by_tab)

    @contextmanager
    def hold(self, tab: str, work: Cancellable) -> Iterator[None]:
        """Count `work` as what this tab is doing, within this context.

        Raises:
            RequestError: the tab is already doing something else.
        """
        with self._lock:
            if tab in self._by_tab:
                raise RequestError("this page is still busy with a reply: stop it first")
            self._by_tab[tab] = work
        try:
            yield
        finally:
            with self._lock:
                self._by_tab.pop(tab, None)

    def stop(self, tab: str) -> bool:
        """End what this tab is doing; False if it is doing nothing."""
        with self._lock:
            work = self._by_tab.get(tab)
        if work is not None:
            work.cancel()
        return work is not None
