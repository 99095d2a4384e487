"""Stop strings in streamed text: what may be shown now, and whether a stop string has come.

Only text that could still become a stop string is held back. A stop string is never shown, not even in part, however
its characters are spread over the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Filters one reply. `push` and `flush` return the text that may be shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.found: str | None = None  # the stop string that has come

    def push(self, text: str) -> str:
        """Take the next piece of text. Once a stop string has come, nothing more is let through."""
        if not self._stops or self.found is not None:
            return "" if self.found is not None else text
        self._held += text
        starts = [(stop, start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            # The one that is complete first, and among equals the longest: the result does not depend on the pieces.
            self.found, start = min(starts, key=lambda hit: (hit[1] + len(hit[0]), hit[1]))
            return self._take(start)
        return self._take(self._first_possible_start())

    def flush(self) -> str:
        """The text still held back: the reply has ended without a stop string."""
        return "" if self.found is not None else self._take(len(self._held))

    def _first_possible_start(self) -> int:
        """The first position from which the held text could begin a stop string."""
        first = max(0, len(self._held) - self._longest + 1)
        positions = range(first, len(self._held))
        return next((p for p in positions if self._begins_a_stop(self._held[p:])), len(self._held))

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _take(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown
