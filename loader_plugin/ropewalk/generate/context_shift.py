"""What happens when a reply reaches the end of the window: it ends there, or the oldest tokens go and it continues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ropewalk.base.errors import RequestError
from ropewalk.generate.scheduler.plan import PAGE_ROWS

SINKS = 4  # much attention goes to the first tokens of a text, whatever they say (Xiao et al. 2023, arXiv:2309.17453)
PART = (
    4  # of what is not kept, one in so many goes at a time: seldom enough, and the rest still fills most of the window
)


@dataclass(frozen=True, slots=True)
class ContextShift:
    """keep: so many tokens stay at the start of the window, such as those of the system prompt."""

    keep: int = SINKS

    def stretch(self, length: int) -> tuple[int, int]:
        """(keep, drop) for a window of that many tokens that is full; at least one token goes, and one stays.

        At most half of the window is kept at the start. Whole pages go where there are so many.
        """
        keep = min(max(self.keep, 1), length // 2)
        drop = max((length - keep) // PART, 1)
        return keep, drop // PAGE_ROWS * PAGE_ROWS or drop


def checked_shift(context_shift: Any, keep: int = SINKS) -> ContextShift | None:
    """What the option `context_shift` says: True keeps `keep` tokens, a number so many, False or None shifts nothing.

    Raises:
        RequestError: something else.
    """
    if context_shift is None or context_shift is False:
        return None
    if context_shift is True:
        return ContextShift(keep)
    if not isinstance(context_shift, int) or context_shift < 0:
        raise RequestError(
            "context_shift must be True, False, or the number of tokens that are kept at the start, got "
            f"{context_shift!r:.80}"
        )
    return ContextShift(max(context_shift, 1))
