"""Who may change the model that all visitors share: load another one, unload it, run another layer order.

With logins, it is those named at the start. Without, only browsers can be told apart: the first one owns the model as
long as it keeps asking for news. Once it has been quiet for a while, the next one that asks becomes the owner.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ropewalk.base.errors import RequestError
from ropewalk.gradio_demo.shared.visitors import Visitor, person_of_login

# An open page asks for news every two seconds, but browsers wake pages in the background only once a minute.
ABSENT_S = 150.0


class Owner:
    """anyone: everybody may. logins: the names that may, if people log in. Safe to use from many threads."""

    def __init__(
        self, anyone: bool = False, logins: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._anyone = anyone
        self._logins = tuple(logins)
        self._clock = clock
        self._lock = threading.Lock()
        self._first: str | None = None
        self._seen_s = 0.0

    def may(self, visitor: Visitor) -> bool:
        """Whether this visitor may change the model. Asking counts as a sign of life."""
        if self._anyone:
            return True
        if self._logins:
            return visitor.person in map(person_of_login, self._logins)
        with self._lock:
            now = self._clock()
            if self._first is None or now - self._seen_s > ABSENT_S:
                self._first = visitor.person
            if self._first == visitor.person:
                self._seen_s = now
            return self._first == visitor.person

    def require(self, visitor: Visitor) -> None:
        """Raises RequestError, which says who may, for a visitor who may not."""
        if not self.may(visitor):
            raise RequestError(self.explanation)

    @property
    def explanation(self) -> str:
        """Who may, in words for those who may not."""
        if self._logins:
            return f"everybody here talks to this model, and only {' or '.join(self._logins)} may change it"
        return (
            "everybody here talks to this model, and only the browser that opened the page first may change it, until "
            f"it has been away for {ABSENT_S / 60:g} minutes (start with --anyone-may-load to let everybody do it)"
        )
