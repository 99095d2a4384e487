"""Work in a thread of its own: it says how far it is, can be cancelled, and is followed by whoever asked for it.

    start() or run() -> progress, changed, ... -> over, with `result`, `error` or `failure`

Two kinds of followers: one that may block looks a few times a second (`follow`); an event loop gives `on_change`, which
wakes it, and then reads the same fields.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ropewalk.base.errors import RopewalkError

Result = TypeVar("Result")
Look = TypeVar("Look")


class Work(Generic[Result]):
    """Runs `function(work)` once. The function gives `work.progress` and `work.is_cancelled` to what it calls, and
    calls `work.changed()` when there is something new to look at.

    on_change: called in the working thread after each change and at the end; it must not block and must not raise.
    """

    def __init__(
        self,
        function: Callable[[Work[Result]], Result],
        name: str = "work",
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._function = function
        self._name = name
        self._on_change = on_change
        self._cancelled = threading.Event()
        self._news = threading.Event()
        self._over = threading.Event()
        self.done_of: tuple[int, int] = (0, 0)
        self.result: Result | None = None
        self.error: RopewalkError | None = None  # explained: for people
        self.failure: Exception | None = None  # anything else: a mistake of ours

    @property
    def is_over(self) -> bool:
        """True once the function has returned or raised."""
        return self._over.is_set()

    def is_cancelled(self) -> bool:
        """What long calls ask between their steps."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask it to end soon; what it has made until then stays."""
        self._cancelled.set()

    def progress(self, done: int, total: int) -> None:
        """So many steps of so many are done."""
        self.done_of = (done, total)
        self.changed()

    def changed(self) -> None:
        """There is something new for followers."""
        self._news.set()
        if self._on_change is not None:
            self._on_change()

    def start(self) -> None:
        """Run it in a new thread."""
        threading.Thread(target=self.run, name=self._name, daemon=True).start()

    def run(self) -> None:
        """Run it in the caller's thread, such as one of a pool. Raises nothing: see `error` and `failure`."""
        try:
            self.result = self._function(self)
        except RopewalkError as error:
            self.error = error
        except Exception as error:  # handed to the follower, who is asked for it
            self.failure = error
        finally:
            self._over.set()
            self.changed()

    def follow(self, look: Callable[[bool], Look], every_s: float) -> Iterator[Look]:
        """Start it, and give `look(is it over?)` when there is news or `every_s` seconds have passed, but no sooner
        than that after the look before. The last look, and only that, is given True. Leaving the iteration cancels.

        Raises:
            Exception: the `failure`, in place of the last look.
        """
        self.start()
        try:
            while not self.is_over:
                self._news.wait(every_s)
                self._news.clear()
                if self.is_over:
                    break
                yield look(False)
                self._over.wait(every_s)
            if self.failure is not None:
                raise self.failure
            yield look(True)
        finally:
            self.cancel()
