"""Work in a thread of its own: it reports progress, can be cancelled, and can be followed by its caller.

    start() or run() -> progress, changed, ... -> over, with `result`, `error` or `failure`

There are two ways to follow it: a caller that may block looks a few times a second (`follow`); an event loop passes
`on_change`, which wakes it, and then reads the same fields.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from ropewalk.base.errors import RopewalkError

Result = TypeVar("Result")
Look = TypeVar("Look")

EXIT_PATIENCE_S = 20.0
_running: WeakSet[Work[Any]] = WeakSet()


class Work(Generic[Result]):
    """Runs `function(work)` once. The function passes `work.progress` and `work.is_cancelled` to what it calls, and
    calls `work.changed()` when there is something new to look at.

    on_change: called in the working thread after each change and at the end; it must not block or raise.
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
        self.error: RopewalkError | None = None  # an expected error, whose message is for people
        self.failure: Exception | None = None  # anything else: a bug in ropewalk

    @property
    def is_over(self) -> bool:
        """True once the function has returned or raised."""
        return self._over.is_set()

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called; long calls check this between their steps."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask it to end soon; what it has produced by then is kept."""
        self._cancelled.set()

    def wait(self, seconds: float) -> bool:
        """Wait until it is over, so long at most; whether it is."""
        return self._over.wait(max(seconds, 0.0))

    def progress(self, done: int, total: int) -> None:
        """Report that `done` of `total` steps are done."""
        self.done_of = (done, total)
        self.changed()

    def changed(self) -> None:
        """Tell followers that there is something new."""
        self._news.set()
        if self._on_change is not None:
            self._on_change()

    def start(self) -> None:
        """Run it in a new thread, which ends with the process: see `_end_all`."""
        _running.add(self)
        threading.Thread(target=self.run, name=self._name, daemon=True).start()

    def run(self) -> None:
        """Run it in the caller's thread, such as a thread of a pool. Raises nothing: see `error` and `failure`."""
        try:
            self.result = self._function(self)
        except RopewalkError as error:
            self.error = error
        except Exception as error:  # kept for the follower
            self.failure = error
        finally:
            self._over.set()
            self.changed()

    def follow(self, look: Callable[[bool], Look], every_s: float) -> Iterator[Look]:
        """Start it, and yield `look(is_over)` when there is news, or after `every_s` seconds without any, but leave at
        least `every_s` seconds between looks. Only the last look gets True. Leaving the iteration cancels the work.

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


@atexit.register
def _end_all() -> None:
    """A thread that is in the core when the interpreter goes cannot be unwound: the process would abort."""
    left = list(_running)
    for work in left:
        work.cancel()
    until = time.monotonic() + EXIT_PATIENCE_S
    for work in left:
        work.wait(until - time.monotonic())
