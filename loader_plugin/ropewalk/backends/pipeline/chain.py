"""Rank 0's side of the ring: what it sends to the other ranks, and the answers that come back.

Changes of pages are collected and sent with the next message: a step in a page that is there already needs one message.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import count

from ropewalk.backends.pipeline.messages import Changes, End, Message
from ropewalk.backends.pipeline.watch import Watch
from ropewalk.backends.pipeline.wire import LostError, Wire
from ropewalk.base.errors import RankError, brief

ENDING_S = 5.0  # for the last message to come around: a rank may be in the middle of a step
LOADED = 0  # the number of the answer to `Load`


class Chain:
    """May be used from any thread. watch: made by the caller, who calls `failed` when it fails. on_end: called once,
    when the last message is around, or will not be: lets the other ranks go, or ends them."""

    def __init__(self, wire: Wire, on_end: Callable[[], None]) -> None:
        self.size = wire.size
        self._wire, self._on_end = wire, on_end
        self._watch: Watch
        self._sending = threading.Lock()
        self._closing = threading.RLock()
        self._changes: deque[list] = deque()
        self._numbers = count(LOADED + 1)
        self._news = threading.Condition()
        self._answers: dict[int, Message] = {}
        self._is_closed = self._is_around = False
        self._listeners: list[Callable[[], None]] = []

    def begin(self, watch: Watch) -> None:
        """Listen from now on."""
        self._watch = watch
        threading.Thread(target=self._listen, name="ropewalk-pipeline", daemon=True).start()

    @property
    def error(self) -> RankError | None:
        """What the pipeline has failed with."""
        return self._watch.error

    def new_number(self) -> int:
        """For a page, a pool, a low-rank change, or a message that is answered."""
        return next(self._numbers)

    def change_(self, *change: int | str) -> None:
        """For the next `Changes`. May be called by the garbage collector, anywhere."""
        self._changes.append(list(change))

    def send_(self, message: Message) -> None:
        """To rank 1, after the changes so far.

        Raises:
            RankError: the pipeline has failed, or was closed.
        """
        try:
            with self._sending:
                self._check_open()
                changes = [self._changes.popleft() for _ in range(len(self._changes))]
                if changes:
                    self._wire.send_(Changes(changes))
                self._wire.send_(message)
        except LostError as error:
            raise self._watch.fail_(error.rank, str(error)) from error

    def answer(self, number: int) -> Message:
        """The answer with this number, once it is there. Waits for as long as all ranks are alive.

        Raises:
            RankError: the pipeline has failed, or was closed.
        """
        with self._news:
            while number not in self._answers:
                self._check_open()
                self._news.wait()
            return self._answers.pop(number)

    def when_failed(self, function: Callable[[], None]) -> None:
        """Call this once, in some thread, if the pipeline fails."""
        self._listeners.append(function)
        if self._watch.error is not None:
            function()

    def failed(self, error: RankError) -> None:
        """Wake all who wait for answers; there will be none."""
        with self._news:
            self._news.notify_all()
        for function in list(self._listeners):
            function()
        self.close()

    def close(self) -> None:
        """End the other ranks. A second call only waits until they have."""
        with self._closing:
            self._close()

    def _close(self) -> None:
        with self._sending:
            if self._is_closed:
                return
            self._is_closed = True
            has_failed = self._watch.error is not None
            self._watch.end()
            try:
                if not has_failed:
                    self._wire.send_(End())
            except LostError:  # it has gone already
                pass
        with self._news:
            self._news.notify_all()
            if not has_failed:
                self._news.wait_for(lambda: self._is_around, ENDING_S)
        self._on_end()

    def _check_open(self) -> None:
        if self._watch.error is not None:
            raise RankError(str(self._watch.error))  # each thread gets one of its own, with its own traceback
        if self._is_closed:
            raise RankError("the pipeline was closed: load the model again")

    def _listen(self) -> None:
        while True:
            try:
                message = self._wire.receive().message
            except (LostError, RankError) as error:
                if not self._is_closed:
                    self._watch.fail_(self._wire.before, brief(error))
                return
            with self._news:
                if isinstance(message, End):
                    self._is_around = True
                    self._news.notify_all()
                    return
                self._answers[getattr(message, "number", LOADED)] = message
                self._news.notify_all()
